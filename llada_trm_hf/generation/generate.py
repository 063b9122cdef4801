"""
What travels as `custom_generate/generate.py` with masked-diffusion models: `model.generate(custom_generate=repository,
trust_remote_code=True)` generates by masked diffusion with that repository's code, for any model with a mask token.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from .block_sampler import DenoisingInputs
from .configuration_masked_diffusion import MaskedDiffusionGenerationConfig
from .masked_diffusion_mixin import DenoisingOutput, MaskedDiffusionGenerationMixin


class _AnyModel(MaskedDiffusionGenerationMixin):
    """Any model that predicts masked tokens in place, without the block cache or a refiner."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.base_model, self.config = model, model.base_model, model.config
        self.generation_config = MaskedDiffusionGenerationConfig()

    def _denoising_output(
        self, inputs: DenoisingInputs, config: MaskedDiffusionGenerationConfig, trace: Any
    ) -> DenoisingOutput:
        if inputs.cache is not None:
            raise ValueError(f"kv_cache={config.kv_cache!r} is for the models of this package: leave it out.")
        logits = self.model(input_ids=inputs.tokens, attention_mask=inputs.attention_mask).logits
        return DenoisingOutput(torch.take_along_dim(logits, inputs.positions[..., None], dim=1))


def generate(
    model: Any, inputs: torch.Tensor | None = None, input_ids: torch.Tensor | None = None, **arguments: Any
) -> Any:
    """
    As `MaskedDiffusionGenerationMixin.generate`.

    Args:
        model: a masked-diffusion model or, say, an encoder with a mask token, which `mask_token_id` or its config
            names.
        inputs, input_ids: the prompt `[B, L_prompt]`, under either name.
        arguments: the rest; what transformers passes on as None is left out.
    """
    prompt = inputs if input_ids is None else input_ids
    if prompt is None:
        raise ValueError("Pass the prompt as input_ids (a mask token to start from nothing).")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if hasattr(model, "_denoising_output"):
        return MaskedDiffusionGenerationMixin.generate(model, prompt, **arguments)
    return _AnyModel(model).generate(prompt, **arguments)
