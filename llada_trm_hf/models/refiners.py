"""The refiners a hybrid can hold."""

import difflib
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
        if refiner.model_type not in REFINERS:
            raise ValueError(f"A {refiner.model_type!r} is no refiner. Known refiners: {', '.join(REFINERS)}.")
        return None, refiner
    if refiner in REFINER_CONFIGS:
        return None, REFINER_CONFIGS[str(refiner)](
            hidden_size=text_config.hidden_size, **({} if chunk_size is None else {"chunk_size": chunk_size})
        )
    if not os.path.isdir(refiner) and "/" not in str(refiner):
        close = difflib.get_close_matches(str(refiner), REFINERS, n=1)
        raise ValueError(
            f"Unknown refiner {str(refiner)!r}{f' (did you mean {close[0]!r}?)' if close else ''}. Known: "
            f"{', '.join(REFINERS)}; or the folder or repository of one."
        )
    model_type = PreTrainedConfig.get_config_dict(refiner)[0].get("model_type")
    if model_type not in REFINER_CONFIGS:
        raise ValueError(
            f"{refiner} holds a model of type {model_type!r}, which is no refiner. Known refiners: "
            f"{', '.join(REFINER_CONFIGS)}."
        )
    model = REFINERS[model_type].from_pretrained(refiner)
    return model, model.config
