"""The slot refiner: a small transformer that re-reads the whole sequence and writes corrections through four slots."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from ..hub_model import check_at_least_one, check_fields
from ..recursion_depth import RecallConfig, RecursionDepth, free_steps
from ..rotary import Rotary, rotary_embedding
from .modeling_refiner import ChunkLayout, PreTrainedRefiner, RefinerAttention, RefinerOutput

MAX_UPDATE = 0.5  # of a component, in one step
KEPT_DISTANCE = 0.5  # from the states as they came, in one step with recall: no component ends further than 1 away
# Layers, attention heads and FFN expansion of a slot refiner.
SLOT_TRM_PRESETS = {"tiny": (2, 4, 2), "base": (4, 8, 4), "large": (6, 16, 4)}
SLOTS = ("context", "reasoning", "refinement", "confidence")


class SlotTRMRefinerConfig(RecallConfig):
    r"""
    Configuration of [`SlotTRMRefiner`].

    Args:
        hidden_size (`int`, defaults to 2048): Width of the hidden states it refines, `D`; that of the backbone.
        chunk_size (`int`, defaults to 16): Tokens in a chunk, `C`: what is active, converges and is counted together.
        preset (`str`, defaults to `"base"`): `"tiny"`, `"base"` or `"large"`: 2, 4, 6 layers with 4, 8, 16 attention
            heads and an FFN expansion of 2, 4, 4, where the next three do not say otherwise.
        num_hidden_layers (`int`, *optional*): Transformer blocks.
        num_attention_heads (`int`, *optional*): Attention heads of each.
        ffn_expansion (`int`, *optional*): Width of their feed-forward layers, in units of `hidden_size`.
        context_slot_size (`int`, *optional*): Width of the context slot, `D / 2` if not given.
        reasoning_slot_size (`int`, *optional*): Width of the reasoning slot, `D / 4` if not given.
        refinement_slot_size (`int`, *optional*): Width of the refinement slot, `D / 4` if not given.
        confidence_slot_size (`int`, *optional*): Width of the confidence slot, `D / 8` if not given.
        use_gating (`bool`, defaults to `True`): Whether each slot is multiplied by a learned gate.
        delta_scale (`float`, defaults to 0.1): Factor of every update.
        max_recursive_steps (`int`, defaults to 4): Largest number of updates of a chunk, `K`.
        convergence_threshold (`float`, defaults to 1e-4): A chunk stops after an update when the cosine similarity of
            its hidden states with those before exceeds `1 - convergence_threshold`: by default, an update of about
            1.4% of their norm. 0 never stops.
        dropout (`float`, defaults to 0.0): On the output of attention and feed-forward layers.
        recall (`bool`, defaults to `False`): Whether every step also reads the states as they came, and keeps half of
            the distance from them. Without it, updates add up.
        trained_steps, max_free_steps, free_steps_probability: the depth in training, see [`RecursionDepth`]; with
            recall only.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.

    Raises:
        ValueError: for an unknown preset, a size below 1, slots wider than `1.5 * hidden_size` together, heads that do
            not divide the width into even parts, or another value out of range.
    """

    model_type = "slot_trm_refiner"

    hidden_size: int = 2048
    chunk_size: int = 16
    preset: str = "base"
    num_hidden_layers: int = None  # type: ignore[assignment]
    num_attention_heads: int = None  # type: ignore[assignment]
    ffn_expansion: int = None  # type: ignore[assignment]
    context_slot_size: int = None  # type: ignore[assignment]
    reasoning_slot_size: int = None  # type: ignore[assignment]
    refinement_slot_size: int = None  # type: ignore[assignment]
    confidence_slot_size: int = None  # type: ignore[assignment]
    use_gating: bool = True
    delta_scale: float = 0.1
    max_recursive_steps: int = 4
    convergence_threshold: float = 1e-4
    dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_fields(self)
        if self.preset not in SLOT_TRM_PRESETS:
            raise ValueError(f"preset must be one of {', '.join(SLOT_TRM_PRESETS)}, got {self.preset!r}.")
        preset = zip(("num_hidden_layers", "num_attention_heads", "ffn_expansion"), SLOT_TRM_PRESETS[self.preset])
        shares = zip((f"{slot}_slot_size" for slot in SLOTS), (2, 4, 4, 8))
        defaults = {**dict(preset), **{name: max(1, self.hidden_size // share) for name, share in shares}}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check(tuple(defaults))
        super().__post_init__(**kwargs)

    @property
    def slot_sizes(self) -> dict[str, int]:
        """The width of each slot."""
        return {slot: getattr(self, f"{slot}_slot_size") for slot in SLOTS}

    def _check(self, sizes: tuple[str, ...]) -> None:
        check_at_least_one(self, "hidden_size", "chunk_size", "max_recursive_steps", *sizes)
        if self.hidden_size % (2 * self.num_attention_heads):  # rotary embeddings turn pairs of channels
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of {2 * self.num_attention_heads}, for "
                f"num_attention_heads={self.num_attention_heads} heads of even width."
            )
        total = sum(self.slot_sizes.values())
        if total > 1.5 * self.hidden_size:
            raise ValueError(
                f"The slots are {total} wide together ({self.slot_sizes}), more than 1.5 * hidden_size = "
                f"{1.5 * self.hidden_size:g}: make them narrower."
            )
        if self.delta_scale <= 0:
            raise ValueError(f"delta_scale must be above 0, got {self.delta_scale}.")
        if not 0 <= self.convergence_threshold <= 2:
            raise ValueError(f"convergence_threshold must be between 0 and 2, got {self.convergence_threshold}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}.")


class SlotTRMBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: SlotTRMRefinerConfig):
        super().__init__()
        size, width = config.hidden_size, config.ffn_expansion * config.hidden_size
        self.attention_norm = nn.RMSNorm(size, eps=1e-5)
        self.self_attn = RefinerAttention(config, size)
        self.mlp_norm = nn.RMSNorm(size, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, size))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: torch.Tensor, rotary: Rotary, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output for `hidden_states` `[B, L, D]`, and its attention heads side by side, `[B, L, D]`."""
        attended, heads = self.self_attn(self.attention_norm(hidden_states), rotary, attention_mask)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states))), heads


