"""
Which chunks of a hybrid to refine, and when to stop: what accuracy costs, over the settings that decide it, measured
on a few masked samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..data import MaskedDiffusionCollator
from ..models import ChunkLayout, LLaDATRMForMaskedDiffusion, TRMRefiner
from ..models.llada_trm.loss_llada_trm import best_probability
from ..models.refiners.modeling_refiner import refine

MIN_CONFIDENCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
CONVERGENCE_THRESHOLDS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class CalibrationPoint:
    """
    Attributes:
        setting: a `min_confidence` or a `convergence_threshold`.
        accuracy: share of the masked tokens whose best guess is right.
        cost: share of the chunks refined, or mean recursion steps of a chunk that is refined.
    """

    setting: float
    accuracy: float
    cost: float


@dataclass(frozen=True)
class RefinerCalibration:
    """
    The settings chosen, the cheapest whose accuracy is within the tolerance of the best, and all that were compared.
    The threshold is None for another refiner than a `TRMRefiner`.
    """

    min_confidence: float
    convergence_threshold: float | None
    by_min_confidence: list[CalibrationPoint]
    by_convergence_threshold: list[CalibrationPoint]

    def table(self) -> str:
        """For a terminal."""
        lines = [f"{'min_confidence':>22}{'chunks refined':>17}{'tokens right':>15}"]
        for point in self.by_min_confidence:
            chosen = " <" if point.setting == self.min_confidence else ""
            lines.append(f"{point.setting:>22g}{100 * point.cost:>16.1f}%{100 * point.accuracy:>14.2f}%{chosen}")
        if self.by_convergence_threshold:
            lines += ["", f"{'convergence_threshold':>22}{'recursion steps':>17}{'tokens right':>15}"]
        for point in self.by_convergence_threshold:
            chosen = " <" if point.setting == self.convergence_threshold else ""
            lines.append(f"{point.setting:>22g}{point.cost:>17.2f}{100 * point.accuracy:>14.2f}%{chosen}")
        return "\n".join(lines)


@torch.no_grad()
def calibrate_refiner(
    model: LLaDATRMForMaskedDiffusion,
    samples: Any,
    pad_token_id: int,
    batch_size: int = 32,
    tolerance: float = 0.005,
    seed: int = 0,
) -> RefinerCalibration:
    """
    Masks the responses of `samples` as in training (a share drawn uniformly for each), refines every chunk with all
    of its steps, and reads off what each setting would have given. `min_confidence` is chosen with all steps, the
    threshold over all chunks.

    Args:
        samples: of `tokenize_reasoning`, not seen in training.
        pad_token_id: of the tokenizer.
        tolerance: share of the masked tokens that may be lost against the best setting.

    Raises:
        ValueError: for a negative tolerance, or samples in which nothing is masked.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}.")
    collator = MaskedDiffusionCollator(model.config.mask_token_id, pad_token_id, seed=seed, fixed=True)
    batches = []
    model.eval()
    for start in tqdm(range(0, len(samples), batch_size), desc="Calibrating", unit="batch"):
        rows = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        batch = {name: tensor.to(model.device) for name, tensor in collator(rows).items()}
        batches.append(_chunks_of(model, batch))
    chunks = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    tokens = chunks["tokens"].sum()
    if not tokens:
        raise ValueError(f"Nothing is masked in these {len(samples)} samples: take more of them.")

    def share(right: torch.Tensor) -> float:
        return (right.sum() / tokens).item()

    by_confidence = []
    for setting in MIN_CONFIDENCES:
        refined = chunks["confidence"] < setting
        right = torch.where(refined, chunks["refined"][:, -1], chunks["bare"])
        by_confidence.append(CalibrationPoint(setting, share(right), refined.float().mean().item()))
    by_threshold = []
    if "residual" in chunks:
        for setting in CONVERGENCE_THRESHOLDS:
            stops = chunks["residual"] < setting  # [M, K]
            stops[:, -1] = True
            taken = stops.int().argmax(-1)  # the first
            right = chunks["refined"].gather(1, taken[:, None])
            by_threshold.append(CalibrationPoint(setting, share(right), (taken + 1).float().mean().item()))
    return RefinerCalibration(
        _cheapest(by_confidence, tolerance),
        _cheapest(by_threshold, tolerance) if by_threshold else None,
        by_confidence,
        by_threshold,
    )


def _cheapest(points: Sequence[CalibrationPoint], tolerance: float) -> float:
    best = max(point.accuracy for point in points)
    return min((p for p in points if p.accuracy >= best - tolerance), key=lambda point: point.cost).setting


def _chunks_of(model: LLaDATRMForMaskedDiffusion, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Of each chunk with masked tokens, of `M`: their number, how many the backbone gets right (`bare`) and the refiner
    after each step (`refined` `[M, K]`), the backbone's mean confidence, and the residual of each step `[M, K]`.
    """
    mask = batch.get("attention_mask")
    masked = (batch["input_ids"] == model.config.mask_token_id) & (batch["labels"] != -100)  # [B, L]
    nothing = torch.zeros(0, dtype=torch.long, device=masked.device)
    outputs = model(
        batch["input_ids"],
        attention_mask=mask,
        enable_refinement=False,
        output_hidden_states=True,
        logits_to_keep=nothing,
        return_dict=True,
    )
    hidden_states = outputs.hidden_states[-1].to(masked.device)  # [B, L, D]
    batch_size, length = masked.shape
    layout = ChunkLayout(batch_size, length, model.config.chunk_size, mask, masked.device)
    active = layout.any_per_chunk(masked)  # [B, N]
    number = torch.zeros_like(active, dtype=torch.float).scatter_add(
        1, layout.chunk_of_token.clamp(min=0), masked.float()
    )[active]
    head, labels = model.backbone.get_output_embeddings(), batch["labels"][masked]

    def per_chunk(of_masked: torch.Tensor, empty: float = 0.0) -> torch.Tensor:
        """The mean over the masked tokens of each chunk, `[M]`."""
        values = torch.zeros(masked.shape, device=masked.device).masked_scatter(masked, of_masked.float())
        return layout.mean_per_chunk(values, masked, empty)[active]

    def right(logits: torch.Tensor) -> torch.Tensor:
        """How many masked tokens of each chunk have the label as their best guess, `[M]`."""
        return per_chunk(logits.argmax(-1).to(labels.device) == labels) * number

    bare = head(hidden_states[masked])
    refiner, config = model.refiner, model.refiner.config
    can_stop = isinstance(refiner, TRMRefiner)
    asked: dict[str, Any] = {"active_chunks": active, "attention_mask": mask}
    if not can_stop:
        states = [refine(refiner, hidden_states, layout, **asked).hidden_states]
        residual = None
    else:
        own, config.convergence_threshold = config.convergence_threshold, 0.0
        try:
            asked |= {"output_step_hidden_states": True, "output_statistics": True}
            refined = refine(refiner, hidden_states, layout, **asked)
        finally:
            config.convergence_threshold = own
        states, residual = list(refined.step_hidden_states or ()), refined.statistics["residual"]
    result = {
        "tokens": number,
        "bare": right(bare),
        "refined": torch.stack([right(head(each.to(masked.device)[masked])) for each in states], dim=-1),
        "confidence": per_chunk(best_probability(bare).to(masked.device), empty=1.0),
    }
    if residual is not None:
        result["residual"] = residual.to(masked.device)[active]
    return result
