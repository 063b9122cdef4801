"""What goes into training: reasoning datasets, generated arithmetic, a byte tokenizer, masking, and hidden pairs."""

from .arithmetic import difference_chains
from .datagen import run_datagen
from .datagen_settings import DatagenSettings
from .hidden_pairs import HiddenPairsCollator, HiddenPairsDataset, export_legacy_hidden_pairs
from .masking import MaskedDiffusionCollator
from .reasoning import load_reasoning_dataset, tokenize_reasoning
from .shard_folder import DatagenSummary
from .thoughts import ThoughtFormat
from .tokenizer import byte_tokenizer, prompt_tokens
from .trace_generation import TraceSettings

__all__ = [
    "DatagenSettings",
    "DatagenSummary",
    "HiddenPairsCollator",
    "HiddenPairsDataset",
    "MaskedDiffusionCollator",
    "ThoughtFormat",
    "TraceSettings",
    "byte_tokenizer",
    "difference_chains",
    "export_legacy_hidden_pairs",
    "load_reasoning_dataset",
    "prompt_tokens",
    "run_datagen",
    "tokenize_reasoning",
]
