"""LLaDA (dense): a Llama-like transformer without causal mask, trained to fill in masked tokens (arXiv 2502.09992)."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .block_kv_cache import BlockKVCache
from .configuration_llada import LLaDAConfig
from .generation_masked_diffusion import MaskedDiffusionGenerationMixin
from .logits_to_keep import select_positions
from .loss_masked_diffusion import masked_diffusion_loss, masked_targets
from .modeling_hub import HubModel
from .token_scores import score_tokens


class LLaDARMSNorm(LlamaRMSNorm):
    pass


class LLaDAMLP(LlamaMLP):
    pass


class LLaDARotaryEmbedding(LlamaRotaryEmbedding):
    """Returns cos and sin in float32: LLaDA rotates in full precision (`rope_full_precision`)."""

    inv_freq: torch.Tensor

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """`model.to(torch.bfloat16)` must not round the frequencies: only their device changes."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden_states.float(), position_ids)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotates `states` `[B, heads, L, head_dim]` in the dtype of `cos` and `sin` `[B, L, rotary_dim]`. What a head has
    beyond `rotary_dim` stays as it is.
    """
    rotary_dim = cos.shape[-1]
    rotated = states[..., :rotary_dim].to(cos.dtype)
    rotated = (rotated * cos[:, None] + rotate_half(rotated) * sin[:, None]).to(states.dtype)
    return rotated if rotary_dim == states.shape[-1] else torch.cat([rotated, states[..., rotary_dim:]], dim=-1)


class LLaDAAttention(nn.Module):
    """Bidirectional multi-head (or grouped-query) attention through the transformers attention interface."""

    is_causal = False

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm: nn.Module = nn.Identity()  # LLaDA-MoE has norms here
        self.k_norm: nn.Module = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | BlockKVCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Output `[B, L, D]`, and weights where the implementation gives them, for `hidden_states` `[B, L, D]`. With a
        cache, the keys and values are all it holds.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # [B, kv_heads, L, head_dim]
        query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class LLaDADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LLaDAAttention(config, layer_idx)
        self.mlp: nn.Module = LLaDAMLP(config)
        self.input_layernorm = LLaDARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LLaDARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | BlockKVCache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`[B, L, D]` from `[B, L, D]`: pre-norm attention and MLP, each added to its input."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LLaDAPreTrainedModel(HubModel, PreTrainedModel):
    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDADecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LLaDADecoderLayer, "attentions": LLaDAAttention}

    def __init__(self, config: LLaDAConfig):
        # Both families' official files say "llada", so a checkpoint may meet the wrong class.
        if config.model_type != self.config_class.model_type:
            family = type(config).__name__.removesuffix("Config")
            raise ValueError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got a {type(config).__name__}: use "
                f"{family}Model, {family}ForMaskedDiffusion or an Auto class."
            )
        super().__init__(config)


class LLaDAModel(LLaDAPreTrainedModel):
    """
    The bidirectional transformer without LM head.

    Attributes:
        layer_class, rotary_class, output_class: what a family of its own puts in place of these.
    """

    auto_classes = ("AutoModel",)
    layer_class: ClassVar[type[nn.Module]] = LLaDADecoderLayer
    rotary_class: ClassVar[type[LLaDARotaryEmbedding]] = LLaDARotaryEmbedding
    output_class: ClassVar[type[ModelOutput]] = BaseModelOutputWithPast

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        # No padding_idx: LLaDA's padding token is its end-of-sequence token, which is learned like any other.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = LLaDARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | BlockKVCache | None = None,
        is_padded: bool = False,
        **kwargs: Any,
    ) -> ModelOutput:
        """
        Args:
            input_ids: `[B, L]`; or `inputs_embeds` `[B, L, D]`.
            attention_mask: `[B, L]`, 1 for real tokens and 0 for padding, which may stand on either side.
            position_ids: `[B, L]`. By default, positions count the real tokens of each row.
            past_key_values: a [`BlockKVCache`], whose columns the `L` tokens are, or a transformers cache that holds
                the tokens before them. Then `attention_mask` covers every column of the cache, not only these.
            is_padded: whether `attention_mask` is known to hold zeros; if not, the device is asked.

        Returns:
            `last_hidden_state` `[B, L, D]` after the final norm. With `output_hidden_states=True`, `hidden_states` are
            the embeddings, the residual stream after each block but the last, and the last after the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            columns = columns_of_tokens(hidden_states, past_key_values)
            position_ids = positions_of_real_tokens(columns, attention_mask)

        mask = None  # without padding, everything sees everything
        if attention_mask is not None:
            mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                allow_is_bidirectional_skip=not is_padded,
            )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, position_embeddings, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
        return self.output_class(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def columns_of_tokens(hidden_states: torch.Tensor, past_key_values: Cache | BlockKVCache | None) -> torch.Tensor:
    """Where in the sequence the tokens of `hidden_states` `[B, L, D]` stand: `[L]`."""
    if isinstance(past_key_values, Cache):
        start = past_key_values.get_seq_length()
    elif past_key_values is not None and past_key_values.columns is not None:
        return past_key_values.columns
    else:
        start = 0
    return torch.arange(hidden_states.shape[1], device=hidden_states.device) + start


def positions_of_real_tokens(columns: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    The number of each token in `columns` `[L]` among its row's real tokens, `[B or 1, L]`, so that padding anywhere
    changes nothing.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return columns[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, columns]


class LLaDAForMaskedDiffusion(MaskedDiffusionGenerationMixin, LLaDAPreTrainedModel):
    """LLaDA with its LM head: predicts every masked token at once, and generates by masked diffusion."""

    auto_classes = ("AutoModelForMaskedLM", "AutoModelForCausalLM")
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = False  # the loss is already a mean over rows: the Trainer must not divide it again
    model_class: ClassVar[type[LLaDAPreTrainedModel]] = LLaDAModel

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | BlockKVCache | None = None,
        labels: torch.Tensor | None = None,
        p_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values: see [`LLaDAModel`].
            labels: `[B, L]` clean tokens, -100 where a token is never masked. Needs `input_ids` (the noisy tokens).
            p_mask: `[B]` or `[B, L]`, the masking probability; see `masked_targets`.
            logits_to_keep: where to evaluate the LM head; see `select_positions`. By default everywhere, except in
                training with labels, where the loss needs the masked positions only and `logits` is None.

        Returns:
            `loss` (scalar, float32) and `logits` `[B, L, V]`, or of the shape `logits_to_keep` asks for. Logits at
            position `i` predict the token at position `i`; nothing is shifted.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            **kwargs,
        )
        loss, logits = self._loss_and_logits(outputs.last_hidden_state, input_ids, labels, p_mask, logits_to_keep)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss_and_logits(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        p_mask: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The LM head on `hidden_states` `[B, L, D]`, where it is needed; see `forward`."""
        loss = None
        if labels is not None:
            targets = masked_targets(input_ids, labels, self.config.mask_token_id, p_mask)
            scores = score_tokens(hidden_states[targets.positions], self.lm_head, targets.tokens)
            loss = masked_diffusion_loss(scores.losses, targets)
        if logits_to_keep is None:
            if self.training and labels is not None:
                return loss, None
            logits_to_keep = 0
        return loss, self.lm_head(select_positions(hidden_states, logits_to_keep))


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
