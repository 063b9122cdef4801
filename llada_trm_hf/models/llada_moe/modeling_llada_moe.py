"""LLaDA-MoE: LLaDA whose MLPs are experts, a few of which each token is routed to (arXiv 2509.24389)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from ...generation.block_kv_cache import BlockKVCache
from ..modeling_masked_diffusion import (
    BidirectionalAttention,
    BidirectionalDecoderLayer,
    MaskedDiffusionLM,
    MaskedDiffusionPreTrainedModel,
    MaskedDiffusionTransformer,
    check_loss_arguments,
)
from ..rotary import FullPrecisionRotaryEmbedding
from .configuration_llada_moe import LLaDAMoEConfig


@dataclass
class LLaDAMoEOutput(ModelOutput):
    """
    Args:
        loss: scalar in float32, with labels; in training, with the balancing loss times `router_aux_loss_coef`.
        aux_loss: scalar, the balancing loss, in training with labels or with `output_router_logits=True`.
        logits: `[B, L, V]`, or of the shape `logits_to_keep` asks for.
        router_logits: with `output_router_logits=True`, for each layer with experts `[B * L, E]`.
        hidden_states: with `output_hidden_states=True`, see [`MaskedDiffusionTransformer`].
        attentions: with `output_attentions=True`, for each layer `[B, heads, L, L]`.
    """

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class LLaDAMoERotaryEmbedding(FullPrecisionRotaryEmbedding):
    """Of `rotary_dim` components, computed in float32 and given in the dtype of the hidden states."""

    @staticmethod
    def compute_default_rope_parameters(  # transformers 5.17 passes a device, later versions do not
        config: LLaDAMoEConfig, device: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float, device=device) / config.rotary_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0  # type: ignore[index]

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = super().forward(hidden_states, position_ids)
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


class LLaDAMoEAttention(BidirectionalAttention):
    """Attention with a norm on the queries and keys of each head, if the config has it."""

    def __init__(self, config: LLaDAMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.qk_layernorm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)


class LLaDAMoERouter(nn.Module):
    """Chooses each token's experts by their probability, which is also their weight: the weights need not sum to 1."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        has_bias = config.moe_router_enable_expert_bias
        self.expert_bias = nn.Parameter(torch.empty(config.num_experts)) if has_bias else None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The logits `[T, E]` of `hidden_states` `[T, D]`, and weights and indices `[T, k]` of the chosen experts."""
        logits = nn.functional.linear(hidden_states, self.weight)
        weights, indices = self.choose(logits)
        return logits, weights.to(hidden_states.dtype), indices

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = logits.softmax(-1, dtype=torch.float)
        if self.expert_bias is not None:
            probabilities = probabilities + self.expert_bias
        return probabilities.topk(self.num_experts_per_tok, dim=-1)


@use_experts_implementation
class LLaDAMoEExperts(nn.Module):
    """All experts of a layer, through the transformers experts interface."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        width, experts_width = config.hidden_size, config.expert_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * experts_width, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, experts_width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The "eager" implementation, expert by expert: `[T, D]` from `[T, D]`, `[T, k]` and `[T, k]`."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, rank = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (result * top_k_weights[token, rank, None]).to(output.dtype))
        return output


