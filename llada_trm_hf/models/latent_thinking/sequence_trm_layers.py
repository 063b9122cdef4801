"""
The network of a SequenceTRM: transformer blocks in two styles, over sequences of different lengths, packed one after
the other without padding; what it returns, and when a sequence has been reasoned over for long enough.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..rotary import Rotary, rotate

# Sequences at least this much of the longest of their group share an attention call: less padding against fewer calls.
SIMILAR_LENGTH = 0.75


class SequenceGroup(NamedTuple):
    """Neighbouring sequences of similar length, which attention takes as the rows of `[R, S]`."""

    num_tokens: int
    num_rows: int
    length: int  # of the longest, S
    places: torch.Tensor | None  # LongTensor [num_tokens], their places in the flattened [R, S]; None if all are taken
    key_mask: torch.Tensor | None  # BoolTensor [R, 1, 1, S], False beyond the end of a sequence; None if all are real

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, ...]` to `[R, S, ...]`, zeros beyond the end of a sequence."""
        if self.places is not None:
            empty = packed.new_zeros(self.num_rows * self.length, *packed.shape[1:])
            packed = empty.index_copy(0, self.places, packed)
        return packed.unflatten(0, (self.num_rows, self.length))

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """`[R, S, ...]` to `[num_tokens, ...]`."""
        flat = rows.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


class PackedSequences(NamedTuple):
    """
    How `B` sequences stand in a tensor `[T, ...]` of all their tokens: one after the other, the shortest first. What
    looks at one token at a time costs nothing for padding, attention little. With `padded`, padding is computed too.
    """

    row: torch.Tensor  # LongTensor [T], the sequence of each token
    position: torch.Tensor  # LongTensor [T], its place in that sequence, from 0
    start: torch.Tensor  # LongTensor [B], where each sequence begins
    lengths: torch.Tensor  # LongTensor [B]
    groups: list[SequenceGroup]  # in the order of the tokens

    @classmethod
    def of(cls, lengths: torch.Tensor) -> "PackedSequences":
        """From the length of each sequence, LongTensor `[B]`, at least 1. Asks the device once, for all of them."""
        order = lengths.argsort(stable=True)
        ordered = lengths[order]
        ends = ordered.cumsum(0)
        start = torch.empty_like(lengths).index_copy_(0, order, ends - ordered)
        host = ordered.tolist()
        num_tokens = sum(host)
        row = order.repeat_interleave(ordered, output_size=num_tokens)
        position = torch.arange(num_tokens, device=lengths.device) - start[row]
        groups: list[SequenceGroup] = []
        end = len(host)
        while end:
            first = next(i for i, length in enumerate(host) if length >= SIMILAR_LENGTH * host[end - 1])
            groups.insert(0, _group(ordered[first:end], host[first:end]))
            end = first
        return cls(row, position, start, lengths, groups)

    @classmethod
    def padded(cls, real: torch.Tensor) -> "PackedSequences":
        """
        From `real`, BoolTensor `[B, S]` whose last column is all true: every column is a token, padding too, which no
        token sees. For a compiled or exported graph, whose shapes cannot depend on values.
        """
        batch, length = real.shape
        row = torch.arange(batch, device=real.device)
        position = (real.long().cumsum(1) - 1).clamp(min=0)
        group = SequenceGroup(batch * length, batch, length, None, real[:, None, None])
        lengths = torch.full_like(row, length)
        return cls(row[:, None].expand_as(real).flatten(), position.flatten(), row * length, lengths, [group])

    @property
    def last(self) -> torch.Tensor:
        """LongTensor `[B]`, where each sequence ends."""
        return self.start + self.lengths - 1

    def keep(self, rows: torch.Tensor) -> tuple["PackedSequences", torch.Tensor]:
        """The sequences `rows` alone, and which of the tokens are theirs, LongTensor `[T']`."""
        kept = PackedSequences.of(self.lengths[rows])
        return kept, self.start[rows][kept.row] + kept.position


def _group(lengths: torch.Tensor, host: list[int]) -> SequenceGroup:
    """Of sequences of these lengths, LongTensor `[R]`, the same as `host`; ascending."""
    num_tokens, num_rows, length = sum(host), len(host), host[-1]
    if num_tokens == num_rows * length:
        return SequenceGroup(num_tokens, num_rows, length, None, None)
    key_mask = torch.arange(length, device=lengths.device) < lengths[:, None]  # [R, S]
    padding = length - lengths
    places = torch.arange(num_tokens, device=lengths.device)
    places = places + (padding.cumsum(0) - padding).repeat_interleave(lengths, output_size=num_tokens)
    return SequenceGroup(num_tokens, num_rows, length, places, key_mask[:, None, None])


