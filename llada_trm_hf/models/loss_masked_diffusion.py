"""The masked-diffusion training objective (LLaDA, arXiv 2502.09992, equations 3 and 5)."""

from typing import NamedTuple

import torch


class MaskedTargets(NamedTuple):
    """
    What the masked-diffusion loss needs of a batch, at its `M` masked and labelled tokens in row-major order.

    Attributes:
        positions: BoolTensor `[B, L]`, where those tokens stand.
        tokens: LongTensor `[M]`, the clean tokens.
        weights: FloatTensor `[M]`, so that the loss is `sum(weights * cross_entropy)`.
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor


def masked_targets(
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    mask_token_id: int | None,
    p_mask: torch.Tensor | None = None,
) -> MaskedTargets:
    """
    Finds the tokens that count in the loss, and how much each counts.

    Args:
        input_ids: LongTensor `[B, L]`, the noisy sequence.
        labels: LongTensor `[B, L]`, the clean tokens; -100 for tokens that are never masked (prompt, padding).
        mask_token_id: the token that replaced masked ones.
        p_mask: FloatTensor `[B]` or `[B, L]`, the probability each labelled token was masked with. Without it, the
            share of a row's labelled tokens that is masked takes its place.

    The weight of a token is `1 / (p_mask * n * B)` with `n` the labelled tokens of its row. With every token labelled
    this is the pre-training objective, with the response labelled the supervised fine-tuning objective.
    """
    if input_ids is None:
        raise ValueError("labels need input_ids: the loss counts the positions that hold the mask token.")
    if mask_token_id is None:
        raise ValueError("labels need the mask token: set model.config.mask_token_id, the id the model trained with.")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}.")
    labelled = labels != -100
    positions = labelled & (input_ids == mask_token_id)
    num_labelled = labelled.sum(-1, keepdim=True)
    if p_mask is None:
        p_mask = positions.sum(-1, keepdim=True) / num_labelled.clamp(min=1)
    elif p_mask.ndim == 1:
        p_mask = p_mask[:, None]
    weights = 1.0 / (p_mask.float() * num_labelled * labels.shape[0])
    return MaskedTargets(positions, labels[positions], weights.expand_as(positions)[positions])


def masked_diffusion_loss(losses: torch.Tensor, targets: MaskedTargets) -> torch.Tensor:
    """The loss from the cross-entropies `[M]` at `targets.positions`; a scalar, 0 when nothing is masked."""
    return (losses * targets.weights).sum()
