"""Losses that train a refiner besides the masked-diffusion loss of its result."""

import torch


def deep_supervision_loss(step_losses: list[torch.Tensor], schedule: str) -> torch.Tensor:
    """
    The weighted mean of the masked-diffusion losses after every recursion step.

    Args:
        step_losses: a scalar for each step.
        schedule: `"constant"`, `"linear"` (a step counts in proportion to its number) or `"exponential"` (twice the
            step before).
    """
    losses = torch.stack(step_losses)
    number = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    weights = {"constant": torch.ones_like(number), "linear": number, "exponential": 2.0**number}[schedule]
    return (losses * weights / weights.sum()).sum()


def confidence_loss(confidence: torch.Tensor, share_correct: torch.Tensor) -> torch.Tensor:
    """
    Binary cross-entropy of the refiner's confidence `[A]` against the share of the chunk `[A]` it now gets right; 0
    when nothing was refined. Its minimum is at confidence = share: a calibrated head.
    """
    confidence = confidence.float().clamp(1e-6, 1 - 1e-6)
    entropy = share_correct * confidence.log() + (1 - share_correct) * (1 - confidence).log()
    return -entropy.sum() / max(len(confidence), 1)
