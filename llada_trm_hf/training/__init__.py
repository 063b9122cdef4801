"""Trainers, freezing and metrics."""

from .arguments import (
    CompressorTrainingArguments,
    LatentAnswerTrainingArguments,
    MaskedDiffusionTrainingArguments,
    TRMTrainingArguments,
)
from .callbacks import CSVMetricsCallback
from .compressor_trainer import CompressorTrainer
from .freezing import TrainableReport, set_trainable
from .latent_answer_trainer import LatentAnswerTrainer
from .masked_diffusion_trainer import MaskedDiffusionTrainer
from .reconstruction_metrics import reconstruction_metrics
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
    "reconstruction_metrics",
    "set_trainable",
]
