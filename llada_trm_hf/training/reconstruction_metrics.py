"""How close vectors are to what they should be, beside what a constant would reach."""

import torch


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


def _measures(prefix: str, rows: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    error = rows - expected  # [N, D]
    values = {
        "mse": error.square().mean(),
        "relative_error": error.norm() / expected.norm(),
        "cosine_similarity": torch.nn.functional.cosine_similarity(rows, expected, dim=-1).mean(),
        "variance_ratio": (rows.var(0) / (expected.var(0) + 1e-8)).mean(),
    }
    return {prefix + name: value.item() for name, value in values.items()}
