"""The transformer blocks a SequenceTRM recurs with, in two styles, over packed sequences."""

import torch
from torch import nn

from .configuration_sequence_trm import SequenceTRMConfig
from .rotary import Rotary, rotate
from .sequence_packing import PackedSequences, SequenceGroup


class SequenceTRMAttention(nn.Module):
    """Bidirectional multi-head attention, always through `scaled_dot_product_attention`."""

    def __init__(self, config: SequenceTRMConfig, bias: bool, dropout: float = 0.0):
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, dropout
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(self, states: torch.Tensor, sequences: PackedSequences, rotary: Rotary | None) -> torch.Tensor:
        """`states` `[T, D']`; tokens see those of their own sequence."""
        query_key, value = (
            self.in_proj(states).unflatten(-1, (3 * self.n_heads, -1)).split((2 * self.n_heads, self.n_heads), dim=1)
        )
        if rotary is not None:
            query_key = rotate(query_key, rotary)
        query, key = query_key.chunk(2, dim=1)  # [T, heads, head_dim]
        sizes = [group.num_tokens for group in sequences.groups]
        parts = zip(sequences.groups, query.split(sizes), key.split(sizes), value.split(sizes))
        attended = torch.cat([self._attend(group, *heads) for group, *heads in parts])
        return self.out_proj(attended.flatten(1))

    def _attend(self, group: SequenceGroup, *heads: torch.Tensor) -> torch.Tensor:
        """Query, key, value and result `[num_tokens, heads, head_dim]`."""
        query, key, value = (group.unpack(tokens).transpose(1, 2) for tokens in heads)  # [R, heads, S, head_dim]
        attended = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=group.key_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return group.pack(attended.transpose(1, 2))


class TRMBlock(nn.Module):
    """
    The block of the TRM paper (arXiv 2510.04871): RoPE, SwiGLU, no biases, and after each residual sum an RMSNorm
    without weights (epsilon 1e-5).
    """

    def __init__(self, config: SequenceTRMConfig):
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.self_attn = SequenceTRMAttention(config, bias=False)
        self.gate_up_proj = nn.Linear(size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)
        self.norm = nn.RMSNorm(size, eps=1e-5, elementwise_affine=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: torch.Tensor, sequences: PackedSequences, rotary: Rotary | None) -> torch.Tensor:
        states = self.norm(states + self.dropout(self.self_attn(states, sequences, rotary)))
        gate, up = self.gate_up_proj(states).chunk(2, dim=-1)
        return self.norm(states + self.dropout(self.down_proj(nn.functional.silu(gate) * up)))


class LLMTRMBlock(nn.Module):
    """
    The block of the published llm-trm weights: pre-norm with weights, biases, GELU in its erf form, no positions.
    The epsilon of its norms is float32's machine epsilon, in every dtype.
    """

    def __init__(self, config: SequenceTRMConfig):
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.norm1 = nn.RMSNorm(size, eps=LLM_TRM_EPS)
        self.self_attn = SequenceTRMAttention(config, bias=True, dropout=config.dropout)
        self.norm2 = nn.RMSNorm(size, eps=LLM_TRM_EPS)
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, size))

    def forward(self, states: torch.Tensor, sequences: PackedSequences, rotary: Rotary | None) -> torch.Tensor:
        states = states + self.self_attn(self.norm1(states), sequences, rotary)
        return states + self.mlp(self.norm2(states))


LLM_TRM_EPS = torch.finfo(torch.float32).eps
BLOCKS: dict[str, type[TRMBlock] | type[LLMTRMBlock]] = {"trm": TRMBlock, "llm_trm": LLMTRMBlock}


class SequenceTRMNetwork(nn.Module):
    """The stack of blocks, `net`."""

    def __init__(self, config: SequenceTRMConfig):
        super().__init__()
        self.layers = nn.ModuleList(BLOCKS[config.block_style](config) for _ in range(config.n_layers))

    def forward(self, states: torch.Tensor, sequences: PackedSequences, rotary: Rotary | None) -> torch.Tensor:
        for layer in self.layers:
            states = layer(states, sequences, rotary)
        return states
