"""The recursive refinement head: re-reads a chunk of hidden states and corrects it until it stops changing."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from ..hub_model import check_at_least_one, check_fields
from ..recursion_depth import RecallConfig, RecursionDepth, free_steps
from .modeling_refiner import ChunkLayout, PreTrainedRefiner, RefinerOutput


class RecursiveRefinementHeadConfig(RecallConfig):
    r"""
    Configuration of [`RecursiveRefinementHead`].

    Args:
        hidden_size (`int`, defaults to 2048): Width of the hidden states it refines, `D`; that of the backbone.
        chunk_size (`int`, defaults to 16): Tokens refined together, `C`.
        head_hidden_size (`int`, defaults to 512): Width of the code a chunk is encoded to.
        head_layers (`int`, defaults to 2): SwiGLU layers between code and update.
        head_intermediate_size (`int`, *optional*): Width of those layers, `3 * head_hidden_size` if not given.
        max_recursive_steps (`int`, defaults to 8): Largest number of updates of a chunk, `K`.
        convergence_threshold (`float`, defaults to 0.01): A chunk stops when the cosine similarity of its code with
            that of the step before exceeds `1 - convergence_threshold`. 0 never stops.
        step_size (`float`, defaults to 0.1): Factor of every update.
        recall (`bool`, defaults to `False`): Whether every step also reads the chunk as it came, and its update is
            added to that. Without it, updates add up.
        trained_steps, max_free_steps, free_steps_probability: the depth in training, see [`RecursionDepth`]; with
            recall only.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.

    Raises:
        ValueError: for a size below 1, or a threshold outside [0, 2].
    """

    model_type = "recursive_refinement_head"

    hidden_size: int = 2048
    chunk_size: int = 16
    head_hidden_size: int = 512
    head_layers: int = 2
    head_intermediate_size: int = None  # type: ignore[assignment]
    max_recursive_steps: int = 8
    convergence_threshold: float = 0.01
    step_size: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_fields(self)
        if self.head_intermediate_size is None:
            self.head_intermediate_size = 3 * self.head_hidden_size
        sizes = ("hidden_size", "chunk_size", "head_hidden_size", "head_layers", "max_recursive_steps")
        check_at_least_one(self, *sizes, "head_intermediate_size")
        if not 0 <= self.convergence_threshold <= 2:
            raise ValueError(f"convergence_threshold must be between 0 and 2, got {self.convergence_threshold}.")
        super().__post_init__(**kwargs)


class RefinementSwiGLU(nn.Module):
    """A pre-norm residual SwiGLU layer on the code of a chunk."""

    def __init__(self, config: RecursiveRefinementHeadConfig):
        super().__init__()
        size, width = config.head_hidden_size, config.head_intermediate_size
        self.norm = nn.LayerNorm(size)
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        normed = self.norm(code)
        return code + self.down_proj(nn.functional.silu(self.gate_proj(normed)) * self.up_proj(normed))


class _Recursion(NamedTuple):
    """The result of a recursion over `A` chunks."""

    chunks: torch.Tensor  # [A, C * D], the final states
    codes: torch.Tensor  # [A, head_hidden_size], the codes of the final states
    num_steps: torch.Tensor  # [A], updates applied
    steps: list[torch.Tensor]  # [A, C * D] after each step
    similarity: torch.Tensor  # [A, K], NaN where a step was not run


class RecursiveRefinementHead(PreTrainedRefiner):
    """
    Refines hidden states chunk by chunk, all active chunks of a batch at once.

    Each step encodes a chunk `[C, D]` to a code, decodes an update from it and adds `step_size` times the update. A
    chunk stops when its code no longer turns (`convergence_threshold`), or after `max_recursive_steps` updates.

    With `recall=True`, the code of the chunk as it came is read too, and the update is added to the chunk as it came.
    In training nothing stops then, and the depth is random (see [`RecursionDepth`]).
    """

    config: RecursiveRefinementHeadConfig
    config_class = RecursiveRefinementHeadConfig
    _no_split_modules = ["RecursiveRefinementHead"]

    def __init__(self, config: RecursiveRefinementHeadConfig):
        super().__init__(config)
        chunk_width, size = config.chunk_size * config.hidden_size, config.head_hidden_size
        self.encoder = nn.Sequential(nn.Linear(chunk_width, size), nn.LayerNorm(size), nn.GELU())
        self.recall = nn.Linear(size, size, bias=False) if config.recall else None
        self.layers = nn.Sequential(*(RefinementSwiGLU(config) for _ in range(config.head_layers)))
        self.projector = nn.Linear(size, chunk_width)
        self.confidence = nn.Sequential(nn.Linear(size, size // 2 or 1), nn.GELU(), nn.Linear(size // 2 or 1, 1))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.projector:
            # Near zero, not zero: an untrained head hardly changes the model, yet every weight gets a gradient.
            init.normal_(module.weight, std=0.01 * self.config.initializer_range)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(
        self,
        hidden_states: torch.Tensor,
        active_chunks: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        max_steps: int | None = None,
        output_step_hidden_states: bool = False,
        output_statistics: bool = False,
        layout: ChunkLayout | None = None,
    ) -> RefinerOutput:
        """See [`PreTrainedRefiner`]. Raises ValueError for states of another width or masks of the wrong shape."""
        config = self.config
        layout, active = self.chunks_to_refine(hidden_states, active_chunks, attention_mask, layout)
        depth = RecursionDepth.of(self, max_steps)

        compiling = torch.compiler.is_compiling()
        chosen = _every_chunk(active) if compiling else active.nonzero(as_tuple=True)  # which asks the device once
        chunks = layout.gather(hidden_states, chosen).to(self.dtype).flatten(1)  # [A, C * D]
        if compiling:
            recursion = self._recurse_unrolled(chunks, active[chosen], depth.steps, output_step_hidden_states)
        else:
            recursion = self._recurse(chunks, depth, output_step_hidden_states)

        confidence = self.confidence(recursion.codes).squeeze(-1).float().sigmoid()  # [A]

        def per_chunk(values: torch.Tensor, inactive: float) -> torch.Tensor:
            """Spreads `[A, ...]` over `[B, N, ...]`."""
            spread = values.new_full((*active.shape, *values.shape[1:]), inactive)
            return spread.index_put(chosen, values)

        def tokens(flat_chunks: torch.Tensor) -> torch.Tensor:
            return layout.scatter(hidden_states, flat_chunks.unflatten(1, (-1, config.hidden_size)), chosen)

        return RefinerOutput(
            hidden_states=tokens(recursion.chunks),
            confidence=torch.where(active, per_chunk(confidence, 1.0), 1.0),
            num_steps=per_chunk(recursion.num_steps, 0),
            step_hidden_states=tuple(map(tokens, recursion.steps)) if output_step_hidden_states else None,
            statistics={"similarity": per_chunk(recursion.similarity, torch.nan)} if output_statistics else {},
        )

    def _encode(self, state: torch.Tensor, recalled: torch.Tensor | None) -> torch.Tensor:
        """The codes `[A, head_hidden_size]` of chunks `[A, C * D]`; `recalled` is of the codes they came with."""
        linear, norm, activation = self.encoder
        code = linear(state)
        return activation(norm(code if recalled is None else code + recalled))

    def _update(self, state: torch.Tensor, code: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """The states after a step from `state`, of chunks that came as `chunks`; all `[A, C * D]`."""
        update = self.config.step_size * self.projector(self.layers(code))
        return (state if self.recall is None else chunks) + update

    def _recurse(self, chunks: torch.Tensor, depth: RecursionDepth, keep_steps: bool) -> _Recursion:
        """Runs the recursion on `chunks` `[A, C * D]`; those that have converged leave the batch."""
        total = depth.free + depth.steps
        stops = self.recall is None or not self.training
        num_steps = torch.zeros(len(chunks), dtype=torch.long, device=chunks.device)
        similarity = torch.full((len(chunks), total), torch.nan, device=chunks.device)
        running = torch.arange(len(chunks), device=chunks.device)  # indices of the chunks still moving
        recalled = None if self.recall is None else self.recall(self._encode(chunks, None))
        came, result, state, code = chunks, chunks, chunks, self._encode(chunks, recalled)
        codes, steps = code, []
        for step in range(total):
            with free_steps(chunks.device) if step < depth.free else nullcontext():
                if step > 0:
                    previous, code = code, self._encode(state, recalled)
                    cosine = _cosine_similarity(code, previous)
                    similarity[running, step] = cosine.detach()
                    moving = running
                    if stops:
                        moving = (cosine <= 1 - self.config.convergence_threshold).nonzero().squeeze(-1)
                    if len(moving) < len(running):
                        # Written once, when they stop: the codes and states of chunks that have converged.
                        codes = codes.index_copy(0, running, code)
                        result = result.index_copy(0, running, state)
                        running, state, code = running[moving], state[moving], code[moving]
                        if recalled is not None:
                            recalled, came = recalled[moving], came[moving]
                # The first step runs even for no chunk at all: every weight gets a (zero) gradient, which DDP needs.
                if step > 0 and not len(running):
                    break
                state = self._update(state, code, came)
                num_steps[running] += 1
            if keep_steps and step >= depth.free:
                steps.append(result.index_copy(0, running, state.to(result.dtype)))
        if len(running) or not len(chunks):  # without a chunk too, so that every weight gets a gradient
            result = result.index_copy(0, running, state.to(result.dtype))
            codes = codes.index_copy(0, running, self._encode(state, recalled)) if total else codes
        return _Recursion(result, codes, num_steps, steps, similarity)

    def _recurse_unrolled(
        self, chunks: torch.Tensor, moving: torch.Tensor, max_steps: int, keep_steps: bool
    ) -> _Recursion:
        """
        The same for a compiled or exported graph, in which neither the steps nor the shapes can depend on values:
        chunks that are not `moving` (BoolTensor `[A]`), or no longer, are computed but stay as they are.
        """
        num_steps = torch.zeros_like(chunks[:, 0], dtype=torch.long)  # (`len` would fix how many there are)
        similarity = torch.full((chunks.shape[0], max_steps), torch.nan, device=chunks.device)
        recalled = None if self.recall is None else self.recall(self._encode(chunks, None))
        stops = self.recall is None or not self.training
        state, code, steps = chunks, self._encode(chunks, recalled), []
        for step in range(max_steps):
            if step > 0:
                previous, code = code, self._encode(state, recalled)
                cosine = _cosine_similarity(code, previous)
                similarity[:, step] = torch.where(moving, cosine, torch.nan)
                if stops:
                    moving = moving & (cosine <= 1 - self.config.convergence_threshold)
            state = torch.where(moving[:, None], self._update(state, code, chunks), state)
            num_steps = num_steps + moving
            if keep_steps:
                steps.append(state)
        return _Recursion(state, self._encode(state, recalled), num_steps, steps, similarity)


def _every_chunk(active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and numbers, LongTensors `[B * N]` each, of all the chunks that `active` `[B, N]` is about."""
    row, number = (torch.arange(size, device=active.device) for size in active.shape)
    return row[:, None].expand_as(active).flatten(), number.expand_as(active).flatten()


def _cosine_similarity(code: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(code.float(), previous.float(), dim=-1).clamp(max=1.0)
