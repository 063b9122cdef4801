"""The masked-diffusion models a refiner can stand on."""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from .configuration_llada import LLaDAConfig
from .modeling_llada import LLaDAForMaskedDiffusion

# The native families by `model_type`; any other model with a mask token and an output embedding is taken as it is.
# (Not by config class: remote code may load the same class twice, from two files.)
BACKBONES: dict[str, type[PreTrainedModel]] = {LLaDAConfig.model_type: LLaDAForMaskedDiffusion}


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights."""
    if config.model_type in BACKBONES:
        return BACKBONES[config.model_type](config)
    auto_class = AutoModelForMaskedLM if type(config) in AutoModelForMaskedLM._model_mapping else AutoModelForCausalLM
    return auto_class.from_config(config)


def load_backbone(name_or_path: Any, **kwargs: Any) -> PreTrainedModel:
    """
    A masked-diffusion model from a folder or repository: one of the native families in the official or in this
    package's layout, or any model `AutoModelForMaskedLM` or `AutoModelForCausalLM` knows.
    """
    if os.path.isabs(name_or_path) and not os.path.isdir(name_or_path):
        raise FileNotFoundError(f"There is no folder {name_or_path}.")
    model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    if model_type == "llada_trm":
        raise ValueError(f"{name_or_path} is a hybrid already, not a backbone: load it with from_pretrained.")
    if model_type in BACKBONES:
        return BACKBONES[model_type].from_pretrained(name_or_path, **kwargs)
    try:
        return AutoModelForMaskedLM.from_pretrained(name_or_path, **kwargs)
    except ValueError:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)


def encode(
    backbone: PreTrainedModel, inputs: dict[str, Any], output_hidden_states: bool | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """The hidden states `[B, L, D]` that `backbone`'s LM head reads, and on request those of every layer."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if type(backbone) in BACKBONES.values():
        outputs = backbone.model(**inputs, output_hidden_states=output_hidden_states)
        return outputs.last_hidden_state, outputs.hidden_states
    # Any other model: listen at the door of its LM head, and spare it the work.
    captured: list[torch.Tensor] = []

    def capture(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        captured.append(args[0])
        return (args[0][:, :0],)

    hook = backbone.get_output_embeddings().register_forward_pre_hook(capture)
    try:
        outputs = backbone(**inputs, output_hidden_states=output_hidden_states)
    finally:
        hook.remove()
    return captured[-1], outputs.hidden_states if output_hidden_states else None
