"""The forward process of masked diffusion as a data collator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def stateless_uniform(seed: int, epoch: int, index: np.ndarray, size: int) -> np.ndarray:
    """
    Uniform random numbers in [0, 1) that depend only on `(seed, epoch, index, column)`, by the splitmix64 hash: masks
    are the same however samples are batched, sharded over processes, or resumed. `index` `[B]` holds the number of
    each sample in its dataset; the result is float64 `[B, size]`.
    """

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = mix(np.array([seed], dtype=np.uint64) + gamma)
        state = mix((state ^ np.uint64(epoch)) + gamma)
        state = mix((state ^ index.astype(np.uint64)) + gamma)[:, None]
        bits = mix(state + gamma * np.arange(1, size + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


@dataclass(eq=False)
class MaskedDiffusionCollator:
    """
    Pads samples and masks their response tokens (LLaDA, arXiv 2502.09992, algorithms 1 and 2): per row
    `t ~ U(0, 1)`, each response token masked with probability `p_mask = (1 - eps) t + eps`, prompt tokens never.

    Args:
        pad_token_id: the end-of-sequence token where padding is learned.
        mask_epsilon: `eps`, the smallest masking probability.
        learn_padding: pad responses with `pad_token_id` and learn that padding like any token, as LLaDA does in
            supervised fine-tuning (this is how it learns to end). Otherwise padding is hidden by the attention mask.
        random_length_probability: share of rows cut to a random length (0.01 in LLaDA's pre-training).
        fixed: the same masks in every epoch, for evaluation.

    A sample has `input_ids`, `prompt_length` (0 without a prompt) and `index`, its number in the dataset. A batch has
    `input_ids` (noisy), `labels` (clean, -100 for prompt and hidden padding), `p_mask` `[B]`, and `attention_mask`
    where padding is hidden.
    """

    mask_token_id: int
    pad_token_id: int
    mask_epsilon: float = 1e-3
    learn_padding: bool = True
    random_length_probability: float = 0.0
    seed: int = 0
    fixed: bool = False

    def __post_init__(self):
        if not 0 < self.mask_epsilon <= 1:
            raise ValueError(f"mask_epsilon must be above 0 and at most 1, got {self.mask_epsilon}.")
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by data loader workers

    def set_epoch(self, epoch: int) -> None:
        """Draws the masks of this epoch from now on."""
        if not self.fixed:
            self._epoch.fill_(epoch)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = np.array([len(sample["input_ids"]) for sample in samples])
        prompt_lengths = np.array([sample["prompt_length"] for sample in samples])
        index = np.array([sample["index"] for sample in samples])
        size = int(lengths.max())
        uniform = stateless_uniform(self.seed, int(self._epoch), index, size + 3)
        cut = uniform[:, 0] < self.random_length_probability
        lengths = np.where(cut, 1 + (uniform[:, 1] * lengths).astype(int), lengths)

        columns = np.arange(size)
        tokens = np.full((len(samples), size), self.pad_token_id)
        is_real = columns < lengths[:, None]
        tokens[is_real] = np.concatenate([sample["input_ids"][:n] for sample, n in zip(samples, lengths)])
        hidden = ~is_real & (cut[:, None] | (not self.learn_padding))
        is_response = (columns >= prompt_lengths[:, None]) & ~hidden

        p_mask = (1 - self.mask_epsilon) * uniform[:, 2] + self.mask_epsilon
        masked = is_response & (uniform[:, 3:] < p_mask[:, None])
        batch = {
            "input_ids": torch.from_numpy(np.where(masked, self.mask_token_id, tokens)),
            "labels": torch.from_numpy(np.where(is_response, tokens, -100)),
            "p_mask": torch.from_numpy(p_mask.astype(np.float32)),
        }
        if hidden.any():
            batch["attention_mask"] = torch.from_numpy((~hidden).astype(np.int64))
        return batch
