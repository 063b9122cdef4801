"""Hidden pairs: the states of a language model before and after it thinks, made and read."""

from .datagen import run_datagen
from .dataset import HiddenPairsCollator, HiddenPairsDataset, export_legacy_hidden_pairs
from .settings import DatagenSettings
from .shard_folder import DatagenSummary
from .traces import TraceSettings

__all__ = [
    "DatagenSettings",
    "DatagenSummary",
    "HiddenPairsCollator",
    "HiddenPairsDataset",
    "TraceSettings",
    "export_legacy_hidden_pairs",
    "run_datagen",
]
