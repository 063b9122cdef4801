"""
The TRM refiner: the Tiny Recursive Model's own recursion (arXiv 2510.04871) over the hidden states of a whole row,
which it reads again in every step, so that more steps never lead away from them.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from ..hub_model import check_at_least_one, check_fields
from ..recursion_depth import RecursionDepth, RecursionDepthConfig, free_steps
from ..rotary import Rotary, rotary_embedding
from .modeling_refiner import ChunkLayout, PreTrainedRefiner, RefinerAttention, RefinerOutput


class TRMRefinerConfig(RecursionDepthConfig):
    r"""
    Configuration of [`TRMRefiner`].

    Args:
        hidden_size (`int`, defaults to 2048): Width of the hidden states it refines, `D`; that of the backbone.
        chunk_size (`int`, defaults to 16): Tokens in a chunk, `C`: what is active, converges and is counted together.
        recursion_size (`int`, *optional*): Width of the recursion, `w`; `D / 8` within 64 and 512 if not given.
        num_hidden_layers (`int`, defaults to 1): Blocks of the network that is applied again and again.
        num_attention_heads (`int`, *optional*): Attention heads of each, `w / 64` and at least 4 if not given.
        intermediate_size (`int`, *optional*): Width of their SwiGLU, `3 * w` if not given.
        n_latent_steps (`int`, defaults to 1): Updates of the latent z before one of y, in each recursion step.
        max_recursive_steps (`int`, defaults to 16): Largest number of recursion steps, `K`.
        convergence_threshold (`float`, defaults to 0.05): A chunk stops when its y changes by less than this, relative
            to its norm. 0 never stops.
        damping (`float`, defaults to 0.0): Share of the old state that every update of y and z keeps.
        noise_std (`float`, defaults to 0.0): Standard deviation of the Gaussian noise on z before each step, in
            training and where there are several trajectories.
        num_trajectories (`int`, defaults to 1): How many noisy recursions a row gets where nothing is trained; the
            chunk of the one that is nearest to its fixed point (the smallest residual) is kept.
        trained_steps (`int`, defaults to 4): In training, the steps with gradient.
        max_free_steps (`int`, defaults to 8): In training, the most steps without gradient before them.
        free_steps_probability (`float`, defaults to 0.5): Share of the batches in training with such steps, a random
            number from 1 to `max_free_steps`.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights that write to the
            hidden states; the others start at `1 / sqrt(inputs)`.

    Raises:
        ValueError: for a size below 1, heads that do not divide the width into even parts, or another value out of
            range.
    """

    model_type = "trm_refiner"

    hidden_size: int = 2048
    chunk_size: int = 16
    recursion_size: int = None  # type: ignore[assignment]
    num_hidden_layers: int = 1
    num_attention_heads: int = None  # type: ignore[assignment]
    intermediate_size: int = None  # type: ignore[assignment]
    n_latent_steps: int = 1
    max_recursive_steps: int = 16
    convergence_threshold: float = 0.05
    damping: float = 0.0
    noise_std: float = 0.0
    num_trajectories: int = 1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_fields(self)
        if self.recursion_size is None:
            self.recursion_size = min(max(self.hidden_size // 8, 64), 512)
        if self.num_attention_heads is None:
            self.num_attention_heads = max(self.recursion_size // 64, 4)
        if self.intermediate_size is None:
            self.intermediate_size = 3 * self.recursion_size
        sizes = ("hidden_size", "chunk_size", "recursion_size", "num_hidden_layers", "num_attention_heads")
        check_at_least_one(self, *sizes, "intermediate_size", "n_latent_steps", "max_recursive_steps")
        check_at_least_one(self, "num_trajectories")
        if self.recursion_size % (2 * self.num_attention_heads):  # rotary embeddings turn pairs of channels
            raise ValueError(
                f"recursion_size={self.recursion_size} must be a multiple of {2 * self.num_attention_heads}, for "
                f"num_attention_heads={self.num_attention_heads} heads of even width."
            )
        if self.convergence_threshold < 0:
            raise ValueError(f"convergence_threshold must be 0 or more, got {self.convergence_threshold}.")
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping must be at least 0 and below 1, got {self.damping}.")
        if self.noise_std < 0:
            raise ValueError(f"noise_std must be 0 or more, got {self.noise_std}.")
        if self.num_trajectories > 1 and not self.noise_std:
            raise ValueError(f"num_trajectories={self.num_trajectories} without noise_std would all be the same.")
        super().__post_init__(**kwargs)


class TRMRefinerBlock(GradientCheckpointingLayer):
    """A post-norm transformer block; its norms have no weights."""

    def __init__(self, config: TRMRefinerConfig):
        super().__init__()
        size, width = config.recursion_size, config.intermediate_size
        self.self_attn = RefinerAttention(config, size)
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, states: torch.Tensor, rotary: Rotary, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`[b, L, w]` to `[b, L, w]`."""
        states = _norm(states + self.self_attn(states, rotary, attention_mask)[0])
        return _norm(states + self.down_proj(nn.functional.silu(self.gate_proj(states)) * self.up_proj(states)))


