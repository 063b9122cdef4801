"""Several refiners as one, in a cascade or mixed by a learned gate; and what a user may pass as `refiner=`."""

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..hub_model import REFINERS, check_fields, nearest_name
from ..registered_models import register_held_refiners
from .modeling_refiner import ChunkLayout, PreTrainedRefiner, RefinerOutput, refine


class RefinerIntegrationConfig(PreTrainedConfig):
    r"""
    Configuration of several refiners that work as one.

    Args:
        refiner_configs (`list[PreTrainedConfig or dict]`): Two refiners or more, of the same width and chunk size.
            A config without any, as transformers makes one to compare with when it saves, is good for no model.

    Raises:
        ValueError: for a single refiner, or refiners that do not fit together.
    """

    integration: ClassVar[str]

    refiner_configs: list = None  # type: ignore[assignment]

    def __post_init__(self, **kwargs):
        check_fields(self)
        self.refiner_configs = [refiner_config_of(config) for config in self.refiner_configs or ()]
        if self.refiner_configs:
            self.check_number_of_refiners()
        for name in ("hidden_size", "chunk_size"):
            values = [getattr(config, name) for config in self.refiner_configs]
            if len(set(values)) > 1:
                raise ValueError(f"Refiners that work together need the same {name}, got {values}.")
        super().__post_init__(**kwargs)

    def check_number_of_refiners(self) -> None:
        """ValueError for fewer than two."""
        if len(self.refiner_configs) < 2:
            raise ValueError(
                f"integration={self.integration!r} takes at least two refiners, got {len(self.refiner_configs)}: pass "
                f"refiner_configs=[...]."
            )

    @property
    def hidden_size(self) -> int | None:
        return self.refiner_configs[0].hidden_size if self.refiner_configs else None

    @property
    def chunk_size(self) -> int | None:
        return self.refiner_configs[0].chunk_size if self.refiner_configs else None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "refiner_configs": [config.to_dict() for config in self.refiner_configs]}


class RefinerCascadeConfig(RefinerIntegrationConfig):
    r"""
    Configuration of [`RefinerCascade`]: one refiner after the other.

    Args:
        refiner_configs (`list[PreTrainedConfig or dict]`): In their order.
    """

    model_type = "refiner_cascade"
    integration = "cascade"


class RefinerMixConfig(RefinerIntegrationConfig):
    r"""
    Configuration of [`RefinerMix`]: refiners side by side, and a learned gate between them.

    Args:
        refiner_configs (`list[PreTrainedConfig or dict]`): The refiners.
    """

    model_type = "refiner_mix"
    integration = "mix"


class RefinerIntegration(PreTrainedRefiner):
    """
    Refiners that work as one.

    Statistics are those of all; a name that one before has used gets the refiner's number: `delta_norm`,
    `delta_norm_2`. The orthogonality loss is the mean of theirs.

    Args:
        config: names the refiners.
        refiners: models to use instead of new ones.

    Raises:
        ValueError: for fewer than two refiners.
    """

    config: RefinerIntegrationConfig
    _integrate: Callable[..., RefinerOutput]  # what the refiners make of the states together
    supports_gradient_checkpointing = True

    def __init__(self, config: RefinerIntegrationConfig, refiners: list[PreTrainedModel] | None = None):
        config.check_number_of_refiners()
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
        layout: ChunkLayout | None = None,
    ) -> RefinerOutput:
        """Arguments as for each of the refiners; `max_steps` is for each of them too, by default its own."""
        arguments = {
            "active_chunks": active_chunks,
            "attention_mask": attention_mask,
            "max_steps": max_steps,
            "output_step_hidden_states": output_step_hidden_states,
            "output_statistics": output_statistics,
        }
        return self._integrate(hidden_states, arguments, layout)


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

    def _integrate(
        self, hidden_states: torch.Tensor, arguments: dict[str, Any], layout: ChunkLayout | None
    ) -> RefinerOutput:
        outputs: list[RefinerOutput] = []
        for refiner in self.refiners:
            outputs.append(refine(refiner, hidden_states, layout, **arguments))
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
        self.gate = nn.Linear(config.refiner_configs[0].hidden_size, len(self.refiners))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.gate:
            init.zeros_(module.weight)

    def _integrate(
        self, hidden_states: torch.Tensor, arguments: dict[str, Any], layout: ChunkLayout | None
    ) -> RefinerOutput:
        masks = (arguments["active_chunks"], arguments["attention_mask"])
        layout, active = self.chunks_to_refine(hidden_states, *masks, layout)
        outputs = [refine(refiner, hidden_states, layout, **arguments) for refiner in self.refiners]
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


INTEGRATIONS: dict[str, type[RefinerIntegration]] = {
    model.config_class.integration: model for model in (RefinerCascade, RefinerMix)
}
REFINERS.update({model.config_class.model_type: model for model in INTEGRATIONS.values()})