class LLaDAMoESparseMLP(nn.Module):
    """Routed experts, and a shared one if the config has it."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__()
        self.gate = LLaDAMoERouter(config)
        self.experts = LLaDAMoEExperts(config)
        shared_width = config.shared_expert_intermediate_size
        self.shared_expert = None if shared_width is None else Qwen3MoeMLP(config, shared_width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)  # [B * L, D]
        _, weights, indices = self.gate(tokens)
        output = self.experts(tokens, indices, weights).view_as(hidden_states)
        return output if self.shared_expert is None else output + self.shared_expert(hidden_states)


class LLaDAMoEDecoderLayer(BidirectionalDecoderLayer):
    """A layer whose MLP is routed experts, or dense where `moe_layer_freq` says so."""

    attention_class = LLaDAMoEAttention

    def build_mlp(self, config: LLaDAMoEConfig, layer_idx: int) -> nn.Module:
        if config.moe_layer_freq[layer_idx] == 1:
            return LLaDAMoESparseMLP(config)
        return Qwen3MoeMLP(config, config.dense_intermediate_size)


class LLaDAMoEPreTrainedModel(MaskedDiffusionPreTrainedModel):
    config: LLaDAMoEConfig
    config_class = LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoEDecoderLayer"]
    _can_record_outputs = {
        **MaskedDiffusionPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(LLaDAMoERouter, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers reads it off the source and keeps it on the class, where a dense parent's "no" is inherited.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LLaDAMoEExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, LLaDAMoERouter):
            init.normal_(module.weight, std=std)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)

    def balancing_loss(
        self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        How unevenly tokens are spread over experts (Switch Transformer, arXiv 2101.03961, equations 4 to 6): with all
        layers taken together, `E` times the sum over experts of (share of tokens that choose it) times (its mean
        probability). `num_experts_per_tok` when even.

        Args:
            router_logits: for each layer with experts `[B * L, E]`.
            attention_mask: `[B, L]`; padding does not count. Masks of another shape leave every token in.
        """
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        return load_balancing_loss_func(router_logits, self.config.num_experts, self.config.num_experts_per_tok, mask)

    @torch.no_grad()
    def expert_load(
        self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The share of tokens that go to each expert, `[layers with experts, E]`; each row sums to `num_experts_per_tok`.

        Args:
            router_logits, attention_mask: see `balancing_loss`.
        """
        routers = [module for module in self.modules() if isinstance(module, LLaDAMoERouter)]
        shares = []
        for router, logits in zip(routers, router_logits, strict=True):
            chosen = torch.zeros_like(logits, dtype=torch.float).scatter_(1, router.choose(logits)[1], 1.0)  # [T, E]
            counted = torch.ones_like(chosen[:, 0]) if attention_mask is None else attention_mask.flatten().to(chosen)
            shares.append(counted @ chosen / counted.sum())
        return torch.stack(shares)


class LLaDAMoEModel(LLaDAMoEPreTrainedModel, MaskedDiffusionTransformer):
    """The bidirectional transformer without LM head; `forward` also takes `output_router_logits`."""

    layer_class = LLaDAMoEDecoderLayer
    rotary_class = LLaDAMoERotaryEmbedding
    output_class = MoeModelOutputWithPast

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)
        # As in the official code, and unlike dense LLaDA, training leaves the padding token's embedding as it is.
        # (Where that is zero, its gradient through the first RMSNorm would dwarf all others.)
        self.embed_tokens.padding_idx = config.pad_token_id


class LLaDAMoEForMaskedDiffusion(LLaDAMoEPreTrainedModel, MaskedDiffusionLM):
    """LLaDA-MoE with its LM head: predicts every masked token at once, and generates by masked diffusion."""

    model_class = LLaDAMoEModel

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | BlockKVCache | None = None,
        labels: torch.Tensor | None = None,
        p_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> LLaDAMoEOutput:
        """
        As [`MaskedDiffusionLM.forward`]. In training, the loss has the balancing loss in it.

        Args:
            output_router_logits: see [`LLaDAMoEOutput`]; the config's by default.
        """
        check_loss_arguments(self, labels, p_mask, past_key_values)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        balances = self.training and labels is not None and self.config.router_aux_loss_coef > 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            output_router_logits=output_router_logits or balances,
            return_dict=True,
            **kwargs,
        )
        loss, logits = self._loss_and_logits(outputs.last_hidden_state, input_ids, labels, p_mask, logits_to_keep)
        aux_loss = None
        if outputs.router_logits and past_key_values is None:
            aux_loss = self.balancing_loss(outputs.router_logits, attention_mask)
        if loss is not None and balances and aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return LLaDAMoEOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            router_logits=outputs.router_logits if output_router_logits else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Official checkpoints hold every expert's matrices by themselves; here one tensor holds those of a layer.
register_checkpoint_conversion_mapping(
    LLaDAMoEConfig.model_type,
    [
        WeightRenaming(r"mlp\.expert_bias", "mlp.gate.expert_bias"),
        WeightRenaming(r"layers\.(\d+)\.shared_expert\.", r"layers.\1.mlp.shared_expert."),
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)
