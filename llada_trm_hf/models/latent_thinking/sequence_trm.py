"""SequenceTRM: a Tiny Recursive Model (arXiv 2510.04871) that reasons over a sequence of compressed hidden states."""

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from ..hub_model import HubModel, check_at_least_one, check_fields, with_device_hooks
from ..recursion_depth import FreeStepsConfig, draw_free_steps, free_steps
from ..rotary import rotary_embedding
from .sequence_trm_layers import (
    LLM_TRM_EPS,
    Halting,
    PackedSequences,
    ReasoningInput,
    SequenceTRMNetwork,
    SequenceTRMOutput,
    SequenceTRMReasoning,
    check_selection,
    relative_change,
)


class SequenceTRMConfig(FreeStepsConfig):
    r"""
    Configuration of [`SequenceTRM`].

    Args:
        hidden_size (`int`, defaults to 256): Width of context, state and prediction, `D'`.
        n_layers (`int`, defaults to 2): Transformer blocks of the network that is applied again and again.
        n_heads (`int`, defaults to 8): Attention heads.
        intermediate_size (`int`, *optional*): Width of the MLP. By default `4 * hidden_size` in the `llm_trm` style,
            and in the `trm` style (SwiGLU) the multiple of 64 above `8/3 * hidden_size`, about as many weights.
        block_style (`str`, defaults to `"trm"`): `"trm"`, the block of the TRM paper (RoPE, SwiGLU, post-norm, no
            biases), or `"llm_trm"`, that of the published llm-trm weights (no positions, GELU, pre-norm, biases).
        n_latent_steps (`int`, defaults to 6): Updates of z in a latent recursion, `n`.
        n_deep_recursions (`int`, defaults to 3): Latent recursions in a supervision step, `T`.
        n_trained_recursions (`int`, defaults to 1): How many of them, the last ones, have gradients; all if there are
            fewer.
        n_supervision_steps (`int`, defaults to 8): Supervision steps, and the most that `reason` takes by default.
        max_free_steps (`int`, defaults to 0): In training, the most supervision steps without gradient before the
            first one of a batch, against getting worse with more steps than trained with. They make learning slower.
        free_steps_probability (`float`, defaults to 0.5): Share of the batches in training with such steps, a random
            number from 1 to `max_free_steps`.
        dropout (`float`, defaults to 0.1): In the `trm` style on the output of attention and MLP, in the `llm_trm`
            style on attention probabilities.
        halt_loss (`str`, defaults to `"bce"`): What the halting probability learns: `"bce"`, whether the cosine
            similarity of prediction and target exceeds `cosine_threshold`, or `"mse"`, the cosine similarity itself.
        cosine_threshold (`float`, defaults to 0.8): See `halt_loss`.
        halt_loss_weight (`float`, defaults to 0.5): Weight of the halting loss.
        halt_bias (`float`, defaults to 0.0): What the halting head's bias starts at. TRM starts at -5, so as not to
            halt before it has learned to; a small model learned less with it (R² 0.26, not 0.44).
        backbone_name_or_path (`str`, *optional*): The language model whose compressed hidden states it was trained on.

    Raises:
        ValueError: for an unknown style or loss, sizes below 1, heads that do not divide the width, or a dropout
            outside [0, 1).
    """

    model_type = "sequence_trm"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}

    hidden_size: int = 256
    n_layers: int = 2
    n_heads: int = 8
    intermediate_size: int = None  # type: ignore[assignment]
    block_style: str = "trm"
    n_latent_steps: int = 6
    n_deep_recursions: int = 3
    n_trained_recursions: int = 1
    n_supervision_steps: int = 8
    dropout: float = 0.1
    halt_loss: str = "bce"
    cosine_threshold: float = 0.8
    halt_loss_weight: float = 0.5
    halt_bias: float = 0.0
    backbone_name_or_path: str | None = None

    def __post_init__(self, **kwargs):
        check_fields(self)
        for name, values in {"block_style": ("trm", "llm_trm"), "halt_loss": ("bce", "mse")}.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be {values[0]!r} or {values[1]!r}, got {getattr(self, name)!r}.")
        if self.intermediate_size is None:
            gated_size = -(-8 * self.hidden_size // 3)
            self.intermediate_size = -(-gated_size // 64) * 64 if self.block_style == "trm" else 4 * self.hidden_size
        sizes = ("hidden_size", "n_layers", "n_heads", "intermediate_size")
        check_at_least_one(self, *sizes, "n_latent_steps", "n_deep_recursions", "n_supervision_steps")
        check_at_least_one(self, "n_trained_recursions")
        # Rotary embeddings turn pairs of channels.
        width = self.n_heads * (2 if self.block_style == "trm" else 1)
        if self.hidden_size % width:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of {width} for n_heads={self.n_heads} in the "
                f"{self.block_style!r} style."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}.")
        super().__post_init__(**kwargs)


class SequenceTRM(HubModel, PreTrainedModel):
    """
    Appends a learned reasoning token to a context `[B, L, D']` and applies one small network to it many times; the
    token's state at the end is the prediction `[B, D']`.

    State y (answer) and z (reasoning) start at zero. A latent recursion updates z `n` times from x + y + z, then y
    from y + z; a supervision step (`forward`) is `T` latent recursions, the last `n_trained_recursions` with
    gradients.

    Two block styles (`config.block_style`). `"trm"` is the paper's block. Its state has a fixed length (post-norm),
    so a linear map takes the context in, where it is normed too, and another one takes the prediction out, which can
    then have any length. `"llm_trm"` holds the published llm-trm weights, which have no such maps, but a norm on the
    state; without positions, they see the context as an unordered bag.
    """

    config: SequenceTRMConfig
    config_class = SequenceTRMConfig
    base_model_prefix = ""
    main_input_name = "context"
    auto_classes = ("AutoModel",)
    accepts_loss_kwargs = False  # the loss is already a mean over samples: the Trainer must not divide it again

    def __init__(self, config: SequenceTRMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.reasoning_token = nn.Parameter(torch.zeros(1, 1, size))
        self.net = SequenceTRMNetwork(config)
        self.halt_head = nn.Linear(size, 1)
        self.output_norm: nn.Module = nn.Identity()
        self.input_head: nn.Module = nn.Identity()
        self.output_head: nn.Module = nn.Identity()
        if config.block_style == "llm_trm":
            self.output_norm = nn.RMSNorm(size, eps=LLM_TRM_EPS)
        else:
            norm = nn.RMSNorm(size, eps=1e-5, elementwise_affine=False)
            self.input_head = nn.Sequential(nn.Linear(size, size, bias=False), norm)
            self.output_head = nn.Linear(size, size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.normal_(self.reasoning_token, std=0.02)
        elif isinstance(module, nn.Linear):
            if module is self.halt_head:
                init.zeros_(module.weight)
            else:
                init.normal_(module.weight, std=module.in_features**-0.5)  # keeps the variance (LeCun)
            if module.bias is not None:
                init.constant_(module.bias, self.config.halt_bias if module is self.halt_head else 0.0)
        elif isinstance(module, nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)

    # --- Recursion ---

    def build_input(self, context: torch.Tensor, mask: torch.Tensor | None = None) -> ReasoningInput:
        """
        Appends the reasoning token to `context` `[B, L, D']`, as the last column. `mask` `[B, L]` is 0 for padding,
        which may stand anywhere and hold anything: it is left out. Positions count a row's real tokens; the reasoning
        token follows the last one. (Asks the device for the lengths, once for all the recursions of a supervision
        step.)

        Raises:
            ValueError: for a context or mask of the wrong shape.
        """
        size = self.config.hidden_size
        if context.ndim != 3 or context.shape[-1] != size:
            raise ValueError(f"The context must have shape [B, L, hidden_size={size}], got {tuple(context.shape)}.")
        batch, length, _ = context.shape
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=context.device)
        elif mask.shape != (batch, length):
            raise ValueError(f"The mask must have shape {(batch, length)}, got {tuple(mask.shape)}.")
        real = nn.functional.pad(mask.to(context.device).bool(), (0, 1), value=True)  # [B, L + 1]
        if torch.compiler.is_compiling():
            sequences, places = PackedSequences.padded(real), torch.arange(real.numel(), device=real.device)
            # Padding is computed, and NaN there would reach real tokens even with an attention weight of 0.
            context = context.masked_fill(~real[:, :-1, None], 0.0)
        else:
            lengths = real.sum(1)
            sequences = PackedSequences.of(lengths)
            before = lengths.cumsum(0) - lengths
            places = real.flatten().nonzero().squeeze(-1)[before[sequences.row] + sequences.position]
        token = self.reasoning_token[0]  # [1, D']
        padded = nn.functional.pad(context.to(token.dtype), (0, 0, 0, 1))
        tokens = self.input_head(padded.flatten(0, 1)[places]).to(token.dtype)
        x = tokens.index_copy(0, sequences.last, token.expand(batch, -1))
        rotary = None
        if self.config.block_style == "trm":
            angle_dtype = torch.promote_types(token.dtype, torch.float32)
            rotary = rotary_embedding(sequences.position, size // self.config.n_heads, angle_dtype)
        return ReasoningInput(x, sequences, rotary, places, real)

    def latent_recursion(
        self, inputs: ReasoningInput, y: torch.Tensor, z: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` times z <- net(x + y + z), then y <- net(y + z) (TRM paper, figure 3). State `[T, D']`; returns y, z."""
        for _ in range(self.config.n_latent_steps):
            z = self._network(inputs.x + y + z, inputs)
        return self._network(y + z, inputs), z

    def deep_recursion(
        self, inputs: ReasoningInput, y: torch.Tensor, z: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All recursions but the last `n_trained_recursions` without gradients. State `[T, D']`; returns y, z."""
        trained = min(self.config.n_trained_recursions, self.config.n_deep_recursions)
        with free_steps(y.device):
            for _ in range(self.config.n_deep_recursions - trained):
                y, z = self.latent_recursion(inputs, y, z)
        for _ in range(trained):
            y, z = self.latent_recursion(inputs, y, z)
        return y, z

    def _network(self, states: torch.Tensor, inputs: ReasoningInput) -> torch.Tensor:
        return self.output_norm(self.net(states, inputs.sequences, inputs.rotary))

    def _read_out(self, inputs: ReasoningInput, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction `[B, D']` and halting logits `[B]` of a state y `[T, D']`."""
        token = y[inputs.sequences.last]
        logits = self.halt_head(token).squeeze(-1)
        # Autocast gives half precision, the state is kept in the dtype of the weights.
        return self.output_head(token).to(y.dtype), logits.to(torch.promote_types(y.dtype, torch.float32))

    # --- Training ---

    @can_return_tuple
    def forward(
        self,
        context: torch.Tensor,
        mask: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
        cosine_threshold: float | None = None,
    ) -> SequenceTRMOutput:
        """
        One supervision step. In training, where a state is not given, a random number of steps without gradient comes
        before it (`config.max_free_steps`).

        Args:
            context: `[B, L, D']`, compressed hidden states, in any float dtype.
            mask: `[B, L]`, 0 for padding.
            y, z: `[B, L + 1, D']`, the state the step before returned; zeros in the first.
            target: `[B, D']`, for the loss.
            cosine_threshold: that of `config.halt_loss="bce"`, if not `config.cosine_threshold`.

        Raises:
            ValueError: for shapes that do not fit together.
        """
        inputs = self.build_input(context, mask)
        batch, length, size = context.shape
        shape = (batch, length + 1, size)
        states = []
        for name, state in (("y", y), ("z", z)):
            if state is not None and state.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(state.shape)}.")
            packed = torch.zeros_like(inputs.x) if state is None else state.flatten(0, 1)[inputs.places]
            states.append(packed.detach())
        if self.training and y is None and z is None:
            with free_steps(inputs.x.device):
                for _ in range(draw_free_steps(self.config)):
                    states = [*self.deep_recursion(inputs, *states)]
        y, z = self.deep_recursion(inputs, *states)
        prediction, halt_logits = self._read_out(inputs, y)

        def padded(state: torch.Tensor) -> torch.Tensor:
            canvas = state.new_zeros(batch * (length + 1), size)
            canvas = canvas.index_copy_(0, inputs.places, state.detach()).view(shape)
            return canvas.masked_fill_(~inputs.real[..., None], 0.0) if torch.compiler.is_compiling() else canvas

        threshold = self.config.cosine_threshold if cosine_threshold is None else cosine_threshold
        return SequenceTRMOutput(
            prediction=prediction,
            halt_logits=halt_logits,
            halt_probability=halt_logits.sigmoid(),
            y=padded(y),
            z=padded(z),
            **({} if target is None else self._losses(prediction, halt_logits, target, threshold)),
        )

    def _losses(
        self, prediction: torch.Tensor, halt_logits: torch.Tensor, target: torch.Tensor, cosine_threshold: float
    ) -> dict[str, Any]:
        """The fields of the output about the loss, in float32 or better. Halting does not pull the prediction."""
        if target.shape != prediction.shape:
            raise ValueError(f"The target must have shape {tuple(prediction.shape)}, got {tuple(target.shape)}.")
        prediction, target = prediction.to(halt_logits.dtype), target.to(halt_logits.dtype)
        mse = nn.functional.mse_loss(prediction, target)
        cosine = nn.functional.cosine_similarity(prediction.detach(), target, dim=-1)
        if self.config.halt_loss == "bce":
            solved = (cosine > cosine_threshold).to(cosine.dtype)
            halt = nn.functional.binary_cross_entropy_with_logits(halt_logits, solved)
        else:
            halt = (halt_logits.sigmoid() - cosine).square().mean()
        return {
            "loss": mse + self.config.halt_loss_weight * halt,
            "loss_components": {"mse": mse.detach(), "halt": halt.detach()},
            "cosine_similarity": cosine,
        }

    # --- Inference ---

    @with_device_hooks
    def reason(
        self,
        context: torch.Tensor,
        mask: torch.Tensor | None = None,
        max_steps: int | None = None,
        halt_threshold: float = 0.5,
        num_trajectories: int = 1,
        noise_std: float = 0.0,
        output_steps: bool = False,
        select_by: str = "halt",
        convergence_threshold: float = 0.0,
    ) -> SequenceTRMReasoning:
        """
        Supervision steps until each sample halts; samples that have halted leave the batch.

        With several trajectories, each adds its own Gaussian noise to z before every step and halts on its own; one is
        kept: that with the highest halting probability at its end (Probabilistic TRM, arXiv 2605.19943), or that with
        the smallest residual, the nearest to a fixed point.

        In grad mode, gradients reach the weights and the context through the latent recursions of each sample's last
        step that have gradients.

        Args:
            context: `[B, L, D']`.
            mask: `[B, L]`, 0 for padding.
            max_steps: the most steps a sample takes, `config.n_supervision_steps` by default.
            halt_threshold: a sample halts when its halting probability exceeds this; 1 never halts.
            num_trajectories: trajectories per sample.
            noise_std: standard deviation of the noise.
            output_steps: also return the result after each step.
            select_by: `"halt"` or `"residual"`, which trajectory is kept.
            convergence_threshold: a sample halts too when its residual is below this; 0 does without.

        Raises:
            ValueError: for `max_steps` or `num_trajectories` below 1, a negative `noise_std` or
                `convergence_threshold`, another `select_by`, or wrong shapes.
        """
        max_steps = self.config.n_supervision_steps if max_steps is None else max_steps
        for name, value in (("max_steps", max_steps), ("num_trajectories", num_trajectories)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name, threshold in (("noise_std", noise_std), ("convergence_threshold", convergence_threshold)):
            if threshold < 0:
                raise ValueError(f"{name} must not be negative, got {threshold}.")
        check_selection(select_by)
        samples = torch.arange(context.shape[0], device=context.device)  # (`len` would fix how many in a graph)
        if num_trajectories > 1:
            context = context.repeat_interleave(num_trajectories, dim=0)
            mask = None if mask is None else mask.repeat_interleave(num_trajectories, dim=0)
        inputs = self.build_input(context, mask)
        halting = Halting(halt_threshold, convergence_threshold)
        # Without halting there is no need to ask the device who has, and in a graph no way to.
        fixed = halting.never or torch.compiler.is_compiling()
        recur = self._recur_all_steps if fixed else self._recur_until_halted
        result, steps = recur(inputs, max_steps, halting, noise_std, output_steps)
        score = result.halt_probability if select_by == "halt" else -result.residual
        best = score.view(-1, num_trajectories).argmax(1) + samples * num_trajectories
        # [B * trajectories, S, ...], one entry per step
        predictions, probabilities = (torch.stack(s, dim=1)[best] for s in zip(*steps)) if steps else (None, None)
        return SequenceTRMReasoning(
            prediction=result.prediction[best],
            halt_probability=result.halt_probability[best],
            num_steps=result.num_steps[best],
            residual=result.residual[best],
            step_predictions=predictions,
            step_halt_probability=probabilities,
        )

    def _reasoning_step(
        self, inputs: ReasoningInput, y: torch.Tensor, z: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A supervision step: y, z, and prediction `[B, D']`, halting probability and residual `[B]` after it."""
        before = y
        y, z = self.deep_recursion(inputs, y, z)
        prediction, logits = self._read_out(inputs, y)
        return y, z, prediction, logits.sigmoid(), relative_change(before, y, inputs.sequences.last)

    def _recur_all_steps(
        self, inputs: ReasoningInput, max_steps: int, halting: Halting, noise_std: float, output_steps: bool
    ) -> tuple[SequenceTRMReasoning, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The same as `_recur_until_halted`, with rows that have halted computed on; they keep their results."""
        y = z = torch.zeros_like(inputs.x)
        num_steps = torch.zeros_like(inputs.sequences.lengths)
        running = torch.ones_like(num_steps, dtype=torch.bool)
        latest: tuple[torch.Tensor, ...] = ()
        steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(1, max_steps + 1):
            if noise_std:
                z = z + noise_std * torch.randn_like(z)
            # Without halting, gradients are those of the last step.
            with free_steps(y.device) if halting.never and step < max_steps else nullcontext():
                y, z, *after = self._reasoning_step(inputs, y, z)
            if latest and not halting.never:
                running = running & ~halting.halts(*latest[1:])
                after = [
                    torch.where(running.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(after, latest)
                ]
            num_steps = num_steps + running
            latest = tuple(after)
            if output_steps:
                steps.append((latest[0].detach(), latest[1].detach()))
            y, z = y.detach(), z.detach()
        prediction, probability, residual = latest
        return SequenceTRMReasoning(prediction, probability, num_steps, residual), steps

    def _recur_until_halted(
        self, inputs: ReasoningInput, max_steps: int, halting: Halting, noise_std: float, output_steps: bool
    ) -> tuple[SequenceTRMReasoning, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The result of each row of `inputs`, and prediction and halting probability after each step if asked for."""
        num_rows = len(inputs.sequences.lengths)
        running = torch.arange(num_rows, device=inputs.x.device)  # the rows still reasoning
        all_tokens = inputs.x
        tokens = torch.arange(len(all_tokens), device=inputs.x.device)  # theirs
        num_steps = torch.zeros_like(running)
        y = z = torch.zeros_like(inputs.x)
        scores = y.new_zeros(num_rows, dtype=torch.promote_types(y.dtype, torch.float32))
        results = [y.new_zeros(num_rows, y.shape[-1]), scores, scores]  # prediction, probability, residual
        latest, steps = results[:2], []
        for step in range(1, max_steps + 1):
            if noise_std:
                # Drawn for every row: whether another one has halted does not change a row's noise.
                z = z + noise_std * torch.randn_like(all_tokens)[tokens]
            y, z, *after = self._reasoning_step(inputs, y, z)
            if output_steps:
                latest = [old.index_copy(0, running, new.detach()) for old, new in zip(latest, after)]
                steps.append((latest[0], latest[1]))
            halted = halting.halts(*after[1:])
            if step == max_steps:
                halted = torch.ones_like(halted)
            kept, stopped = (~halted).nonzero().squeeze(-1), halted.nonzero().squeeze(-1)
            if len(stopped):
                # Written once, when they stop, so that the graphs of earlier steps are free to go.
                rows = running[stopped]
                results = [old.index_copy(0, rows, new[stopped]) for old, new in zip(results, after)]
                num_steps[rows] = step
                if not len(kept):
                    break
                inputs, those = inputs.rows(kept)
                running, tokens, y, z = running[kept], tokens[those], y[those], z[those]
            y, z = y.detach(), z.detach()
        prediction, probability, residual = results
        return SequenceTRMReasoning(prediction, probability, num_steps, residual), steps
