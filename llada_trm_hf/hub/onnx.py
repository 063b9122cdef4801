"""Masked-diffusion models and the parts of a thinker as ONNX graphs, compared with PyTorch before they are kept."""

import importlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models import (
    DimensionCompressor,
    LatentThinker,
    LatentThinkingForCausalLM,
    LLaDAForMaskedDiffusion,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    SequenceTRM,
)
from .files import write_atomically


class Signature(NamedTuple):
    """Names in a graph; those of the model's forward in PyTorch."""

    inputs: tuple[str, str]  # what is read, and its mask
    outputs: tuple[str, ...]


_TOKENS = ("input_ids", "attention_mask")
_THOUGHT = ("halt_probability", "num_steps")
SIGNATURES: dict[type[PreTrainedModel], Signature] = {
    LLaDAForMaskedDiffusion: Signature(_TOKENS, ("logits",)),
    LLaDAMoEForMaskedDiffusion: Signature(_TOKENS, ("logits",)),
    LLaDATRMForMaskedDiffusion: Signature(
        _TOKENS, ("logits", "refinement_steps", "chunk_confidence", "refiner_confidence")
    ),
    DimensionCompressor: Signature(("hidden_states", "attention_mask"), ("compressed", "reconstructed")),
    SequenceTRM: Signature(("context", "mask"), ("prediction", *_THOUGHT)),
    LatentThinker: Signature(("hidden_states", "mask"), ("latents", *_THOUGHT)),
}
# In units of the largest value of an output: float32 has 7 digits, of which a deep model spends some.
TOLERANCE = 1e-4
# A protobuf message ends at 2 GiB: larger weights go to a file of their own.
MOST_WEIGHTS_IN_GRAPH = 2**30
# Batch size, chunks, further tokens, side of the padding.
CHECKED_SHAPES = ((1, 0, 1, None), (1, 2, 0, None), (3, 2, 3, "left"), (3, 3, 1, "right"))


class OnnxExport(NamedTuple):
    """
    What was written, and how it compares with PyTorch over all outputs and the shapes compared. The difference is in
    units of the largest value of the output it was found in.
    """

    files: tuple[str, ...]  # the graph and, if the weights are too large for one file, theirs
    largest_difference: float
    refined_chunks: int  # 0 means that the refiner was not compared


def export_onnx(
    model: PreTrainedModel,
    path: str | os.PathLike,
    max_recursive_steps: int | None = None,
    tolerance: float = TOLERANCE,
) -> OnnxExport:
    """
    Writes the forward pass of a hybrid, refinement included, or of a backbone as an ONNX graph, and compares it with
    PyTorch in onnxruntime. Inputs `input_ids` and `attention_mask`, int64 `[batch, length]` of any size; output
    `logits`, and of a hybrid `refinement_steps`, `chunk_confidence` and `refiner_confidence`, see [`LLaDATRMOutput`].
    All recursion steps are in the graph; a chunk that converges earlier keeps its state, as in PyTorch.

    Of a latent thinker, its parts: a [`LatentThinker`] (`model.thinker`: `hidden_states` `[batch, length, D]` and
    `mask` to `latents`, `halt_probability`, `num_steps`), a [`SequenceTRM`] (its `reason`: `context` `[batch, length,
    D']` and `mask` to `prediction`, `halt_probability`, `num_steps`), a [`DimensionCompressor`] (`hidden_states` and
    `attention_mask` to `compressed`, `reconstructed`).

    Args:
        model: with float32 weights.
        path: of the file; weights above 1 GiB go to `path`.data.
        max_recursive_steps: recursion steps of a refiner, or supervision steps of a thinker; by default its own.
        tolerance: the largest difference from PyTorch that is accepted, in units of the output's largest value.

    Raises:
        ImportError, OSError: see `check_export`.
        ValueError: for another model, other weights than float32, or a wrong number of steps.
        RuntimeError: if the model cannot be written as a graph, or its results differ; no file is left then.
    """
    check_export(path)
    forward = _Forward(model, _check_model(model, max_recursive_steps))
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    with _scratch_folder(os.path.join(folder, f".{name}.export")) as scratch, _exportable(model):
        written = os.path.join(scratch, name)
        _write_graph(forward.eval(), written)
        largest, refined = _compare(forward, written)
        if not largest <= tolerance:  # NaN is not
            raise RuntimeError(
                f"The graph's results differ from PyTorch's by {largest:.3g} of their size, more than the tolerance "
                f"{tolerance:g}, so it is not kept: --tolerance accepts more (in Python, tolerance=...)."
            )
        return OnnxExport(_move(written, path), largest, refined)


def check_export(path: str | os.PathLike) -> None:
    """Raises, before a model is loaded, ImportError without the extra `onnx`, OSError if `path` cannot be a file."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ImportError(f"The export needs {error.name}: pip install 'llada-trm-hf[onnx]'.") from None
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder} for {os.path.basename(path)}: make it first.")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder: name a file, such as {os.path.join(path, 'model.onnx')}.")


def _check_model(model: PreTrainedModel, max_recursive_steps: int | None) -> dict[str, Any]:
    """The further arguments of `model`'s forward."""
    if isinstance(model, LatentThinkingForCausalLM):
        raise ValueError(
            "A LatentThinkingForCausalLM can be exported in parts: pass model.thinker, model.thinker.compressor or "
            "model.thinker.trm."
        )
    if not any(isinstance(model, known) for known in SIGNATURES):
        raise ValueError(
            f"Hybrids, their native backbones and the parts of a latent thinker can be exported; this is a "
            f"{type(model).__name__}."
        )
    if isinstance(model, LatentThinker) and model.config.noise_std:
        raise ValueError(
            f"With noise_std={model.config.noise_std} no two runs are the same: set model.config.noise_std = 0 first."
        )
    others = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"float32"}
    if others:
        found = ", ".join(sorted(others))
        raise ValueError(f"The model has {found} weights: load it with dtype='float32' and without quantization.")
    if max_recursive_steps is None:
        return {}
    if not isinstance(model, (LLaDATRMForMaskedDiffusion, SequenceTRM, LatentThinker)):
        raise ValueError(f"max_recursive_steps is for a hybrid or a thinker; a {type(model).__name__} has no refiner.")
    if max_recursive_steps < 1:
        raise ValueError(f"max_recursive_steps must be at least 1, got {max_recursive_steps}.")
    return {"max_steps": max_recursive_steps}


