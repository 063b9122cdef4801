"""Several refiners as one: in a cascade, or mixed by a learned gate."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_refiner_integration import RefinerCascadeConfig, RefinerIntegrationConfig, RefinerMixConfig
from .modeling_refinement_head import RecursiveRefinementHead
from .modeling_refiner import PreTrainedRefiner
from .modeling_slot_refiner import SlotTRMRefiner
from .refiner_output import RefinerOutput
from .refiner_registry import REFINERS, HoldsRefiners, build_refiner


class RefinerIntegration(HoldsRefiners, PreTrainedRefiner):
    """
    Refiners that work as one.

    Statistics are those of all; a name that one before has used gets the refiner's number: `delta_norm`,
    `delta_norm_2`. The orthogonality loss is the mean of theirs.

    Args:
        config: names the refiners.
        refiners: models to use instead of new ones.
    """

    config: RefinerIntegrationConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: RefinerIntegrationConfig, refiners: list[PreTrainedModel] | None = None):
        super().__init__(config)
        if refiners is None:
            for member in config.refiner_configs:
                member._attn_implementation = config._attn_implementation
            refiners = [build_refiner(member) for member in config.refiner_configs]
        self.refiners = nn.ModuleList(refiners)

    def forward(
        self,
        hidden_states: torch.Tensor,
        active_chunks: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        max_steps: int | None = None,
        output_step_hidden_states: bool = False,
        output_statistics: bool = False,
    ) -> RefinerOutput:
        """Arguments as for each of the refiners; `max_steps` is for each of them too, by default its own."""
        arguments = {
            "active_chunks": active_chunks,
            "attention_mask": attention_mask,
            "max_steps": max_steps,
            "output_step_hidden_states": output_step_hidden_states,
            "output_statistics": output_statistics,
        }
        return self._integrate(hidden_states, arguments)

    def _integrate(self, hidden_states: torch.Tensor, arguments: dict[str, Any]) -> RefinerOutput:
        """For the subclasses to say."""
        raise NotImplementedError


class RefinerCascade(RefinerIntegration):
    """
    One refiner after the other, each of which reads what the one before wrote.

    Steps, states after each step and `similarity` `[B, N, K_1 + K_2 + ...]` are those of all in their order; the
    confidence is the mean of theirs.
    """

    config: RefinerCascadeConfig
    config_class = RefinerCascadeConfig

    def __init__(self, config: RefinerCascadeConfig, refiners: list[PreTrainedModel] | None = None):
        super().__init__(config, refiners)
        self.post_init()

    def _integrate(self, hidden_states: torch.Tensor, arguments: dict[str, Any]) -> RefinerOutput:
        outputs: list[RefinerOutput] = []
        for refiner in self.refiners:
            outputs.append(refiner(hidden_states, **arguments))
            hidden_states = outputs[-1].hidden_states
        steps = None
        if arguments["output_step_hidden_states"]:
            steps = tuple(states for output in outputs for states in _steps(output))
        statistics = _statistics(outputs)
        curves = _similarities(outputs)
        if curves:
            statistics["similarity"] = torch.cat(curves, dim=-1)
        return RefinerOutput(
            hidden_states=hidden_states,
            confidence=torch.stack([output.confidence for output in outputs]).mean(0),
            num_steps=torch.stack([output.num_steps for output in outputs]).sum(0),
            step_hidden_states=steps,
            statistics=statistics,
            orthogonality_loss=_orthogonality(outputs),
        )


class RefinerMix(RefinerIntegration):
    """
    Refiners side by side on the same hidden states. A gate reads a token's state and says in which shares
    `[B, L, refiners]` their changes are added to it; untrained, in equal ones.

    A chunk's confidence is the mean of theirs, by its tokens' mean shares. Its steps are those of the refiner that
    took most, and the states after step `k` are mixed from what each had after `k` steps, or at its end. Of the
    statistics, `similarity` is the mean of those that ran that step, and `mix_share_{number}` the mean share of each
    in the tokens refined.
    """

    config: RefinerMixConfig
    config_class = RefinerMixConfig

    def __init__(self, config: RefinerMixConfig, refiners: list[PreTrainedModel] | None = None):
        super().__init__(config, refiners)
        self.gate = nn.Linear(config.hidden_size, len(self.refiners))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.gate:
            init.zeros_(module.weight)

    def _integrate(self, hidden_states: torch.Tensor, arguments: dict[str, Any]) -> RefinerOutput:
        layout, active = self.chunks_to_refine(hidden_states, arguments["active_chunks"], arguments["attention_mask"])
        outputs = [refiner(hidden_states, **arguments) for refiner in self.refiners]
        logits = self.gate(hidden_states.to(self.gate.weight.dtype))
        shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).unbind(-1)  # [B, L] each
        refined = layout.to_tokens(active)  # [B, L]

        def mixed(states: list[torch.Tensor]) -> torch.Tensor:
            change = sum(share[..., None] * (each - hidden_states) for share, each in zip(shares, states))
            return torch.where(refined[..., None], (hidden_states + change).to(hidden_states.dtype), hidden_states)

        steps = None
        if arguments["output_step_hidden_states"]:
            # What each has after `k` steps, or at its end if that was before.
            most = max(len(_steps(output)) for output in outputs)
            after = [[*_steps(o), *[o.hidden_states] * (most - len(_steps(o)))] for o in outputs]
            steps = tuple(mixed(list(states)) for states in zip(*after))
        weights = [layout.mean_per_chunk(share, layout.is_real, empty=0.0) for share in shares]  # [B, N] each
        confidence = sum(weight * output.confidence for weight, output in zip(weights, outputs))
        statistics = _statistics(outputs)
        if arguments["output_statistics"]:
            for number, share in enumerate(shares, start=1):
                statistics[f"mix_share_{number}"] = (share.detach() * refined).sum() / refined.sum()
        curves = _similarities(outputs)
        if curves:
            longest = max(curve.shape[-1] for curve in curves)
            padded = [nn.functional.pad(curve, (0, longest - curve.shape[-1]), value=torch.nan) for curve in curves]
            statistics["similarity"] = torch.stack(padded).nanmean(0)
        return RefinerOutput(
            hidden_states=mixed([output.hidden_states for output in outputs]),
            confidence=torch.where(active, confidence, 1.0),
            num_steps=torch.stack([output.num_steps for output in outputs]).amax(0),
            step_hidden_states=steps,
            statistics=statistics,
            orthogonality_loss=_orthogonality(outputs),
        )


def _steps(output: RefinerOutput) -> tuple[torch.Tensor, ...]:
    assert output.step_hidden_states is not None
    return output.step_hidden_states


def _statistics(outputs: list[RefinerOutput]) -> dict[str, torch.Tensor]:
    """All but the similarity, each under a name of its own."""
    statistics: dict[str, torch.Tensor] = {}
    for number, output in enumerate(outputs, start=1):
        for name, value in (output.statistics or {}).items():
            if name != "similarity":
                statistics[f"{name}_{number}" if name in statistics else name] = value
    return statistics


def _similarities(outputs: list[RefinerOutput]) -> list[torch.Tensor]:
    return [output.statistics["similarity"] for output in outputs if "similarity" in (output.statistics or {})]


def _orthogonality(outputs: list[RefinerOutput]) -> torch.Tensor | None:
    losses = [output.orthogonality_loss for output in outputs if output.orthogonality_loss is not None]
    return torch.stack(losses).mean() if losses else None


for _model in (RecursiveRefinementHead, SlotTRMRefiner, RefinerCascade, RefinerMix):
    REFINERS[_model.config_class.model_type] = _model
