"""The refiners a hybrid can hold."""

import os

from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_llada_trm import REFINER_CONFIGS
from .configuration_refiners import RecursiveRefinementHeadConfig
from .modeling_refinement_head import RecursiveRefinementHead

REFINERS: dict[str, type[PreTrainedModel]] = {RecursiveRefinementHeadConfig.model_type: RecursiveRefinementHead}


def build_refiner(config: PreTrainedConfig) -> PreTrainedModel:
    """A refiner with fresh weights."""
    return REFINERS[config.model_type](config)


def resolve_refiner(
    refiner: str | os.PathLike | PreTrainedConfig | PreTrainedModel,
    text_config: PreTrainedConfig,
    chunk_size: int | None,
) -> tuple[PreTrainedModel | None, PreTrainedConfig]:
    """The refiner, if it has weights already, and its config."""
    if isinstance(refiner, PreTrainedModel):
        return refiner, refiner.config
    if isinstance(refiner, PreTrainedConfig):
        return None, refiner
    if refiner in REFINER_CONFIGS:
        return None, REFINER_CONFIGS[str(refiner)](
            hidden_size=text_config.hidden_size, **({} if chunk_size is None else {"chunk_size": chunk_size})
        )
    model_type = PreTrainedConfig.get_config_dict(refiner)[0].get("model_type")
    if model_type not in REFINER_CONFIGS:
        raise ValueError(
            f"{refiner} holds a model of type {model_type!r}, which is no refiner. Known refiners: "
            f"{', '.join(REFINER_CONFIGS)}."
        )
    model = REFINERS[model_type].from_pretrained(refiner)
    return model, model.config
