"""
Latent recursion for language models, Hugging Face-native.

Importing this registers every model with the Auto classes. Trainers, data, evaluation and the rest are imported when
their names are first used.
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The command line answers --help and a wrong flag before it imports torch, which takes seconds; `CommandParser` does
# then what importing the package does elsewhere.
_IS_COMMAND_LINE = Path(sys.argv[0]).stem == "llada-trm" or f"{__name__}.cli" in sys.orig_argv

if TYPE_CHECKING or not _IS_COMMAND_LINE:
    # ruff: isort: off
    from .models import *  # noqa: F403 (before generation, which imports one of its files)
    from .models import __all__ as _models
    from .generation import *  # noqa: F403
    from .generation import __all__ as _generation
    from . import inspection  # draws traces, and reports in debug mode
    # ruff: isort: on
else:
    _models = _generation = []

if TYPE_CHECKING:
    from .data import *  # noqa: F403
    from .evaluation import *  # noqa: F403
    from .hidden_pairs import *  # noqa: F403
    from .hub import *  # noqa: F403
    from .rl import *  # noqa: F403
    from .training import *  # noqa: F403

try:
    __version__ = version("llada-trm-hf")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"

# The public names of each folder, which is imported when one of them is used.
_LAZY = {
    "data": (
        "LatentAnswerCollator",
        "MaskedDiffusionCollator",
        "TextCollator",
        "ThoughtFormat",
        "byte_tokenizer",
        "checking_program",
        "difference_chains",
        "latent_thinking_prompt",
        "load_reasoning_dataset",
        "load_text_dataset",
        "prompt_tokens",
        "tokenize_latent_answers",
        "tokenize_reasoning",
        "tokenize_texts",
    ),
    "evaluation": (
        "Accuracy",
        "answers_match",
        "exact_match_accuracy",
        "extract_answer",
    ),
    "hidden_pairs": (
        "DatagenSettings",
        "DatagenSummary",
        "HiddenPairsCollator",
        "HiddenPairsDataset",
        "TraceSettings",
        "export_legacy_hidden_pairs",
        "run_datagen",
    ),
    "hub": (
        "OnnxExport",
        "export_custom_generate",
        "export_onnx",
        "import_legacy",
        "model_card",
        "push_checkpoint",
        "push_custom_generate",
        "read_legacy_hidden_pairs",
    ),
    "rl": (
        "LatentGRPOTrainer",
        "LatentGRPOTrainingArguments",
        "correctness_reward",
    ),
    "training": (
        "CSVMetricsCallback",
        "CompressorTrainer",
        "CompressorTrainingArguments",
        "LatentAnswerTrainer",
        "LatentAnswerTrainingArguments",
        "MaskedDiffusionTrainer",
        "MaskedDiffusionTrainingArguments",
        "TRMTrainer",
        "TRMTrainingArguments",
        "TrainableReport",
        "reconstruction_metrics",
        "set_trainable",
    ),
}
_FOLDER_OF = {name: folder for folder, names in _LAZY.items() for name in names}
__all__ = [*_models, *_generation, *_FOLDER_OF, *_LAZY, "inspection"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    if name in _FOLDER_OF:
        return getattr(importlib.import_module(f".{_FOLDER_OF[name]}", __name__), name)
    if _IS_COMMAND_LINE and not name.startswith("_"):
        for folder in ("models", "generation"):
            module = importlib.import_module(f".{folder}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
