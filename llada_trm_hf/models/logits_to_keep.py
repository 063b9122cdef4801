"""Evaluating the LM head only where its logits are wanted."""

import torch


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The hidden states `[B, L, D]` the LM head is evaluated at.

    Args:
        logits_to_keep: an int `n` for the last `n` positions (0 for all); a LongTensor `[P]` or `[B, P]` of positions,
            giving `[B, P, D]`; a BoolTensor `[B, L]`, giving `[M, D]` for its `M` true positions in row-major order.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def kept_positions(logits_to_keep: int | torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """`logits_to_keep` (see `select_positions`) as a BoolTensor of the shape `[B, L]` of `like`."""
    kept = torch.zeros_like(like)
    if logits_to_keep is None:
        return kept
    if isinstance(logits_to_keep, int):
        kept[:, -logits_to_keep:] = True  # all of them for 0
    elif logits_to_keep.dtype == torch.bool:
        kept = logits_to_keep
    elif logits_to_keep.ndim == 1:
        kept[:, logits_to_keep] = True
    else:
        kept.scatter_(1, logits_to_keep, True)
    return kept


def unpack_logits(logits: torch.Tensor, positions: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Logits `[P, V]`, at `positions` (BoolTensor `[B, L]`, row-major), as `logits_to_keep` asks."""
    row_of_position = positions.flatten().cumsum(0).sub(1).view(positions.shape)
    return logits[select_positions(row_of_position[..., None], logits_to_keep).squeeze(-1)]
