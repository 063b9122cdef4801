"""
The training objective of the hybrid: the masked-diffusion loss of its result, and what else trains the refiner; and at
which positions its LM head is evaluated where there is no loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..backbone_wrapper import EncodedTokens
from ..modeling_masked_diffusion import MaskedTargets, masked_diffusion_loss, score_tokens, select_positions
from ..refiners.modeling_refiner import ChunkLayout, RefinerOutput


class BestGuesses(NamedTuple):
    """The backbone's best guesses at some tokens, and those after refining; only a trace puts them together."""

    where: tuple[Any, ...]  # the index of those tokens in a tensor [B, L, ...]
    tokens: tuple[torch.Tensor, torch.Tensor]
    probability: tuple[torch.Tensor, torch.Tensor]  # float32, of those guesses

    def of_tokens(self, relevant: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Guesses and their probabilities `[B, 2, L]`; -1 and NaN where not `relevant` `[B, L]`."""
        tokens = torch.full((*relevant.shape, 2), -1, device=relevant.device)
        probability = torch.full(tokens.shape, torch.nan, device=relevant.device)
        tokens[self.where] = torch.stack(self.tokens, dim=-1)
        probability[self.where] = torch.stack(self.probability, dim=-1)
        hidden = ~relevant[..., None]
        return tokens.masked_fill(hidden, -1).mT, probability.masked_fill(hidden, torch.nan).mT


class Refinement(NamedTuple):
    """One refinement: what it was given, and what it did."""

    layout: ChunkLayout
    relevant: torch.Tensor  # BoolTensor [B, L], the tokens to be decided
    chunk_confidence: torch.Tensor  # [B, N], the backbone's
    active: torch.Tensor  # BoolTensor [B, N], the chunks refined
    refined: RefinerOutput
    guesses: BestGuesses | None = None  # where a trace may ask for them
    chunk_accuracy: torch.Tensor | None = None  # [B, N], with labels


class RefinementObjective:
    """Mixin for a model that refines: the loss of a batch with labels."""

    config: Any
    _refine: Callable[..., Refinement]
    _logits: Callable[[torch.Tensor], torch.Tensor]
    backbone: PreTrainedModel

    @property
    def _backbone_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def _refine_loss(
        self,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        relevant: torch.Tensor,
        targets: MaskedTargets,
        encoded: EncodedTokens,
        arguments: dict[str, Any],
    ) -> tuple[Refinement, torch.Tensor, dict[str, torch.Tensor]]:
        """Refines `hidden_states` `[B, L, D]`: the weighted sum of the losses, and each of them. Keeps no logits."""
        config = self.config
        positions = relevant | targets.positions  # [B, L]; P of them
        tokens = torch.full_like(positions, -100, dtype=torch.long).masked_scatter(targets.positions, targets.tokens)
        backbone_trains = self._backbone_trains
        with torch.set_grad_enabled(backbone_trains and torch.is_grad_enabled()):
            base = score_tokens(hidden_states[positions], self._logits, tokens[positions])
        probability = base.probability.new_zeros(positions.shape).index_put((positions,), base.probability)
        supervised = config.deep_supervision_weight > 0 or config.change_loss_weight > 0
        arguments = {**arguments, "output_step_hidden_states": supervised}
        result = self._refine(hidden_states, layout, relevant, probability, arguments)

        in_active = layout.to_tokens(result.active)  # [B, L]
        again = in_active & positions
        anew = score_tokens(result.refined.hidden_states[again], self._logits, tokens[again])
        losses = base.losses.index_put((again[positions],), anew.losses)
        best = base.best.index_put((again[positions],), anew.best)
        probabilities = (base.probability, base.probability.index_put((again[positions],), anew.probability))
        guesses = BestGuesses((positions,), (base.best, best), probabilities)
        counted = targets.positions[positions]  # [P], which of the positions are in the loss

        components = {"diffusion": masked_diffusion_loss(losses[counted], targets)}
        components["backbone"] = masked_diffusion_loss(base.losses[counted], targets)
        if backbone_trains and encoded.router_aux_loss is not None:
            components["router_aux"] = encoded.router_aux_loss
        if result.refined.step_hidden_states:
            steps = result.refined.step_hidden_states
            if config.deep_supervision_weight:
                components["deep_supervision"] = self._deep_supervision(steps, targets, in_active)
            if config.change_loss_weight:
                components["change"] = self._deep_supervision(steps, targets, in_active, without=hidden_states)
        if result.refined.orthogonality_loss is not None:
            components["orthogonality"] = result.refined.orthogonality_loss
        correct = torch.zeros_like(positions).index_put((targets.positions,), best[counted] == targets.tokens)
        share = layout.mean_per_chunk(correct, targets.positions, empty=1.0)
        components["confidence"] = confidence_loss(result.refined.confidence[result.active], share[result.active])
        result = result._replace(chunk_accuracy=share, guesses=guesses)
        return result, *weighted_loss(components, config, backbone_trains)

    def _deep_supervision(
        self,
        steps: Sequence[torch.Tensor],
        targets: MaskedTargets,
        in_active: torch.Tensor,
        without: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The loss of the states `[B, L, D]` of every recursion step, at the targets in chunks that were refined; of what
        they have more than the states `without`, if given.
        """
        there, among = targets.positions & in_active, in_active[targets.positions]  # [B, L], [M]
        supervised = MaskedTargets(there, targets.tokens[among], targets.weights[among])
        losses = []
        for states in steps:
            read = states[there] if without is None else states[there] - without[there]
            scores = score_tokens(read, self._logits, supervised.tokens)
            losses.append(masked_diffusion_loss(scores.losses, supervised))
        return deep_supervision_loss(losses, self.config.deep_supervision_schedule)


def weighted_loss(
    components: dict[str, torch.Tensor], config: Any, backbone_trains: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The sum of the losses by name, each times its weight, and the losses detached. That of the backbone's own guess
    counts if the backbone trains.
    """
    weights = {
        "diffusion": 1.0,
        "backbone": 1.0,
        "router_aux": getattr(config.backbone_config, "router_aux_loss_coef", 0.0),
        "deep_supervision": config.deep_supervision_weight,
        "change": config.change_loss_weight,
        "orthogonality": config.orthogonality_weight,
        "confidence": config.confidence_loss_weight,  # even if 0: DDP wants a gradient for every parameter
    }
    counted = {name: loss for name, loss in components.items() if backbone_trains or name != "backbone"}
    weighted = [weights[name] * loss for name, loss in counted.items()]
    return sum(weighted[1:], start=weighted[0]), {name: loss.detach() for name, loss in components.items()}


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


# --- Where logits are evaluated ---


def best_probability(logits: torch.Tensor) -> torch.Tensor:
    """The probability `[...]` of the best guess of `logits` `[..., V]`, in float32 and without gradient."""
    scores = logits.detach().float()
    return (scores.amax(-1) - scores.logsumexp(-1)).exp()


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
