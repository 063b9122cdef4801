"""Trainers, freezing, metrics and recipes."""

from .arguments import MaskedDiffusionTrainingArguments
from .csv_metrics import CSVMetricsCallback
from .freezing import TrainableReport, set_trainable
from .trainer import MaskedDiffusionTrainer

__all__ = [
    "CSVMetricsCallback",
    "MaskedDiffusionTrainer",
    "MaskedDiffusionTrainingArguments",
    "TrainableReport",
    "set_trainable",
]
