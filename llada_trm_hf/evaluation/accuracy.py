"""Exact-match accuracy of generated responses, with a confidence interval."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% interval of Wilson (1927) for a share of `total`, which holds near 0 and 1 too."""
    from scipy.stats import binomtest  # here, since it takes a second, which `generate` need not wait for

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass
class Accuracy:
    """`correct` of `total` problems, its 95% interval, and the forward passes per batch."""

    correct: int
    total: int
    forward_passes: float = math.nan

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def exact_match_accuracy(
    model: PreTrainedModel, samples: Dataset, batch_size: int = 250, **generation_settings: Any
) -> Accuracy:
    """
    How many responses `model` generates token for token, reasoning included.

    Args:
        model: generates as many tokens as a sample's response has.
        samples: of `tokenize_reasoning`. Prompts and responses must be of the same length in all samples, so that
            neither padding nor the end of a response has to be guessed.
        batch_size: problems at a time.
        generation_settings: of `generate`.

    Raises:
        ValueError: for samples of different lengths.
    """
    tokens = [sample["input_ids"] for sample in samples]
    lengths = {(sample["prompt_length"], len(sample["input_ids"])) for sample in samples}
    if len(lengths) != 1:
        raise ValueError(f"Exact match needs samples of one length, got {len(lengths)} different ones.")
    ((prompt_length, length),) = lengths
    correct, passes = 0, []
    for start in range(0, len(tokens), batch_size):
        expected = torch.tensor(tokens[start : start + batch_size], device=model.device)
        output = model.generate(
            expected[:, :prompt_length],
            max_new_tokens=length - prompt_length,
            return_dict_in_generate=True,
            **generation_settings,
        )
        correct += int((output.sequences == expected).all(-1).sum())
        passes.append(output.num_forward_passes)
    return Accuracy(correct, len(tokens), sum(passes) / len(passes))
