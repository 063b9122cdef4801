"""LLaDA (dense): the bidirectional transformer as it is, and the tensor names of the official checkpoints."""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..modeling_masked_diffusion import (
    BidirectionalDecoderLayer,
    MaskedDiffusionLM,
    MaskedDiffusionPreTrainedModel,
    MaskedDiffusionTransformer,
)
from .configuration_llada import LLaDAConfig


class LLaDADecoderLayer(BidirectionalDecoderLayer):
    """A layer of LLaDA, under the name that `device_map` and FSDP know it by."""


class LLaDAPreTrainedModel(MaskedDiffusionPreTrainedModel):
    config: LLaDAConfig
    config_class = LLaDAConfig
    _no_split_modules = ["LLaDADecoderLayer"]


class LLaDAModel(LLaDAPreTrainedModel, MaskedDiffusionTransformer):
    """LLaDA without LM head: `forward` is that of [`MaskedDiffusionTransformer`]."""

    layer_class = LLaDADecoderLayer


class LLaDAForMaskedDiffusion(LLaDAPreTrainedModel, MaskedDiffusionLM):
    """
    LLaDA with its LM head: predicts every masked token at once, and generates by masked diffusion. `forward` is that
    of [`MaskedDiffusionLM`].
    """

    model_class = LLaDAModel


# Tensor names of the official dense checkpoints, renamed one by one while loading (no second copy in memory).
# `ff_out` is both the LM head (under `transformer`) and each block's MLP output (under `blocks.{i}`).
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
register_checkpoint_conversion_mapping(
    LLaDAConfig.model_type,
    [
        WeightRenaming(r"model\.transformer\.ff_out\.", "lm_head."),
        WeightRenaming(r"model\.transformer\.wte\.", "model.embed_tokens."),
        WeightRenaming(r"model\.transformer\.ln_f\.", "model.norm."),
        *(
            WeightRenaming(rf"model\.transformer\.blocks\.(\d+)\.{official}\.", rf"model.layers.\1.{name}.")
            for official, name in _IN_BLOCK.items()
        ),
    ],
    overwrite=True,
)