class TRMRefiner(PreTrainedRefiner):
    """
    Refines hidden states h with a recursion over the whole row, so that chunks inform each other; it writes to the
    active chunks only. `x = W_in RMSNorm(h)` is read in every step; the latents y and z `[B, L, w]` start as learned
    vectors. A recursion step is `n_latent_steps` times `z <- f(x + y + z)`, then `y <- f(y + z)`, with the same
    weights f in all of them. The result is `h + W_out y`, always from the original h.

    A chunk stops after a step in which its y changed by less than `convergence_threshold`, relative to its norm (the
    residual); what it writes stays as it is then. Rows in which every chunk has stopped leave the batch. In training
    nothing stops, and the depth is random (see [`RecursionDepth`]): that is why more steps than trained with do no
    harm. A chunk's confidence is the mean of its tokens', read from y.

    Statistics: `residual` `[B, N, K]`, and `similarity` `[B, N, K]`, the cosine of a chunk's y with that of the step
    before; NaN where a step was not run.
    """

    config: TRMRefinerConfig
    config_class = TRMRefinerConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["TRMRefiner"]

    def __init__(self, config: TRMRefinerConfig):
        super().__init__(config)
        width = config.recursion_size
        self.input_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.y_start = nn.Parameter(torch.empty(width))
        self.z_start = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(TRMRefinerBlock(config) for _ in range(config.num_hidden_layers))
        self.output_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.confidence = nn.Linear(width, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.normal_(self.y_start, std=1.0)
            init.normal_(self.z_start, std=1.0)
        elif module is self.output_proj:
            # Near zero, not zero: an untrained refiner hardly changes the model, yet every weight gets a gradient.
            init.normal_(module.weight, std=0.01 * self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)

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
        """
        See [`PreTrainedRefiner`]. In training, `step_hidden_states` are those of the steps with gradient, and
        `max_steps` is their number.

        Raises ValueError for states of another width or masks of the wrong shape.
        """
        layout, active = self.chunks_to_refine(hidden_states, active_chunks, attention_mask, layout)
        depth = RecursionDepth.of(self, max_steps)
        recursion = _Recursion(self, hidden_states, layout, active, attention_mask is not None)
        recursion.run(depth, output_step_hidden_states, output_statistics)
        written = layout.to_tokens(active)[..., None]  # [B, L, 1]

        def tokens(y: torch.Tensor) -> torch.Tensor:
            """The hidden states `[B, L, D]` that y `[b, L, w]` says."""
            change = recursion.of_batch(self.output_proj(y), 0.0)
            return torch.where(written, (hidden_states + change).to(hidden_states.dtype), hidden_states)

        per_token = self.confidence(recursion.written).squeeze(-1).float().sigmoid()  # [b, L]
        confidence = layout.mean_per_chunk(recursion.of_batch(per_token, 1.0), layout.is_real, empty=1.0)
        confidence = torch.where(active, confidence, 1.0)
        if not recursion.rows.shape[0] and torch.is_grad_enabled():
            # With nothing to refine, every weight still gets a (zero) gradient: DDP needs it.
            confidence = confidence + sum((0.0 * parameter).sum() for parameter in self.parameters())
        return RefinerOutput(
            hidden_states=tokens(recursion.written) if depth.free + depth.steps else hidden_states,
            confidence=confidence,
            num_steps=torch.where(active, recursion.of_batch(recursion.num_steps, 0), 0),
            step_hidden_states=tuple(map(tokens, recursion.steps)) if output_step_hidden_states else None,
            statistics=recursion.statistics(depth) if output_statistics else {},
        )

    def recursion_step(
        self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, rotary: Rotary, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y and z after one recursion step (TRM paper, figure 3); all `[b, L, w]`."""
        damping = self.config.damping
        for _ in range(self.config.n_latent_steps):
            updated = self._network(x + y + z, rotary, attention_mask)
            z = torch.lerp(updated, z, damping) if damping else updated
        updated = self._network(y + z, rotary, attention_mask)
        return torch.lerp(updated, y, damping) if damping else updated, z

    def _network(self, states: torch.Tensor, rotary: Rotary, attention_mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            states = layer(states, rotary, attention_mask)
        return states


class _Recursion:
    """
    The latents of the rows with an active chunk, each `T` times for `T` trajectories, on their way through the steps.
    Rows in which every chunk has stopped are not computed any more, except in a compiled or exported graph, whose
    number of rows cannot depend on their values.

    Attributes:
        rows: LongTensor `[b]`, the numbers in the batch of the rows with an active chunk; all in a graph.
        written: `[b * T, L, w]`, the y that chunks write: the last, or that of the step they stopped after. After
            `run`, `[b, L, w]`, like the next two.
        num_steps: LongTensor `[b * T, N]`, steps taken.
        residual: `[b * T, N]`, of the last step taken.
        steps: `written` after each step with gradient, if asked for.
        history: residual and similarity of each step, `[b * T, N]` each, NaN for a chunk that did not take it; if
            asked for.
    """

    def __init__(
        self,
        refiner: TRMRefiner,
        hidden_states: torch.Tensor,
        layout: ChunkLayout,
        active: torch.Tensor,
        has_padding: bool,
    ):
        self.refiner, self.has_padding, self.batch_size = refiner, has_padding, active.shape[0]
        config, self.in_graph = refiner.config, torch.compiler.is_compiling()
        self.stops = config.convergence_threshold > 0 and not refiner.training
        self.trajectories = 1 if refiner.training or self.in_graph else config.num_trajectories
        if self.in_graph:
            self.rows, copies = torch.arange(active.shape[0], device=active.device), None
        else:
            self.rows = active.any(-1).nonzero().squeeze(-1)  # asks the device
            copies = self.rows.repeat_interleave(self.trajectories)
            hidden_states, layout, active = hidden_states[copies], layout.of_rows(copies), active[copies]
        self.layout = self.rows_layout = layout
        # Zeros at padding: NaN there would reach real tokens, even with an attention weight of 0.
        states = hidden_states.to(refiner.dtype).masked_fill(~layout.is_real[..., None], 0.0)
        x = refiner.input_proj(_norm(states))
        self.written = refiner.y_start.to(x.dtype).expand_as(x)
        self.num_steps = torch.zeros_like(active, dtype=torch.long)
        self.residual = torch.full(active.shape, torch.inf, device=active.device)
        self.steps: list[torch.Tensor] = []
        self.history: list[tuple[torch.Tensor, torch.Tensor]] = []
        # What follows is of the `r` rows that are still computed.
        self.numbers = torch.arange(x.shape[0], device=x.device)
        self.running = active  # BoolTensor [r, N]
        self.x, self.y, self.z = x, self.written, refiner.z_start.to(x.dtype).expand_as(x)
        self._attend(layout)

    def run(self, depth: RecursionDepth, keep_steps: bool, keep_history: bool) -> None:
        """Takes the steps, and keeps the best trajectory of each chunk."""
        if not self.rows.shape[0]:  # attention takes no empty batch
            self.steps = [self.written] * depth.steps if keep_steps else []
            return
        if depth.free:
            with free_steps(self.y.device):
                for _ in range(depth.free):
                    self._step(keep_history)
            # The start vectors get a (zero) gradient in every batch: DDP needs it.
            self.y = self.y + 0.0 * self.refiner.y_start.to(self.y.dtype)
            self.z = self.z + 0.0 * self.refiner.z_start.to(self.z.dtype)
        for _ in range(depth.steps):
            if not self.numbers.shape[0]:
                break
            self._step(keep_history)
            if keep_steps:
                self.steps.append(self.written)
        if self.trajectories > 1:
            self._keep_the_best()

    def of_batch(self, values: torch.Tensor, otherwise: float) -> torch.Tensor:
        """`[B, ...]` from the `[b, ...]` of the rows with an active chunk."""
        if self.in_graph:
            return values
        whole = values.new_full((self.batch_size, *values.shape[1:]), otherwise)
        return whole.index_copy(0, self.rows, values)

    def statistics(self, depth: RecursionDepth) -> dict[str, torch.Tensor]:
        """`residual` and `similarity` `[B, N, K]` from the history; NaN for steps that no row took."""
        unknown = torch.full_like(self.residual, torch.nan)
        missing = depth.free + depth.steps - len(self.history)
        statistics = {}
        for number, name in enumerate(("residual", "similarity")):
            steps = [values[number] for values in self.history] + [unknown] * missing
            curve = torch.stack(steps, dim=-1) if steps else unknown[..., None][..., :0]
            statistics[name] = self.of_batch(curve, torch.nan)
        return statistics

    def _step(self, keep_history: bool) -> None:
        refiner, numbers = self.refiner, self.numbers
        z, noise = self.z, refiner.config.noise_std
        if noise and (refiner.training or self.trajectories > 1):
            z = z + noise * torch.randn_like(z)
        y, self.z = refiner.recursion_step(self.x, self.y, z, self.rotary, self.mask)
        before, self.y = self.y, y
        if self.stops:
            moving = self.layout.to_tokens(self.running)[..., None]  # [r, L, 1]
            self.written = self.written.index_copy(0, numbers, torch.where(moving, y, self.written[numbers]))
        else:
            self.written = y
        self.num_steps = self.num_steps.index_add(0, numbers, self.running.long())
        if not (self.stops or keep_history or self.trajectories > 1):
            return
        residual, similarity = _change(before.detach(), y.detach(), self.layout)
        residual = torch.where(self.running, residual, self.residual[numbers])
        self.residual = self.residual.index_copy(0, numbers, residual)
        if keep_history:
            unknown = torch.full_like(self.residual, torch.nan)
            curves = (torch.where(self.running, values, torch.nan) for values in (residual, similarity))
            of_residual, of_similarity = (unknown.index_copy(0, numbers, values) for values in curves)
            self.history.append((of_residual, of_similarity))
        if self.stops:
            self.running = self.running & (residual >= refiner.config.convergence_threshold)
            if not self.in_graph:
                self._drop_finished_rows()

    def _drop_finished_rows(self) -> None:
        kept = self.running.any(-1).nonzero().squeeze(-1)  # asks the device once a step
        if len(kept) < len(self.numbers):
            self.numbers, self.running, self.x = self.numbers[kept], self.running[kept], self.x[kept]
            self.y, self.z = self.y[kept], self.z[kept]
            self._attend(self.layout.of_rows(kept))

    def _attend(self, layout: ChunkLayout) -> None:
        """Angles and mask of the rows that are computed, whose layout is `layout`."""
        config, self.layout = self.refiner.config, layout
        positions = (layout.is_real.long().cumsum(-1) - 1).clamp(min=0)
        angle_dtype = torch.promote_types(self.x.dtype, torch.float32)
        self.rotary = rotary_embedding(positions, config.recursion_size // config.num_attention_heads, angle_dtype)
        self.mask = None  # without padding, everything sees everything
        if self.has_padding and self.x.shape[0]:
            self.mask = create_bidirectional_mask(config, self.x, layout.is_real)

    def _keep_the_best(self) -> None:
        """Of each chunk's trajectories, the one with the smallest residual."""
        each = (-1, self.trajectories)
        best = self.residual.unflatten(0, each).argmin(1, keepdim=True)  # [b, 1, N]
        first = torch.arange(0, self.residual.shape[0], self.trajectories, device=best.device)
        of_tokens = self.rows_layout.of_rows(first).to_tokens(best.squeeze(1))  # [b, L]

        def of_chunks(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(0, each).take_along_dim(best, 1).squeeze(1)

        def of_latents(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(0, each).take_along_dim(of_tokens[:, None, :, None], 1).squeeze(1)

        self.written, self.steps = of_latents(self.written), [*map(of_latents, self.steps)]
        self.num_steps, self.residual = of_chunks(self.num_steps), of_chunks(self.residual)
        self.history = [(of_chunks(residual), of_chunks(similarity)) for residual, similarity in self.history]


def _norm(states: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(states, states.shape[-1:], eps=1e-5)


def _change(before: torch.Tensor, after: torch.Tensor, layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Of each chunk, `[b, N]`: the norm of the change from `before` to `after` `[b, L, w]` relative to that of `after`,
    and their cosine similarity.
    """
    before, after = before.float(), after.float()
    products = ((after - before).square(), after.square(), before.square(), after * before)
    change, norm, norm_before, dot = (layout.mean_per_chunk(p.sum(-1), layout.is_real, empty=0.0) for p in products)
    similarity = dot / (norm * norm_before).sqrt().clamp(min=1e-30)
    return (change / norm.clamp(min=1e-30)).sqrt(), similarity.clamp(max=1.0)
