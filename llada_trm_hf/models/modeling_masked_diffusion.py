"""
What the masked-diffusion families share: a Llama-like transformer without causal mask, whose LM head predicts every
masked token at once, and the objective it learns by (LLaDA, arXiv 2502.09992).
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, eager_attention_forward
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ..generation.block_kv_cache import BlockKVCache, columns_of_tokens, refuse_prefix_cache
from ..generation.masked_diffusion_mixin import MaskedDiffusionGenerationMixin
from .hub_model import HubModel
from .rotary import FullPrecisionRotaryEmbedding, Rotary, check_inputs, positions_of_real_tokens, rotate

# With a vocabulary of 126k, float32 logits of this many tokens are 258 MB.
TOKENS_AT_ONCE = 512


# --- The transformer ---


class BidirectionalAttention(nn.Module):
    """Multi-head (or grouped-query) attention without causal mask, through the transformers attention interface."""

    is_causal = False

    def __init__(self, config: Any, layer_idx: int):
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
        self.q_norm: nn.Module = nn.Identity()  # some families have norms here, over each head by itself
        self.k_norm: nn.Module = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: Rotary,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | BlockKVCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Output `[B, L, D]`, and weights where the implementation gives them, for `hidden_states` `[B, L, D]` and angles
        `[B, L, rotary_dim]`. With a cache, the keys and values are all it holds.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # [B, kv_heads, L, head_dim]
        rotary = (rotary[0][:, None], rotary[1][:, None])
        query, key = rotate(query, rotary), rotate(key, rotary)
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


class BidirectionalDecoderLayer(GradientCheckpointingLayer):
    """
    Pre-norm attention and MLP, each added to its input.

    Attributes:
        attention_class: a family may have its own.
    """

    attention_class: ClassVar[type[BidirectionalAttention]] = BidirectionalAttention

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = self.build_mlp(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def build_mlp(self, config: Any, layer_idx: int) -> nn.Module:
        """SwiGLU; a family with experts overrides this."""
        return LlamaMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: Rotary,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | BlockKVCache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`[B, L, D]` from `[B, L, D]`."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            rotary,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MaskedDiffusionPreTrainedModel(HubModel, PreTrainedModel):
    """Base class of a family's `PreTrainedModel`s; a family names its `config_class` and its `_no_split_modules`."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": BidirectionalDecoderLayer, "attentions": BidirectionalAttention}

    def __init__(self, config: Any):
        # The official files of two families say "llada", so a checkpoint may meet the wrong class.
        if config.model_type != self.config_class.model_type:
            family = type(config).__name__.removesuffix("Config")
            raise ValueError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got a {type(config).__name__}: use "
                f"{family}Model, {family}ForMaskedDiffusion or an Auto class."
            )
        super().__init__(config)


class MaskedDiffusionTransformer(MaskedDiffusionPreTrainedModel):
    """
    A bidirectional transformer without LM head.

    Attributes:
        layer_class, rotary_class, output_class: a family may have its own.
    """

    auto_classes = ("AutoModel",)
    layer_class: ClassVar[type[nn.Module]] = BidirectionalDecoderLayer
    rotary_class: ClassVar[type[nn.Module]] = FullPrecisionRotaryEmbedding
    output_class: ClassVar[type[ModelOutput]] = BaseModelOutputWithPast

    def __init__(self, config: Any):
        super().__init__(config)
        # No padding_idx: LLaDA's padding token is its end-of-sequence token, which is learned like any other.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        check_inputs(input_ids, attention_mask)
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
        rotary = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, rotary, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
        return self.output_class(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


# --- The LM head and the objective ---


class MaskedDiffusionLM(MaskedDiffusionGenerationMixin, MaskedDiffusionPreTrainedModel):
    """
    A [`MaskedDiffusionTransformer`] with its LM head; generates by masked diffusion.

    Attributes:
        model_class: the family's transformer.
    """

    auto_classes = ("AutoModelForMaskedLM", "AutoModelForCausalLM")
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = False  # the loss is already a mean over rows: the Trainer must not divide it again
    model_class: ClassVar[type[MaskedDiffusionTransformer]]

    def __init__(self, config: Any):
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
    ) -> ModelOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values: see
                [`MaskedDiffusionTransformer`].
            labels: `[B, L]` clean tokens, -100 where a token is never masked. Needs `input_ids` (the noisy tokens).
            p_mask: `[B]` or `[B, L]`, the masking probability; see `masked_targets`.
            logits_to_keep: where to evaluate the LM head; see `select_positions`. By default everywhere, except in
                training with labels, where the loss needs the masked positions only and `logits` is None.

        Returns:
            `loss` (scalar, float32) and `logits` `[B, L, V]`, or of the shape `logits_to_keep` asks for. Logits at
            position `i` predict the token at position `i`; nothing is shifted.
        """
        check_loss_arguments(self, labels, p_mask, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            return_dict=True,
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


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The hidden states `[B, L, D]` the LM head is evaluated at.

    Args:
        logits_to_keep: an int `n` for the last `n` positions (0 for all); a LongTensor `[P]` or `[B, P]` of positions,
            giving `[B, P, D]`; a BoolTensor `[B, L]`, giving `[M, D]` for its `M` true positions in row-major order.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def check_loss_arguments(model: PreTrainedModel, labels: Any, p_mask: Any, past_key_values: Any) -> None:
    """Raises ValueError for arguments of `model.forward` by which it would train on another loss than its own."""
    taken = "The Trainer takes labels away for label_smoothing_factor and compute_loss_func: leave those out."
    if labels is not None:
        refuse_prefix_cache(past_key_values)
    elif p_mask is not None:
        raise ValueError(f"p_mask without labels: the model has to compute its loss itself. {taken}")
    elif model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(model).__name__} is in training mode and gets no labels, so that it has no loss: what trains on "
            f"its logits has to leave out unmasked tokens, and a refiner's own losses are missing. {taken}",
            stacklevel=3,
        )


class MaskedTargets(NamedTuple):
    """
    What the masked-diffusion loss needs of a batch, at its `M` masked and labelled tokens in row-major order.

    Attributes:
        positions: BoolTensor `[B, L]`, where those tokens stand.
        tokens: LongTensor `[M]`, the clean tokens.
        weights: FloatTensor `[M]`, so that the loss is `sum(weights * cross_entropy)`.
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor


def masked_targets(
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    mask_token_id: int | None,
    p_mask: torch.Tensor | None = None,
) -> MaskedTargets:
    """
    The tokens that count in the loss, and how much each counts (LLaDA, equations 3 and 5).

    Args:
        input_ids: LongTensor `[B, L]`, the noisy sequence.
        labels: LongTensor `[B, L]`, the clean tokens; -100 for tokens that are never masked (prompt, padding).
        mask_token_id: the token that replaced masked ones.
        p_mask: FloatTensor `[B]` or `[B, L]`, the probability each labelled token was masked with. Without it, the
            share of a row's labelled tokens that is masked takes its place.

    The weight of a token is `1 / (p_mask * n * B)` with `n` the labelled tokens of its row. With every token labelled
    this is the pre-training objective, with the response labelled the supervised fine-tuning objective.

    Raises:
        ValueError: for a batch with labels and no mask at all, as collators of causal language models make it. With
            `p_mask` it is a draw like any other, of loss 0.
    """
    if input_ids is None:
        raise ValueError(
            "labels need input_ids: the loss counts the positions that hold the mask token. PEFT's prompt tuning and "
            "P-tuning pass embeddings instead: use LoRA, IA3 or another adapter inside the layers."
        )
    if mask_token_id is None:
        raise ValueError("labels need the mask token: set model.config.mask_token_id, the id the model trained with.")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}.")
    labelled = labels != -100
    positions = labelled & (input_ids == mask_token_id)
    tokens = labels[positions]
    if not len(tokens) and p_mask is None and labelled.any():
        raise ValueError(
            f"No labelled token of input_ids is the mask token ({mask_token_id}), so that nothing would be learned: "
            f"use MaskedDiffusionTrainer or MaskedDiffusionCollator instead of a collator for causal language models. "
            f"Where tokens are masked at random, pass p_mask, the probability: then a batch may be without."
        )
    num_labelled = labelled.sum(-1, keepdim=True)
    if p_mask is None:
        p_mask = positions.sum(-1, keepdim=True) / num_labelled.clamp(min=1)
    elif p_mask.ndim == 1:
        p_mask = p_mask[:, None]
    weights = 1.0 / (p_mask.float() * num_labelled * labels.shape[0])
    return MaskedTargets(positions, tokens, weights.expand_as(positions)[positions])


def masked_diffusion_loss(losses: torch.Tensor, targets: MaskedTargets) -> torch.Tensor:
    """The loss from the cross-entropies `[M]` at `targets.positions`; a scalar, 0 when nothing is masked."""
    return (losses * targets.weights).sum()


class TokenScores(NamedTuple):
    """
    How a language model scores `M` tokens.

    Attributes:
        losses: FloatTensor `[M]`, the cross-entropies of the right tokens in float32; 0 where there is none.
        best: LongTensor `[M]`, the best guesses.
        probability: FloatTensor `[M]`, their probabilities, without gradient.
    """

    losses: torch.Tensor
    best: torch.Tensor
    probability: torch.Tensor


def score_tokens(
    hidden_states: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor
) -> TokenScores:
    """
    Scores `tokens` LongTensor `[M]` (-100 for "no right token here") by `lm_head` of `hidden_states` `[M, D]`.

    More than `TOKENS_AT_ONCE` tokens are taken in turn, and their logits computed once more for the gradient instead
    of being kept: the peak does not grow with the number of tokens.
    """
    if len(tokens) <= TOKENS_AT_ONCE:
        return _score(hidden_states, lm_head, tokens)
    pieces = zip(hidden_states.split(TOKENS_AT_ONCE), tokens.split(TOKENS_AT_ONCE))
    scores = [checkpoint(_score, states, lm_head, some, use_reentrant=False) for states, some in pieces]
    return TokenScores(*map(torch.cat, zip(*scores)))


def _score(
    hidden_states: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor
) -> TokenScores:
    logits = lm_head(hidden_states).float()
    losses = nn.functional.cross_entropy(logits, tokens, reduction="none")
    with torch.no_grad():
        largest, best = logits.max(-1)
        return TokenScores(losses, best, (largest - logits.logsumexp(-1)).exp())