# --- What a user may pass as `refiner=` ---


def combine_refiner_configs(configs: Any, integration: str | None) -> PreTrainedConfig:
    """
    One config for `configs`: that of a refiner (an object or a dict), or a list of those that work together by
    `integration`.

    Raises:
        ValueError: for an unknown integration, or one that takes another number of refiners.
    """
    if integration not in (None, "replace", *INTEGRATIONS):
        raise ValueError(f"integration must be one of replace, {', '.join(INTEGRATIONS)}, got {integration!r}.")
    configs = list(configs) if isinstance(configs, (list, tuple)) else [configs]
    if len(configs) > 1:
        if integration not in INTEGRATIONS:
            raise ValueError(
                f"{len(configs)} refiners, but integration={integration!r}: say how they work together, "
                f"{' or '.join(map(repr, INTEGRATIONS))}."
            )
        return INTEGRATIONS[integration].config_class(refiner_configs=configs)
    if not configs:
        raise ValueError("The list of refiners is empty.")
    config = refiner_config_of(configs[0])
    if integration not in (None, getattr(config, "integration", "replace")):
        raise ValueError(f"integration={integration!r}, but there is only one refiner, a {config.model_type}.")
    return config


def refiner_config_of(config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """
    The config object that `config` is or describes.

    Raises:
        ValueError: for a `model_type` that is no refiner's.
    """
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise TypeError(f"A refiner's config is a config or a dict with a model_type, got {config!r}.")
    model_type = config.get("model_type", "")
    refiners = register_held_refiners()
    if model_type not in refiners:
        raise ValueError(
            f"{model_type!r} is no model_type of a refiner. Known: {', '.join(refiners)}. Make your own known first, "
            f"with register_refiner."
        )
    return refiners[model_type].config_class.from_dict(config)


def resolve_refiners(
    refiners: Any, text_config: PreTrainedConfig, chunk_size: int | None
) -> tuple[list[PreTrainedModel | None], list[PreTrainedConfig]]:
    """
    The refiners that have weights already, None for those that have not, and the configs of all.

    Args:
        refiners: a refiner, its config, its `model_type`, or the folder or repository of one; or a list of them.
        text_config: of the backbone that a new refiner has to fit.
        chunk_size: of a new refiner.

    Raises:
        ValueError: for what is no refiner, or an empty list.
    """
    listed = list(refiners) if isinstance(refiners, (list, tuple)) else [refiners]
    if not listed:
        raise ValueError("The list of refiners is empty.")
    resolved = [_resolve_refiner(refiner, text_config, chunk_size) for refiner in listed]
    return [model for model, _ in resolved], [config for _, config in resolved]


def _resolve_refiner(
    refiner: Any, text_config: PreTrainedConfig, chunk_size: int | None
) -> tuple[PreTrainedModel | None, PreTrainedConfig]:
    if isinstance(refiner, PreTrainedModel):
        return refiner, refiner.config
    known = [
        name for name, model_class in register_held_refiners().items() if model_class not in INTEGRATIONS.values()
    ]
    if isinstance(refiner, PreTrainedConfig):
        if refiner.model_type not in REFINERS:
            raise ValueError(f"A {refiner.model_type!r} is no refiner. Known refiners: {', '.join(known)}.")
        return None, refiner
    if refiner in known:
        return None, REFINERS[str(refiner)].config_class(
            hidden_size=text_config.hidden_size, **({} if chunk_size is None else {"chunk_size": chunk_size})
        )
    if not os.path.isdir(refiner) and "/" not in str(refiner):
        raise ValueError(
            f"Unknown refiner {str(refiner)!r}{nearest_name(str(refiner), known)}. Known: {', '.join(known)}; or the "
            f"folder or repository of one."
        )
    model_type = PreTrainedConfig.get_config_dict(refiner)[0].get("model_type")
    if model_type not in REFINERS:
        raise ValueError(
            f"{refiner} holds a model of type {model_type!r}, which is no refiner. Known refiners: {', '.join(known)}."
        )
    model = REFINERS[model_type].from_pretrained(refiner)
    return model, model.config


def assemble_refiner(config: PreTrainedConfig, models: Sequence[PreTrainedModel | None]) -> PreTrainedModel:
    """The refiner of a hybrid with `config`, from the `models` there are already; None for those to be made."""
    if len(models) == 1:
        return models[0] or build_refiner(config)
    members = [model or build_refiner(own) for model, own in zip(models, config.refiner_configs)]
    return INTEGRATIONS[config.integration](config, refiners=members)


def refiner_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the refiner that `config` describes."""
    model_class = register_held_refiners()[config.model_type]
    if not model_class._supports_sdpa:
        config._attn_implementation = "eager"  # the backbone's would be refused, even by one without attention
    return model_class


def build_refiner(config: PreTrainedConfig) -> PreTrainedModel:
    """A refiner with fresh weights."""
    return refiner_class(config)(config)
