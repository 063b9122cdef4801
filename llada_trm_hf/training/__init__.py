"""Trainers, freezing and metrics."""

from .arguments import (
    CompressorTrainingArguments,
    LatentAnswerTrainingArguments,
    MaskedDiffusionTrainingArguments,
    TRMTrainingArguments,
)
from .compressor_trainer import CompressorTrainer
from .csv_metrics import CSVMetricsCallback
from .freezing import TrainableReport, set_trainable
from .latent_answer_trainer import LatentAnswerTrainer
from .trainer import MaskedDiffusionTrainer
from .trm_trainer import TRMTrainer

__all__ = [
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
    "set_trainable",
]
