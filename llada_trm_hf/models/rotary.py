"""Rotary position embeddings (RoPE, arXiv 2104.09864), and checks of what a backbone is given and built with."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from .hub_model import check_at_least_one, nearest_name

ROPE_THETA = 10_000.0  # RoPE paper

NOT_A_MASK = "attention_mask must hold 1 for real tokens and 0 for padding, nothing else."

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosine and sine of the angles


def rotate(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """
    Rotates `states` `[..., head_dim]` by angles that broadcast to `[..., rotary_dim]`, in the dtype of the angles:
    channel `i` with channel `i + rotary_dim / 2`. What a head has beyond `rotary_dim` stays as it is.
    """
    cos, sin = rotary
    rotary_dim = cos.shape[-1]
    rotated = states[..., :rotary_dim].to(cos.dtype)
    rotated = (rotated * cos + rotate_half(rotated) * sin).to(states.dtype)
    return rotated if rotary_dim == states.shape[-1] else torch.cat([rotated, states[..., rotary_dim:]], dim=-1)


def rotary_embedding(positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> Rotary:
    """
    Cosine and sine of the angles of `positions` `[...]`, `[..., 1, head_dim]`, for the small models of this package:
    computed where they are needed, so that there is no buffer to cast or save.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    angles = positions.to(dtype)[..., None, None] * ROPE_THETA ** (-pairs / head_dim)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def check_inputs(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    """
    Raises TypeError for tokens that are not whole numbers, and ValueError for a mask `[B, L]` of floats that are not 0
    and 1: NaN would count as a token. (Only for floats is the device asked.)
    """
    if input_ids is not None and (input_ids.is_floating_point() or input_ids.dtype == torch.bool):
        raise TypeError(f"input_ids must be whole numbers, got {input_ids.dtype}: pass input_ids.long().")
    if attention_mask is None or attention_mask.ndim != 2 or not attention_mask.is_floating_point():
        return
    if not torch.compiler.is_compiling() and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError(NOT_A_MASK)


def positions_of_real_tokens(columns: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    The number of each token in `columns` `[L]` among its row's real tokens, `[B or 1, L]`, so that padding anywhere
    changes nothing.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return columns[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, columns]


class FullPrecisionRotaryEmbedding(LlamaRotaryEmbedding):
    """
    The angles of a backbone, by its config's `rope_parameters`. Cosine and sine stay in float32: LLaDA rotates in full
    precision (`rope_full_precision`).
    """

    inv_freq: torch.Tensor

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """`model.to(torch.bfloat16)` must not round the frequencies: only their device changes."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Rotary:
        """Cosine and sine `[B, L, head_dim]` of `position_ids` `[B, L]`, on the device of `hidden_states`."""
        return super().forward(hidden_states.float(), position_ids)


# --- Settings of a backbone ---


def check_token_id(name: str, token_id: int | None, vocab_size: int) -> None:
    """Raises ValueError if `token_id` is not a row of the embedding matrix."""
    if token_id is not None and not 0 <= token_id < vocab_size:
        raise ValueError(
            f"{name}={token_id} is outside the vocabulary (0 to {vocab_size - 1}). "
            f"Pass the id the model was trained with, or a larger vocab_size."
        )


def check_functions(config: PreTrainedConfig) -> None:
    """
    Raises ValueError for an activation function or kind of rotary embedding that transformers does not know, and for
    an impossible dropout or spread of the initial weights.
    """
    if not 0 <= config.attention_dropout <= 1:
        raise ValueError(f"attention_dropout must be between 0 and 1, got {config.attention_dropout}.")
    if config.initializer_range < 0:
        raise ValueError(f"initializer_range must be 0 or more, got {config.initializer_range}.")
    if config.rope_parameters is not None and not isinstance(config.rope_parameters, dict):
        raise ValueError(f"rope_parameters must be a dictionary, got {config.rope_parameters!r}.")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    for name, value, known in (
        ("hidden_act", config.hidden_act, ACT2FN),
        ("rope_type", rope_type, {"default", *ROPE_INIT_FUNCTIONS}),
    ):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}{nearest_name(str(value), known)}; one of {', '.join(known)}.")


def check_heads(config: PreTrainedConfig) -> None:
    """Raises ValueError if the attention heads do not divide the width, or the key/value heads the query heads."""
    check_at_least_one(config, "num_attention_heads", "num_key_value_heads")
    for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(f"{whole}={getattr(config, whole)} is not a multiple of {part}={getattr(config, part)}.")
