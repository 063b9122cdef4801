# ruff: noqa: E402
"""
Latent recursion for language models, Hugging Face-native.

Importing this registers every model with the Auto classes. Trainers, data, evaluation and the rest are imported when
their names are first used.
"""

import importlib
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

# transformers imports torchao where it is installed, which then logs what it has no use for on this machine.
_NOISY = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
_LEVELS = [logger.level for logger in _NOISY]
for _logger in _NOISY:
    _logger.setLevel(logging.ERROR)

# ruff: isort: off
from .models import *  # noqa: F403 (before generation, which imports one of its files)
from .models import __all__ as _models
from .generation import *  # noqa: F403
from .generation import __all__ as _generation
from . import inspection  # draws traces, and reports in debug mode
from .models.hub_model import HUB_HOOKS
# ruff: isort: on

for _logger, _level in zip(_NOISY, _LEVELS):
    _logger.setLevel(_level)

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
        "ExecutionLimits",
        "answers_match",
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
# Saving and pushing a model import `hub`.
_HUB_HOOKS = {"save_card": "readme_file", "push_model": "push", "push_folder": "push"}
_FOLDER_OF = {name: folder for folder, names in _LAZY.items() for name in names}
__all__ = [*_models, *_generation, *_FOLDER_OF, *_LAZY, "inspection"]


def _hub_hook(module: str, name: str) -> Callable[..., Any]:
    def hook(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f".hub.{module}", __name__), name)(*args, **kwargs)

    return hook


HUB_HOOKS.update({name: _hub_hook(module, name) for name, module in _HUB_HOOKS.items()})


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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
