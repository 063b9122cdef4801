"""
Latent recursion for language models, Hugging Face-native.

Importing this registers every model with the Auto classes. Trainers, data, evaluation and the rest are imported when
their names are first used.
"""

import importlib
import sys
from collections.abc import Callable
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
        "GeneratorOptions",
        "LatentAnswerCollator",
        "MaskedDiffusionCollator",
        "TextCollator",
        "ThoughtFormat",
        "byte_tokenizer",
        "difference_chains",
        "latent_thinking_prompt",
        "load_reasoning_dataset",
        "load_text_dataset",
        "mazes",
        "prefix_sums",
        "prompt_tokens",
        "sudoku_guesses",
        "sudoku_puzzles",
        "tokenize_latent_answers",
        "tokenize_reasoning",
        "tokenize_texts",
    ),
    "evaluation": (
        "Accuracy",
        "CalibrationPoint",
        "ExecutionLimits",
        "RefinerCalibration",
        "answers_match",
        "calibrate_refiner",
        "exact_match_accuracy",
        "extract_answer",
        "run_tests",
        "sandbox_protections",
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
# Saving, pushing and loading a model import `hub`.
_HUB_HOOKS = {
    "save_card": "readme_file",
    "push_model": "push",
    "push_folder": "push",
    "replacing_files": "files",
    "check_stored_weights": "loaded_weights",
    "backbone_fingerprint": "loaded_weights",
    "check_backbone": "loaded_weights",
}
_FOLDER_OF = {name: folder for folder, names in _LAZY.items() for name in names}
__all__ = [*_models, *_generation, *_FOLDER_OF, *_LAZY, "inspection"]


def _hub_hook(module: str, name: str) -> Callable[..., Any]:
    def hook(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f".hub.{module}", __name__), name)(*args, **kwargs)

    return hook


def _fill_hub_hooks() -> None:
    """Lets models write their cards and push themselves as the command line does; imports `hub` when they do."""
    from .models.hub_model import HUB_HOOKS

    HUB_HOOKS.update({name: _hub_hook(module, name) for name, module in _HUB_HOOKS.items()})


if not _IS_COMMAND_LINE:
    _fill_hub_hooks()


def _import_folder(folder: str) -> Any:
    try:
        return importlib.import_module(f".{folder}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__name__):
            raise
        raise ImportError(f"{__name__}.{folder} needs {error.name}: pip install 'llada-trm-hf[train]'.") from error


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return _import_folder(name)
    if name in _FOLDER_OF:
        return getattr(_import_folder(_FOLDER_OF[name]), name)
    if _IS_COMMAND_LINE and not name.startswith("_"):
        for folder in ("models", "generation"):
            module = importlib.import_module(f".{folder}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
