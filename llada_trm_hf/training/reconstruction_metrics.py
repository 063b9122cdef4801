"""How close hidden states are to what they should be, and what an LM head makes of the difference."""

import torch
from torch import nn


def reconstruction_metrics(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> dict[str, float]:
    """
    Measures on held-out data. Hidden states of language models have a few channels with large means, so a constant
    may reach a cosine of 0.93: every measure stands beside that of the best constant, the channel means of `target`
    (`constant_*`), and is also taken after each channel is shifted and scaled to mean 0 and variance 1 in `target`
    (`standardised_*`, `constant_standardised_*`).

    Args:
        prediction, target: `[..., D]`.
        mask: `[...]`, 0 for rows that do not count; at least two must.

    Returns:
        `mse`; `relative_error`, the norm of the whole error over that of the target; `cosine_similarity`, mean over
        rows; `variance_ratio`, mean over channels of the prediction's variance over the target's; the same with the
        prefixes above; and `r2 = 1 - mse / constant_mse`, the share of the target's variance that is explained.
    """
    if prediction.shape != target.shape or (mask is not None and mask.shape != target.shape[:-1]):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (prediction, target, mask)]
        raise ValueError(f"prediction, target and mask do not fit together: shapes {shapes}.")
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    kept = torch.ones(target.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    rows, expected = prediction.detach()[kept].to(dtype), target.detach()[kept].to(dtype)  # [N, D]
    if len(expected) < 2:
        raise ValueError(f"A variance needs at least two rows, got {len(expected)}.")
    mean, scale = expected.mean(0), expected.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    standard = (expected - mean) / scale
    metrics = {
        **_measures("", rows, expected),
        **_measures("standardised_", (rows - mean) / scale, standard),
        **_measures("constant_", mean.expand_as(expected), expected),
        **_measures("constant_standardised_", torch.zeros_like(standard), standard),
    }
    metrics["r2"] = 1 - metrics["mse"] / metrics["constant_mse"] if metrics["constant_mse"] else float("nan")
    return metrics


def head_width(head: nn.Linear) -> int:
    """The size of the hidden states that an LM head reads."""
    return head.weight.shape[1]


def top_tokens(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """The most likely token after each of the hidden states `[N, D]`: LongTensor `[N]`."""
    return _logits(head, states).argmax(-1)


def compare_next_tokens(
    head: nn.Linear, before: torch.Tensor, after: torch.Tensor, chunk_size: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How an LM head's predictions change with the hidden states.

    Args:
        before, after: `[N, D]`.
        chunk_size: states at a time, since a row of logits is as long as the vocabulary.

    Returns:
        Whether the top token is the same, and KL(before || after) in nats, both float32 `[N]`, from the head's raw
        logits (before a cap, if the model has one).
    """
    same, divergence = [], []
    for old, new in zip(before.split(chunk_size), after.split(chunk_size)):
        old_log, new_log = (_logits(head, states).log_softmax(-1) for states in (old, new))
        same.append((old_log.argmax(-1) == new_log.argmax(-1)).float())
        divergence.append((old_log.exp() * (old_log - new_log)).sum(-1))
    return torch.cat(same), torch.cat(divergence)


def _measures(prefix: str, rows: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    error = rows - expected  # [N, D]
    values = {
        "mse": error.square().mean(),
        "relative_error": error.norm() / expected.norm(),
        "cosine_similarity": torch.nn.functional.cosine_similarity(rows, expected, dim=-1).mean(),
        "variance_ratio": (rows.var(0) / (expected.var(0) + 1e-8)).mean(),
    }
    return {prefix + name: value.item() for name, value in values.items()}


def _logits(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return head(states.to(head.weight.device, head.weight.dtype)).float().to(states.device)  # [N, V]