class ReasoningInput(NamedTuple):
    """
    What stays the same during recursion. Its tokens, and the state y and z, are packed: no padding is computed, except
    in a compiled or exported graph, whose shapes cannot depend on values.
    """

    x: torch.Tensor  # [T, D'], the real tokens of each context and its reasoning token, which comes last
    sequences: PackedSequences
    rotary: Rotary | None  # cosine and sine, [T, 1, head_dim]
    places: torch.Tensor  # LongTensor [T], where the tokens stood in the flattened [B, L + 1]
    real: torch.Tensor  # BoolTensor [B, L + 1], False at padding

    def rows(self, kept: torch.Tensor) -> tuple["ReasoningInput", torch.Tensor]:
        """The samples `kept`, and which tokens are theirs, LongTensor `[T']`."""
        sequences, tokens = self.sequences.keep(kept)
        rotary = None if self.rotary is None else (self.rotary[0][tokens], self.rotary[1][tokens])
        return ReasoningInput(self.x[tokens], sequences, rotary, self.places[tokens], self.real[kept]), tokens


@dataclass
class SequenceTRMOutput(ModelOutput):
    """
    A supervision step.

    Args:
        loss: with a target, scalar: `mse + halt_loss_weight * halt`.
        prediction: `[B, D']`.
        halt_logits: `[B]`, in float32 or better; `halt_probability` is their sigmoid.
        y, z: `[B, L + 1, D']`, the state after the step, detached, zeros at padding: pass it to the next one.
        loss_components: with a target, the detached scalars `mse` and `halt`.
        cosine_similarity: with a target, `[B]`, detached: that of prediction and target.
    """

    loss: torch.Tensor | None = None
    prediction: torch.Tensor = None  # type: ignore[assignment]
    halt_logits: torch.Tensor = None  # type: ignore[assignment]
    halt_probability: torch.Tensor = None  # type: ignore[assignment]
    y: torch.Tensor = None  # type: ignore[assignment]
    z: torch.Tensor = None  # type: ignore[assignment]
    loss_components: dict[str, torch.Tensor] | None = None
    cosine_similarity: torch.Tensor | None = None


@dataclass
class SequenceTRMReasoning(ModelOutput):
    """
    What `reason` returns.

    Args:
        prediction: `[B, D']`, that of each sample's last step.
        halt_probability: `[B]`, after that step.
        num_steps: LongTensor `[B]`, supervision steps taken.
        residual: `[B]`, detached: how much that step changed the state y of the reasoning token, of which the
            prediction is made: the norm of the change relative to that of the state. 1 after the first step.
        step_predictions, step_halt_probability: with `output_steps=True`, `[B, S, D']` and `[B, S]`, detached, for
            the `S` steps that any sample took (`max_steps` in a compiled graph); a sample that has halted keeps its
            result.
    """

    prediction: torch.Tensor = None  # type: ignore[assignment]
    halt_probability: torch.Tensor = None  # type: ignore[assignment]
    num_steps: torch.Tensor = None  # type: ignore[assignment]
    residual: torch.Tensor = None  # type: ignore[assignment]
    step_predictions: torch.Tensor | None = None
    step_halt_probability: torch.Tensor | None = None


class Halting(NamedTuple):
    """When a sample stops reasoning."""

    halt_threshold: float
    convergence_threshold: float

    @property
    def never(self) -> bool:
        return self.halt_threshold >= 1 and not self.convergence_threshold

    def halts(self, probability: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """BoolTensor `[B]`, after a step with these halting probabilities and residuals `[B]`."""
        return (probability > self.halt_threshold) | (residual < self.convergence_threshold)


def check_selection(select_by: str) -> None:
    """Raises ValueError if trajectories cannot be selected so."""
    if select_by not in ("halt", "residual"):
        raise ValueError(f"select_by must be 'halt' or 'residual', got {select_by!r}.")


@torch.no_grad()
def relative_change(before: torch.Tensor, after: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The norm of the change of these tokens `[B]` of `[T, D']`, relative to that of what they are after it: `[B]`."""
    dtype = torch.promote_types(after.dtype, torch.float32)
    before, after = before[tokens].to(dtype), after[tokens].to(dtype)
    return (after - before).norm(dim=-1) / after.norm(dim=-1).clamp(min=1e-30)


class SequenceTRMAttention(nn.Module):
    """Bidirectional multi-head attention, always through `scaled_dot_product_attention`."""

    def __init__(self, config: Any, bias: bool, dropout: float = 0.0):
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

    def __init__(self, config: Any):
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

    def __init__(self, config: Any):
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

    def __init__(self, config: Any):
        super().__init__()
        self.layers = nn.ModuleList(BLOCKS[config.block_style](config) for _ in range(config.n_layers))

    def forward(self, states: torch.Tensor, sequences: PackedSequences, rotary: Rotary | None) -> torch.Tensor:
        for layer in self.layers:
            states = layer(states, sequences, rotary)
        return states
