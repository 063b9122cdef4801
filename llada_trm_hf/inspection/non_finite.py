"""Where NaN and Inf come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass
class NonFinite:
    """The first appearance of NaN or Inf."""

    module: str  # its name; empty for the model itself
    kind: str  # its class
    where: str  # the tensor and its counts, such as `output: 16 NaN, 0 Inf of 512 values`
    parameters: list[str]  # the same for each of its parameters and buffers that holds any
    in_inputs: bool = False  # whether the inputs of the model held the values

    def __str__(self) -> str:
        name = f"{self.module} ({self.kind})" if self.module else self.kind
        if self.in_inputs:
            return f"NaN or Inf came in with what {name} was given, {self.where}."
        weights = f" Its own {'; '.join(self.parameters)}." if self.parameters else ""
        return f"NaN or Inf first appeared in {name}, {self.where}; its inputs are finite.{weights}"


class NonFiniteWatch:
    """
    A context that finds the first module of `model`, in the order of execution, whose output holds NaN or Inf although
    its inputs do not (-Inf in inputs does not count: masks use it). What `torch.compile` has compiled is seen as one
    module. Every module waits for the device. The result is in `finding`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.finding: NonFinite | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> "NonFiniteWatch":
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_hook(partial(self._after, name), with_kwargs=True))
        self._hooks.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        where = _non_finite({name: value for name, value in inputs.items() if name != "attention_mask"})
        if where and self.finding is None:
            self.finding = NonFinite("", type(self.model).__name__, where[0], [], in_inputs=True)

    def check_output(self, output: Any) -> None:
        self._after("", self.model, (), {}, output)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.check_inputs({f"argument {number}": value for number, value in enumerate(args, start=1)} | kwargs)

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or self.finding is not None:
            return
        where = _non_finite({"output": output})
        if where and not any((t.isnan() | t.isposinf()).any() for _, t in _float_tensors((args, kwargs))):
            self.finding = NonFinite(name, type(module).__name__, where[0], non_finite_weights(module))


def non_finite_weights(module: nn.Module) -> list[str]:
    """The parameters and buffers of `module` and its submodules that hold NaN or Inf, and how many."""
    return _non_finite({**dict(module.named_parameters()), **dict(module.named_buffers())})


def generate_finite(model: PreTrainedModel, streamer: Any = None, **arguments: Any) -> Any:
    """
    `model.generate(...)` that checks the logits without waiting for the device. If any were NaN or Inf, it generates
    once more under a [`NonFiniteWatch`], without the streamer.

    Raises:
        FloatingPointError: naming the module NaN or Inf came from.
    """
    finite: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: finite.append(logits.isfinite().all())
    )
    try:
        output = model.generate(streamer=streamer, **arguments)
    finally:
        hook.remove()
    if not finite or torch.stack(finite).all():
        return output
    with NonFiniteWatch(model) as watch:
        model.generate(**arguments)
    raise FloatingPointError(str(watch.finding or "The logits held NaN or Inf, but did not when generated again."))


@torch.no_grad()
def _non_finite(values: dict[str, Any]) -> list[str]:
    """The tensors in `values` that hold NaN or Inf, and how many."""
    found = []
    for name, tensor in _float_tensors(values):
        if not tensor.isfinite().all():
            nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            found.append(f"{name}: {nan} NaN, {inf} Inf of {tensor.numel()} values")
    return found


def _float_tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named_tensors(value, skip="statistics"):  # of a refiner: there NaN stands for "not run"
        if tensor.is_floating_point():
            # Of a DTensor, this process's part.
            yield name, tensor.to_local() if hasattr(tensor, "to_local") else tensor


def named_tensors(value: Any, name: str = "", skip: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries and sequences, by path, without those of keys that end with `skip`."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if skip is None or not str(key).endswith(skip):
                yield from named_tensors(item, f"{name}.{key}" if name else str(key), skip)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{index}]", skip)
