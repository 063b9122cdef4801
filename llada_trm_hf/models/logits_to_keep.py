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


def columns_of(wanted: torch.Tensor, kept: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The columns LongTensor `[B, P]` where `wanted` `[B, L]` is true: `logits_to_keep` itself, which keeps `kept`
    `[B, L]`, if it says that already, else ascending, `P` the number in the row with most; a row with fewer gets
    others as well.
    """
    if keeps_all(logits_to_keep):  # the device need not be asked how many
        return torch.arange(wanted.shape[1], device=wanted.device).expand_as(wanted)
    if (
        isinstance(logits_to_keep, torch.Tensor)
        and logits_to_keep.ndim == 2
        and logits_to_keep.dtype != torch.bool
        and torch.equal(kept, wanted)
    ):
        return logits_to_keep
    width = int(wanted.sum(-1).max())
    return wanted.int().argsort(dim=-1, descending=True, stable=True)[:, :width]


def unpack_logits(logits: torch.Tensor, wanted: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Logits `[B, P, V]`, at `columns_of(wanted)`, as `logits_to_keep` asks; `wanted` `[B, L]` has all it asks for."""
    if keeps_all(logits_to_keep):
        return logits
    slot = (wanted.cumsum(-1) - 1).clamp(min=0)  # [B, L], where among the P
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
        row, column = logits_to_keep.nonzero(as_tuple=True)
        return logits[row, slot[row, column]]
    slots = select_positions(slot[..., None], logits_to_keep).squeeze(-1)  # [B, P']
    return logits[torch.arange(len(logits), device=logits.device)[:, None], slots]


def keeps_all(logits_to_keep: int | torch.Tensor) -> bool:
    """Whether `logits_to_keep` (see `select_positions`) asks for every position, in their order."""
    return isinstance(logits_to_keep, int) and logits_to_keep == 0
