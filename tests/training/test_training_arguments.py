"""Arguments built in Python are held to what the command line is held to."""

import math

import pytest

from llada_trm_hf.training import (
    CompressorTrainingArguments,
    LatentAnswerTrainingArguments,
    MaskedDiffusionTrainingArguments,
    TRMTrainingArguments,
)

CLASSES = [
    CompressorTrainingArguments,
    LatentAnswerTrainingArguments,
    MaskedDiffusionTrainingArguments,
    TRMTrainingArguments,
]


@pytest.mark.parametrize("arguments_class", CLASSES)
@pytest.mark.parametrize(
    "setting, message",
    [
        ({"weight_decay": math.nan}, "weight_decay must be a finite number, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number, got inf"),
        ({"learning_rate": -1e-4}, "learning_rate must be at least 0, got -0.0001"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"per_device_train_batch_size": -2}, "per_device_train_batch_size must be at least 1, got -2"),
        ({"adam_beta2": 1.5}, "adam_beta2 must be between 0 and 1, got 1.5"),
        ({"max_steps": -7}, r"max_steps must be at least 1 \(-1: num_train_epochs decides\), got -7"),
        ({"num_train_epochs": -1.0}, "num_train_epochs must be above 0, got -1.0"),
        ({"save_steps": 0}, r"save_steps must be above 0 \(save_strategy=no saves nothing\), got 0"),
        ({"seed": 2**40}, "seed must be between 0 and 4294967295"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_meant(tmp_path, arguments_class, setting, message):
    arguments_class(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=message):
        arguments_class(output_dir=str(tmp_path), use_cpu=True, **setting)