class SlotProjections(nn.Module):
    """Projections, norms and gates of the slots."""

    def __init__(self, config: SlotTRMRefinerConfig):
        super().__init__()
        self.projections = nn.ModuleDict(
            {slot: nn.Linear(config.hidden_size, size, bias=False) for slot, size in config.slot_sizes.items()}
        )
        self.norms = nn.ModuleDict({slot: nn.LayerNorm(size) for slot, size in config.slot_sizes.items()})
        self.gates = nn.Parameter(torch.zeros(len(SLOTS))) if config.use_gating else None

    def read(self, context: torch.Tensor, encoded: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each slot's projection of the attention context `[B, L, D]`, or for the confidence of the last block's
        output `[B, L, D]`."""
        return {slot: self.projections[slot](encoded if slot == "confidence" else context) for slot in SLOTS}

    def forward(self, slots: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The slots, normed and gated."""
        gates = itertools.repeat(1.0) if self.gates is None else self.gates.sigmoid()
        return {slot: gate * self.norms[slot](slots[slot]) for slot, gate in zip(SLOTS, gates)}

    def overlaps(self) -> dict[str, torch.Tensor]:
        """
        For each two projections that read the same input, the attention context: the squared cosines between their
        rows, summed and divided by the rows of the narrower one. 0 if they look at orthogonal directions; with
        orthonormal rows, the share of the narrower one's directions that the other sees too.
        """
        weights = {slot: self.projections[slot].get_parameter("weight") for slot in SLOTS if slot != "confidence"}
        rows = {slot: nn.functional.normalize(weight, dim=-1) for slot, weight in weights.items()}
        return {
            f"{a}_{b}": (rows[a] @ rows[b].T).square().sum() / min(len(rows[a]), len(rows[b]))
            for a, b in itertools.combinations(rows, 2)
        }


class _Rows(NamedTuple):
    """Rows of a batch, and what attention needs for them."""

    numbers: torch.Tensor  # LongTensor [b], their numbers in the batch
    layout: ChunkLayout
    rotary: Rotary
    mask: Any  # as the attention implementation wants it


class SlotTRMRefiner(PreTrainedRefiner):
    """
    Refines hidden states with a transformer over the whole sequence, so that chunks can inform each other. It reads
    every real token and writes to the active chunks only. In each of at most `max_recursive_steps` steps:

    1. Transformer blocks read the states so far. What their attention heads say, before the output projection and
       averaged over the blocks, is the *context* `[B, L, D]`.
    2. Four slots, each normed and gated, are read off: *context* and *reasoning* from the context, *refinement* as
       the change of its projection of the context since the step before (a raw projection less a raw one; in the
       first step all of it), *confidence* from the output of the last block.
    3. A tanh MLP (tanh between its layers; its output is not bounded) makes a delta of the slots, another MLP a
       token's confidence of the confidence slot, and the states get
       `clamp(delta * confidence * delta_scale, -0.5, 0.5)`. They have no norm outside the step.

    With recall, the blocks also read the states as they came, through a projection, and half of the distance from them
    is kept before the update is added, so that it cannot grow without end. In training nothing stops, and the depth is
    random (see [`RecursionDepth`]).

    A chunk stops after an update that hardly turned its hidden states (cosine similarity with those before it above
    `1 - convergence_threshold`); rows in which every chunk has stopped leave the batch. A chunk's confidence is the
    mean of its tokens' in its last update, 1 without any.

    Statistics: `similarity` `[B, N, K]`, that cosine; per step, as means over the tokens written and NaN where nothing
    was, `slot_norm_{slot}` (before norm and gate), `delta_norm` (of the update) and `token_confidence`, `[K]` each;
    the scalars `gate_{slot}` and `orthogonality_{slot}_{slot}`.
    """

    config: SlotTRMRefinerConfig
    config_class = SlotTRMRefinerConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["SlotTRMRefiner"]

    def __init__(self, config: SlotTRMRefinerConfig):
        super().__init__(config)
        sizes, size = config.slot_sizes, config.hidden_size
        self.layers = nn.ModuleList(SlotTRMBlock(config) for _ in range(config.num_hidden_layers))
        self.slots = SlotProjections(config)
        self.recall = nn.Linear(size, size, bias=False) if config.recall else None
        self.delta = nn.Sequential(nn.Linear(sum(sizes.values()), size), nn.Tanh(), nn.Linear(size, size))
        self.token_confidence = nn.Sequential(
            nn.Linear(sizes["confidence"], sizes["confidence"]), nn.GELU(), nn.Linear(sizes["confidence"], 1)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.delta[-1]:
            # Near zero, not zero: an untrained refiner hardly changes the model, yet every weight gets a gradient.
            init.normal_(module.weight, std=0.01 * self.config.initializer_range)
        elif isinstance(module, SlotProjections) and module.gates is not None:
            init.zeros_(module.gates)

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
        layout, active = self.chunks_to_refine(hidden_states, active_chunks, attention_mask, layout)
        depth = RecursionDepth.of(self, max_steps)
        recursion = _Recursion(self, hidden_states, layout, active, attention_mask is not None)
        if output_statistics:
            recursion.keep_statistics(depth.free + depth.steps)
        written = layout.to_tokens(active)[..., None]  # [B, L, 1]
        if depth.free:
            with free_steps(hidden_states.device):
                for _ in range(depth.free):
                    recursion.step()
            # What is read only is the input still, gradients included.
            recursion.states = torch.where(written, recursion.states, recursion.came)
        steps = []
        for _ in range(depth.steps):
            if not recursion.step():
                break
            if output_step_hidden_states:
                steps.append(recursion.states)

        def tokens(states: torch.Tensor) -> torch.Tensor:
            return torch.where(written, states.to(hidden_states.dtype), hidden_states)

        confidence = recursion.confidence
        if not recursion.number and torch.is_grad_enabled():
            # With nothing to refine, every weight still gets a (zero) gradient: DDP needs it.
            confidence = confidence + sum((0.0 * parameter).sum() for parameter in self.parameters())
        overlaps = self.slots.overlaps() if output_statistics else {}
        return RefinerOutput(
            hidden_states=tokens(recursion.states),
            confidence=confidence,
            num_steps=recursion.num_steps,
            step_hidden_states=tuple(map(tokens, steps)) if output_step_hidden_states else None,
            statistics=recursion.statistics | self._of_the_weights(overlaps) if output_statistics else {},
            orthogonality_loss=torch.stack([*overlaps.values()]).mean() if output_statistics else None,
        )

    def _of_the_weights(self, overlaps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The statistics that no input changes."""
        statistics = {f"orthogonality_{pair}": value.detach() for pair, value in overlaps.items()}
        if self.slots.gates is not None:
            gates = self.slots.gates.detach().sigmoid()
            statistics |= {f"gate_{slot}": gate for slot, gate in zip(SLOTS, gates)}
        return statistics

    def read_slots(self, states: torch.Tensor, rows: _Rows) -> dict[str, torch.Tensor]:
        """The raw projections of the slots, `[b, L, slot size]` each, from `states` `[b, L, D]`."""
        heads = []
        for layer in self.layers:
            states, from_heads = layer(states, rows.rotary, rows.mask)
            heads.append(from_heads)
        return self.slots.read(torch.stack(heads).mean(0), states)

    def update_of(self, slots: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The update `[b, L, D]` that `slots` say, before norm and gate, and each token's confidence `[b, L]`."""
        slots = self.slots(slots)
        confidence = self.token_confidence(slots["confidence"]).sigmoid()  # [b, L, 1]
        delta = self.delta(torch.cat([*slots.values()], dim=-1))
        update = (delta * confidence * self.config.delta_scale).clamp(-MAX_UPDATE, MAX_UPDATE)
        return update, confidence.squeeze(-1)


class _Recursion:
    """
    Hidden states `[B, L, D]` on their way through the steps. Rows in which no chunk is moving any more are not
    computed, except in a compiled or exported graph, whose number of rows cannot depend on their values.
    """

    def __init__(
        self,
        refiner: SlotTRMRefiner,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        active: torch.Tensor,
        has_padding: bool,
    ):
        self.refiner, self.layout, self.has_padding = refiner, layout, has_padding
        # Zeros at padding: NaN there would reach real tokens, even with an attention weight of 0.
        self.states = hidden_states.to(refiner.dtype).masked_fill(~layout.is_real[..., None], 0.0)
        self.came = self.states
        self.recalled = None if refiner.recall is None else refiner.recall(self.came)
        self.stops = refiner.recall is None or not refiner.training
        self.confidence = torch.ones(active.shape, device=active.device)
        self.num_steps = torch.zeros_like(active, dtype=torch.long)
        self.statistics: dict[str, torch.Tensor] = {}
        self.number = 0
        self.previous: torch.Tensor | None = None  # [b, L, refinement slot], the projection of the step before
        if torch.compiler.is_compiling():
            self._compute(torch.arange(active.shape[0], device=active.device))
        else:
            self._compute(active.any(-1).nonzero().squeeze(-1))  # asks the device
        self.running = active[self.rows.numbers]  # BoolTensor [b, N]

    def keep_statistics(self, max_steps: int) -> None:
        names = (*(f"slot_norm_{slot}" for slot in SLOTS), "delta_norm", "token_confidence")
        unknown = self.confidence.new_full((max_steps,), torch.nan)
        self.statistics = {name: unknown.clone() for name in names}
        self.statistics["similarity"] = unknown.repeat(*self.confidence.shape, 1)  # [B, N, K]

    def step(self) -> bool:
        """Updates the chunks that are still moving; False if there is none."""
        if self.previous is not None and not torch.compiler.is_compiling():
            self._drop_finished_rows()
        if not self.rows.numbers.shape[0]:
            return False
        numbers, layout = self.rows.numbers, self.rows.layout
        before = states = self.states[numbers]  # [b, L, D]
        if self.recalled is None:
            slots = self.refiner.read_slots(states, self.rows)
        else:
            slots = self.refiner.read_slots(states + self.recalled[numbers], self.rows)
            came = self.came[numbers]
            states = came + KEPT_DISTANCE * (states - came)
        projected = slots["refinement"]
        if self.previous is not None:
            slots["refinement"] = projected - self.previous
        self.previous = projected.detach()

        update, confidence = self.refiner.update_of(slots)
        written = layout.to_tokens(self.running)  # [b, L]
        updated = torch.where(written[..., None], states + update.to(states.dtype), before)
        self.states = self.states.index_copy(0, numbers, updated)
        per_chunk = layout.mean_per_chunk(confidence, layout.is_real, empty=1.0)
        per_chunk = torch.where(self.running, per_chunk, self.confidence[numbers])
        self.confidence = self.confidence.index_copy(0, numbers, per_chunk)
        self.num_steps.index_add_(0, numbers, self.running.long())
        similarity = _chunk_similarity(before.detach(), updated.detach(), layout)
        if self.statistics:
            self._record(slots, update, confidence, written, similarity)
        if self.stops:
            self.running = self.running & (similarity <= 1 - self.refiner.config.convergence_threshold)
        self.number += 1
        return True

    def _record(
        self,
        slots: dict[str, torch.Tensor],
        update: torch.Tensor,
        confidence: torch.Tensor,
        written: torch.Tensor,
        similarity: torch.Tensor,
    ) -> None:
        values = {f"slot_norm_{slot}": projected.norm(dim=-1) for slot, projected in slots.items()}
        values |= {"delta_norm": update.norm(dim=-1), "token_confidence": confidence}  # [b, L] each
        for name, per_token in values.items():
            self.statistics[name][self.number] = (per_token.detach() * written).sum() / written.sum()
        moved = torch.where(self.running, similarity, torch.nan)
        self.statistics["similarity"][self.rows.numbers, :, self.number] = moved

    def _drop_finished_rows(self) -> None:
        kept = self.running.any(-1).nonzero().squeeze(-1)  # asks the device once a step
        if len(kept) < len(self.running):
            assert self.previous is not None
            self.running, self.previous = self.running[kept], self.previous[kept]
            self._compute(self.rows.numbers[kept])

    def _compute(self, numbers: torch.Tensor) -> None:
        """From now on only the rows with these `numbers` `[b]` are computed; in a graph they are all there are."""
        config = self.refiner.config
        layout = self.layout if torch.compiler.is_compiling() else self.layout.of_rows(numbers)
        positions = (layout.is_real.long().cumsum(-1) - 1).clamp(min=0)
        angle_dtype = torch.promote_types(self.states.dtype, torch.float32)
        rotary = rotary_embedding(positions, config.hidden_size // config.num_attention_heads, angle_dtype)
        mask = None  # without padding, everything sees everything
        if self.has_padding and numbers.shape[0]:
            mask = create_bidirectional_mask(config, self.states[: numbers.shape[0]], layout.is_real)
        self.rows = _Rows(numbers, layout, rotary, mask)


def _chunk_similarity(before: torch.Tensor, after: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
    """The cosine similarity of each chunk's hidden states with those before, `[b, N]` from `[b, L, D]` each."""
    before, after = before.float(), after.float()
    products = (before * after, before.square(), after.square())
    dot, first, second = (layout.mean_per_chunk(x.sum(-1), layout.is_real, empty=0.0) for x in products)
    return (dot / (first * second).sqrt().clamp(min=1e-30)).clamp(max=1.0)