class _Forward(nn.Module):
    """A model's forward (of a SequenceTRM, `reason`), with tensors in and tensors out."""

    def __init__(self, model: PreTrainedModel, arguments: dict[str, Any]):
        super().__init__()
        self.model, self.arguments = model, arguments
        self.inputs, self.names = next(s for cls, s in SIGNATURES.items() if isinstance(model, cls))

    def forward(self, read: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        run: Any = self.model.reason if isinstance(self.model, SequenceTRM) else self.model
        outputs = run(**dict(zip(self.inputs, (read, mask))), **self.arguments)
        return tuple(outputs[name] for name in self.names)


@contextmanager
def _scratch_folder(path: str) -> Iterator[str]:
    """An empty folder that goes at the end; one that a killed export left goes first."""
    shutil.rmtree(path, ignore_errors=True)
    os.mkdir(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _exportable(model: PreTrainedModel) -> Iterator[None]:
    """`model` in evaluation mode, its experts computed one by one: grouped products have no ONNX operator."""
    training = model.training
    experts = [module for module in model.modules() if isinstance(module, LLaDAMoEForMaskedDiffusion)]
    before = [module.config._experts_implementation for module in experts]
    try:
        for module in experts:
            module.set_experts_implementation("eager")
        model.eval()
        yield
    finally:
        for module, implementation in zip(experts, before):
            module.set_experts_implementation(implementation)
        model.train(training)


def _inputs(forward: _Forward, batch: int, length: int, padding: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Random hidden states, or tokens, half of them masked (none in the last row of several), and a mask: padding grows
    row by row.
    """
    model, generator = forward.model, torch.Generator().manual_seed(length)
    if forward.inputs == _TOKENS:
        read = torch.randint(model.get_input_embeddings().num_embeddings, (batch, length), generator=generator)
        masked = torch.rand(batch, length, generator=generator) < 0.5
        if batch > 1:
            masked[-1] = False
        read = read.masked_fill(masked, model.config.mask_token_id)
    else:
        config = getattr(model.config, "compressor_config", model.config)  # a thinker reads what its compressor does
        read = torch.randn(batch, length, config.hidden_size, generator=generator)
    real = torch.ones(batch, length, dtype=torch.long)
    if padding is not None:
        real = (torch.arange(length) >= torch.arange(batch)[:, None] * length // (2 * batch)).long()
        real = real if padding == "left" else real.flip(-1)
    return read.to(model.device), real.to(model.device)


def _write_graph(forward: _Forward, path: str) -> None:
    example = _inputs(forward, 2, 2 * _chunk_size(forward.model) + 2, "left")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own code
        try:
            program = torch.onnx.export(
                forward,
                args=example,
                dynamo=True,
                dynamic_shapes=tuple({0: "batch", 1: "length"} for _ in example),
                input_names=list(forward.inputs),
                output_names=list(forward.names),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason, name = str(error.__cause__ or error).strip().splitlines()[0], type(forward.model).__name__
            raise RuntimeError(f"This {name} cannot be written as a graph: {reason}") from error
    assert program is not None
    weights = sum(parameter.nbytes for parameter in forward.parameters())
    program.save(path, external_data=weights > MOST_WEIGHTS_IN_GRAPH)


def _compare(forward: _Forward, path: str) -> tuple[float, int]:
    """
    The largest difference between onnxruntime's results and PyTorch's, in units of the output's largest value, and the
    number of chunks refined.
    """
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    zero, refined = torch.zeros((), dtype=torch.double), 0
    differences, sizes = dict.fromkeys(forward.names, zero), dict.fromkeys(forward.names, zero)
    for batch, chunks, more, padding in CHECKED_SHAPES:
        inputs = _inputs(forward, batch, chunks * _chunk_size(forward.model) + more, padding)
        with torch.no_grad():
            expected = dict(zip(forward.names, forward(*inputs)))
        named = zip(forward.inputs, inputs)
        results = session.run(forward.names, {name: tensor.numpy(force=True) for name, tensor in named})
        for (name, tensor), result in zip(expected.items(), results):
            tensor = tensor.cpu().double()
            difference = (torch.from_numpy(result).double() - tensor).abs().max()
            differences[name] = torch.maximum(differences[name], difference)  # NaN stays
            sizes[name] = torch.maximum(sizes[name], tensor.abs().max())
            refined += int((tensor > 0).sum()) if name == "refinement_steps" else 0
    relative = [differences[name] / (sizes[name] or 1.0) for name in forward.names]
    return torch.stack(relative).max().item(), refined


def _chunk_size(model: PreTrainedModel) -> int:
    return getattr(model.config, "chunk_size", 16)


def _move(written: str, path: str) -> tuple[str, ...]:
    """Moves the graph, and the file of its weights if there is one, to `path`."""
    files = [path]
    if os.path.exists(f"{written}.data"):
        with suppress(FileNotFoundError):
            os.remove(path)  # an older graph must not meet these weights
        files.append(f"{path}.data")
        write_atomically(files[1], partial(os.replace, f"{written}.data"))
    write_atomically(path, partial(os.replace, written))
    return tuple(files)
