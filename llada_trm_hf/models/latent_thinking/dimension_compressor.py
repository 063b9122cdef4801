"""The dimension compressor: one matrix that takes hidden states to fewer dimensions and, transposed, back."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import distributed, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from ..hub_model import HubModel, check_fields, with_device_hooks


class DimensionCompressorConfig(PreTrainedConfig):
    r"""
    Configuration of [`DimensionCompressor`].

    Args:
        hidden_size (`int`, defaults to 2048): Width of the hidden states, `D`; that of the language model (2048 for
            SmolLM3-3B).
        compressed_size (`int`, defaults to 256): Width they are compressed to, `D'`.
        backbone_name_or_path (`str`, *optional*): The language model whose hidden states it was fitted to.

    Raises:
        ValueError: unless 1 <= compressed_size <= hidden_size.
    """

    model_type = "dimension_compressor"

    hidden_size: int = 2048
    compressed_size: int = 256
    backbone_name_or_path: str | None = None

    def __post_init__(self, **kwargs):
        check_fields(self)
        if not 1 <= self.compressed_size <= self.hidden_size:
            raise ValueError(
                f"compressed_size must be between 1 and hidden_size={self.hidden_size}, got {self.compressed_size}."
            )
        super().__post_init__(**kwargs)


@dataclass
class CompressorOutput(ModelOutput):
    """
    Args:
        loss: scalar, mean squared error of the reconstruction over real tokens and channels.
        compressed: `[..., D']`, zeros at padding.
        reconstructed: `[..., D]`, zeros at padding.
    """

    loss: torch.Tensor = None  # type: ignore[assignment]
    compressed: torch.Tensor = None  # type: ignore[assignment]
    reconstructed: torch.Tensor = None  # type: ignore[assignment]


@dataclass
class PCAFit:
    """
    What `fit_pca` found in the data.

    Args:
        eigenvalues: float64 `[D]`, descending: the mean square of the hidden states along each direction. A
            compressor of width `d` keeps the sum of the first `d` and makes a squared error of the sum of the others.
        variance_kept: share of the (uncentred) mean square that the compressor keeps, in [0, 1].
        mse: the mean squared error per channel it leaves, the least any compressor of this width can.
        num_samples: hidden states seen, on all processes.
    """

    eigenvalues: torch.Tensor
    variance_kept: float
    mse: float
    num_samples: int


class DimensionCompressor(HubModel, PreTrainedModel):
    """
    A weight-tied linear autoencoder without bias: `compress(x) = x Wᵀ`, `decompress(c) = c W`, W of shape `[D', D]`.

    It starts from random orthogonal rows; `fit_pca` finds the optimal W in one pass, gradient descent on `loss`
    approaches it.
    """

    config: DimensionCompressorConfig
    config_class = DimensionCompressorConfig
    base_model_prefix = ""
    main_input_name = "hidden_states"
    auto_classes = ("AutoModel",)

    def __init__(self, config: DimensionCompressorConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.compressed_size, config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            # In float32: there is no QR decomposition in half precision.
            rows = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
            init.copy_(self.weight, nn.init.orthogonal_(rows))

    @with_device_hooks
    def compress(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., D']`, in the dtype of the weight."""
        return self._compress(hidden_states)

    @with_device_hooks
    def decompress(self, compressed: torch.Tensor) -> torch.Tensor:
        """`[..., D']` to `[..., D]`."""
        return self._decompress(compressed)

    def _compress(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self._check_width(hidden_states)
        return nn.functional.linear(hidden_states.to(self.weight.dtype), self.weight)

    def _decompress(self, compressed: torch.Tensor) -> torch.Tensor:
        return compressed.to(self.weight.dtype) @ self.weight

    @can_return_tuple
    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CompressorOutput:
        """
        Args:
            hidden_states: `[..., D]`, in any float dtype.
            attention_mask: `[...]`, 0 for padding, which counts for nothing whatever it holds.

        Raises:
            ValueError: for hidden states of another width, or a mask of another shape.
        """
        if attention_mask is not None:
            real = _check_mask(hidden_states, attention_mask)[..., None]
            hidden_states = hidden_states.masked_fill(~real, 0.0)
        compressed = self._compress(hidden_states)
        reconstructed = self._decompress(compressed)
        dtype = torch.promote_types(reconstructed.dtype, torch.float32)
        error = reconstructed.to(dtype) - hidden_states.to(dtype)
        if attention_mask is None:
            loss = error.square().mean()
        else:
            loss = error.square().sum() / (real.sum().clamp(min=1) * self.config.hidden_size)
        return CompressorOutput(loss=loss, compressed=compressed, reconstructed=reconstructed)

    @torch.no_grad()
    def fit_pca(self, batches: Iterable[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]) -> PCAFit:
        """
        Sets the weight to the best one there is for the data: the leading eigenvectors of the second-moment matrix
        `mean(x xᵀ)` (no mean is subtracted, since the compressor has no bias).

        One pass; the matrix `[D, D]` is accumulated in float64 on the device of the weight. With `torch.distributed`
        initialised, each process passes its own share of the data (possibly none) and all get the same weight.

        Args:
            batches: hidden states `[..., D]`, or pairs of them and a mask `[...]` that is 0 for padding.

        Raises:
            ValueError: for hidden states of another width, a NaN or infinity at a real token, no data, fewer samples
                than `D'`, or an offloaded compressor. The weight is unchanged then.
        """
        if self.weight.is_meta:
            raise ValueError("The weight is offloaded: fit the compressor on a device, and offload it afterwards.")
        size, rank = self.config.hidden_size, self.config.compressed_size
        # Row D holds the number of samples, so that one reduction carries everything.
        totals = torch.zeros(size + 1, size, dtype=torch.float64, device=self.weight.device)
        broken = None
        for number, batch in enumerate(batches):
            states, mask = (batch, None) if isinstance(batch, torch.Tensor) else batch
            self._check_width(states)
            samples = states.reshape(-1, size) if mask is None else states[_check_mask(states, mask)]
            samples = samples.to(totals)
            if broken is None and not samples.isfinite().all():
                broken = number
            totals[:size].addmm_(samples.T, samples)
            totals[size, 0] += len(samples)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(totals)
        # Only now, when no process waits for another: the sums of all are NaN if those of one are.
        if not totals.isfinite().all():
            where = "those of another process" if broken is None else f"batch {broken} (counted from 0)"
            raise ValueError(f"The hidden states hold NaN or infinite values: {where}.")

        num_samples = int(totals[size, 0])
        if num_samples < rank:
            found = f"only {num_samples} of them" if num_samples else "none"
            raise ValueError(
                f"fit_pca needs at least compressed_size={rank} hidden states, got {found}. Pass more data"
                + (", or choose a smaller compressed_size." if num_samples else ".")
            )
        values, vectors = torch.linalg.eigh(totals[:size] / num_samples)
        values, directions = values.flip(0).clamp(min=0), vectors.flip(1)[:, :rank].T
        # An eigenvector has no sign: its largest entry is made positive, so that the same data give the same weight.
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.weight.copy_(directions * largest.sign())
        lost = float(values[rank:].sum())
        kept = float(values[:rank].sum())
        share = kept / (kept + lost) if kept else 1.0
        return PCAFit(eigenvalues=values, variance_kept=share, mse=lost / size, num_samples=num_samples)

    def _check_width(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"The hidden states are {hidden_states.shape[-1]} wide, the compressor takes "
                f"hidden_size={self.config.hidden_size}: build it with hidden_size={hidden_states.shape[-1]}."
            )


def _check_mask(hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask as BoolTensor `[...]`."""
    if mask.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}, expected {tuple(hidden_states.shape[:-1])} for hidden states of "
            f"shape {tuple(hidden_states.shape)}."
        )
    return mask.to(hidden_states.device).bool()
