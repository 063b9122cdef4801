"""
What every refiner shares: the interface, what it returns, the chunks it works on; and how one is made known by its
`model_type`.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, ModelOutput, can_return_tuple

from ..hub_model import REFINERS, HubModel, module_name, source_files
from ..rotary import Rotary, rotate


@dataclass
class RefinerOutput(ModelOutput):
    """
    Args:
        hidden_states: `[B, L, D]`; tokens of inactive chunks are bit-identical to the input.
        confidence: FloatTensor `[B, N]` in [0, 1], how sure the refiner is of a chunk; 1 for inactive chunks.
        num_steps: LongTensor `[B, N]`, updates applied; 0 for inactive chunks.
        step_hidden_states: with `output_step_hidden_states=True`, the `[B, L, D]` after each of the steps that any
            chunk took.
        statistics: with `output_statistics=True`, tensors by name, without gradient. `similarity` `[B, N, K]` is a
            chunk's cosine similarity with the step before, NaN where there is none; for others see the refiner.
        orthogonality_loss: with `output_statistics=True`, of a refiner with slots: how far their projections are from
            orthogonal, a scalar with gradient.
    """

    hidden_states: torch.Tensor = None  # type: ignore[assignment]
    confidence: torch.Tensor = None  # type: ignore[assignment]
    num_steps: torch.Tensor = None  # type: ignore[assignment]
    step_hidden_states: tuple[torch.Tensor, ...] | None = None
    statistics: dict[str, torch.Tensor] = None  # type: ignore[assignment]
    orthogonality_loss: torch.Tensor | None = None

    def to(self, device: torch.device) -> "RefinerOutput":
        """The same, with every tensor on `device`; itself if they are there."""
        if self.hidden_states.device == device:
            return self
        steps, loss = self.step_hidden_states, self.orthogonality_loss
        return RefinerOutput(
            hidden_states=self.hidden_states.to(device),
            confidence=self.confidence.to(device),
            num_steps=self.num_steps.to(device),
            step_hidden_states=None if steps is None else tuple(states.to(device) for states in steps),
            statistics={name: value.to(device) for name, value in (self.statistics or {}).items()},
            orthogonality_loss=None if loss is None else loss.to(device),
        )


class ChunkLayout:
    """
    Chunks of consecutive real tokens, counted from each row's first one, so that padding anywhere changes nothing.

    Args:
        batch_size, length: `B` and `L`.
        chunk_size: `C`, tokens in a chunk; the last chunk of a row may have fewer.
        attention_mask: `[B, L]`, 0 for padding; or None.
        device: where the indices live.

    Attributes:
        chunk_size, num_chunks: `C`, and `N = ceil(L / C)`.
        is_real: BoolTensor `[B, L]`.
        chunk_of_token: LongTensor `[B, L]`, -1 for padding.
        positions: LongTensor `[B, N, C]`, the column of each chunk's tokens; `L` where the chunk has no token.
    """

    def __init__(
        self,
        batch_size: int,
        length: int,
        chunk_size: int,
        attention_mask: torch.Tensor | None = None,
        device: torch.device | None = None,
    ):
        self.chunk_size = chunk_size
        self.num_chunks = (length + chunk_size - 1) // chunk_size  # (-(-a // b) is another number in onnx)
        slots = torch.arange(self.num_chunks * chunk_size, device=device).expand(batch_size, -1)
        if attention_mask is None:
            self.is_real = torch.ones(batch_size, length, dtype=torch.bool, device=device)
            rank = slots[:, :length]
            positions = slots.clamp(max=length)
        else:
            self.is_real = attention_mask.bool()
            rank = self.is_real.long().cumsum(-1) - 1
            columns = torch.arange(length, device=device).expand(batch_size, -1)
            # Row by row: slot `rank` holds column `l`. Padding writes into one slot more, which is cut off.
            positions = torch.full((batch_size, slots.shape[1] + 1), length, dtype=torch.long, device=device)
            target = torch.where(self.is_real, rank, slots.shape[1])
            positions = positions.scatter(1, target, torch.where(self.is_real, columns, length))[:, :-1]
        self.chunk_of_token = torch.where(self.is_real, rank // chunk_size, -1)
        self.positions = positions.reshape(batch_size, self.num_chunks, chunk_size)

    def of_rows(self, index: torch.Tensor) -> "ChunkLayout":
        """The layout of the rows in `index` `[b]` alone."""
        rows = copy.copy(self)
        for name in ("is_real", "chunk_of_token", "positions"):
            setattr(rows, name, getattr(self, name)[index])
        return rows

    def mean_per_chunk(self, values: torch.Tensor, where: torch.Tensor, empty: float) -> torch.Tensor:
        """
        Mean of `values` `[B, L]` over each chunk's tokens in `where` (BoolTensor `[B, L]`), as `[B, N]` in float32;
        `empty` for a chunk with none.
        """
        where = where & self.is_real
        chunk = self.chunk_of_token.clamp(min=0)
        zeros = torch.zeros(values.shape[0], self.num_chunks, device=values.device)
        total = zeros.scatter_add(1, chunk, torch.where(where, values.float(), 0.0))
        count = zeros.scatter_add(1, chunk, where.float())
        return torch.where(count > 0, total / count.clamp(min=1), empty)

    def any_per_chunk(self, where: torch.Tensor) -> torch.Tensor:
        """BoolTensor `[B, N]`: which chunks have a real token in `where` `[B, L]`."""
        return self.mean_per_chunk(where, where, 0.0) > 0

    def to_tokens(self, per_chunk: torch.Tensor) -> torch.Tensor:
        """Each token's value `[B, L]` of a chunk-wise `[B, N]`; 0 or False for padding."""
        per_token = per_chunk.gather(1, self.chunk_of_token.clamp(min=0))
        if per_token.dtype == torch.bool:  # (onnxruntime has no `where` for these)
            return per_token & self.is_real
        return torch.where(self.is_real, per_token, torch.zeros_like(per_token))

    def gather(self, hidden_states: torch.Tensor, active: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The `A` chunks in `active` (LongTensors `[A]`: rows and numbers) of `hidden_states` `[B, L, D]`:
        `[A, C, D]`, zeros where a chunk has no token."""
        row, length = active[0], hidden_states.shape[1]
        columns = self.positions[active]  # [A, C]
        chunks = hidden_states[row[:, None], columns.clamp(max=length - 1)]
        return chunks.masked_fill((columns == length)[..., None], 0.0)

    def scatter(
        self, hidden_states: torch.Tensor, chunks: torch.Tensor, active: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """A copy of `hidden_states` `[B, L, D]` with `chunks` `[A, C, D]` in place of the active ones. Positions a
        chunk lacks are not written."""
        batch, length, size = hidden_states.shape
        row, columns = active[0], self.positions[active]
        # Missing positions go to one spare row at the end.
        target = torch.where(columns < length, row[:, None] * length + columns, batch * length)
        flat = torch.cat([hidden_states.reshape(-1, size), hidden_states.new_zeros(1, size)])
        flat = flat.index_put((target.flatten(),), chunks.flatten(0, 1).to(flat.dtype))
        return flat[:-1].view_as(hidden_states)


class PreTrainedRefiner(HubModel, PreTrainedModel):
    """
    Base class of refiners, yours too. `config` has a `hidden_size` and a `chunk_size`, and `forward` returns a
    [`RefinerOutput`] from

        hidden_states: `[B, L, D]`, in any float dtype; the recursion runs in the refiner's own.
        active_chunks: BoolTensor `[B, N]`, the chunks to refine; all by default.
        attention_mask: `[B, L]`, 0 for padding. Positions and chunks are counted from a row's first real token.
        max_steps: fewer or more recursion steps than `config.max_recursive_steps`.
        output_step_hidden_states, output_statistics: see [`RefinerOutput`].

    `return_dict=False`, and `config.return_dict`, are taken care of here: they give a tuple, as of any model.

    In a graph (`torch.compile`, `torch.export`) neither shapes nor the number of steps can depend on values: where
    `torch.compiler.is_compiling()`, the refiners of this package compute every chunk in every step, and chunks that
    are inactive or have stopped keep their states. The results are the same.

    Attributes:
        takes_layout: whether `forward` has a `layout` for the batch's [`ChunkLayout`], which is then made only once.
    """

    takes_layout: ClassVar[bool] = False
    base_model_prefix = ""
    main_input_name = "hidden_states"
    auto_classes = ("AutoModel",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.takes_layout = "layout" in inspect.signature(cls.forward).parameters
            cls.forward = can_return_tuple(cls.forward)

    def chunks_to_refine(
        self,
        hidden_states: torch.Tensor,
        active_chunks: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layout: ChunkLayout | None = None,
    ) -> tuple[ChunkLayout, torch.Tensor]:
        """
        Which token of `hidden_states` `[B, L, D]` belongs to which chunk (`layout`, if there is one on their device),
        and BoolTensor `[B, N]`: the chunks with a real token, of those in `active_chunks` if given.

        Raises:
            ValueError: for hidden states of another width than the refiner's, or masks of the wrong shape.
        """
        batch, length, size = hidden_states.shape
        if size != self.config.hidden_size:
            raise ValueError(
                f"The hidden states are {size} wide, the refiner has hidden_size={self.config.hidden_size}: "
                f"build it with hidden_size={size}."
            )
        if attention_mask is not None and attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch, length)}: 0 for padding."
            )
        if (
            layout is None
            or layout.is_real.device != hidden_states.device
            or layout.chunk_size != self.config.chunk_size
        ):
            layout = ChunkLayout(batch, length, self.config.chunk_size, attention_mask, hidden_states.device)
        active = layout.any_per_chunk(layout.is_real)
        if active_chunks is None:
            return layout, active
        if active_chunks.shape != active.shape:
            raise ValueError(
                f"active_chunks has shape {tuple(active_chunks.shape)}, expected {tuple(active.shape)} for "
                f"{length} tokens in chunks of {self.config.chunk_size}."
            )
        return layout, active & active_chunks


class RefinerAttention(nn.Module):
    """Bidirectional multi-head attention through the transformers attention interface, of width `size`."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: PreTrainedConfig, size: int):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, rotary: Rotary, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output for `hidden_states` `[B, L, size]`, and the heads side by side before the output projection."""
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (proj(hidden_states).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, rotary), rotate(key, rotary)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [B, heads, L, head_dim]
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0)
        output = output.reshape(hidden_states.shape)
        return self.o_proj(output), output


def refine(
    refiner: PreTrainedModel, hidden_states: torch.Tensor, layout: ChunkLayout | None, **arguments: Any
) -> RefinerOutput:
    """Calls `refiner`, with the `layout` if it takes one; the output is no tuple, whatever its config says."""
    if hasattr(refiner, "takes_layout"):  # a `PreTrainedRefiner` (not by class: remote code may load it twice)
        arguments["return_dict"] = True
    if getattr(refiner, "takes_layout", False):
        arguments["layout"] = layout
    return refiner(hidden_states, **arguments)


# --- Refiners by `model_type` ---


def register_refiner(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """
    Makes your own refiner known by its `model_type`: in `from_backbone`, in [`LLaDATRMConfig`], and for `AutoConfig`
    and `AutoModel`. Its code is saved with the checkpoints that hold it, if it stands in a file (not in a notebook)
    that imports only torch, transformers, names of this package (`from llada_trm_hf import ...`) and siblings (`from
    .sibling import ...`).

    Args:
        config_class: with a `model_type` of its own, a `hidden_size` and a `chunk_size`.
        model_class: a model with the interface of [`PreTrainedRefiner`], which it may derive from, and
            `config_class` as its `config_class`.

    Raises:
        ValueError: for a `model_type` that is missing or taken, classes that do not belong together, or a file with
            the name of one of the package's.
    """
    model_type, name = config_class.model_type, config_class.__name__
    if not model_type:
        raise ValueError(f"{name} needs a model_type of its own.")
    # By name: running a notebook's cell again, or loading two checkpoints with the class, makes another class of it.
    taken = [CONFIG_MAPPING[model_type]] if model_type in CONFIG_MAPPING else []
    taken += [REFINERS[model_type].config_class] if model_type in REFINERS else []
    for known in taken:
        if known.__name__ != name:
            raise ValueError(f"{name}.model_type={model_type!r} is taken by {known.__name__}: choose another.")
    if model_class.config_class is not config_class:
        raise ValueError(f"{model_class.__name__}.config_class must be {name}, got {model_class.config_class}.")
    if module_name(model_class) is not None:
        source_files(model_class)  # what cannot be saved later is refused now
    if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
        # Not as remote code: the Auto classes would take it for the code of every other checkpoint too.
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
    REFINERS[model_type] = model_class
