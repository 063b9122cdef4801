"""Debug mode: a forward pass of the hybrid prints what it saw and did."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..models import RefinerOutput
from ..models.llada_trm.modeling_llada_trm import FORWARD_REPORTERS
from .non_finite import NonFiniteWatch, named_tensors

# Refined chunks that get a line of their own.
MAX_CHUNK_LINES = 8


def debug_enabled() -> bool:
    """Whether `LLADA_TRM_DEBUG`, or where that is not set `DEBUG`, is 1, true, yes or on in the environment."""
    value = os.environ.get("LLADA_TRM_DEBUG") or os.environ.get("DEBUG") or ""
    return value.lower() in ("1", "true", "yes", "on")


def debug_forward(forward: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """
    `forward(model, *args, **kwargs)`, the same bit for bit, which in debug mode prints a report. `model` has a
    `refiner` and `get_output_embeddings`. While debug mode is off, this costs a look at the environment.
    """
    if not debug_enabled():
        return forward(model, *args, **kwargs)
    arguments = inspect.signature(forward).bind(model, *args, **kwargs).arguments
    given = {**arguments, **arguments.get("kwargs", {})}
    inputs = {name: value for name, value in given.items() if name not in ("self", "kwargs") and value is not None}
    print("\n".join(_input_lines(model, inputs)), flush=True)
    with _capture(model) as captured, NonFiniteWatch(model) as watch:
        watch.check_inputs(inputs)
        output = forward(model, *args, **kwargs)
        watch.check_output(output)
    lines = [*_state_lines(captured, output), *_refinement_lines(model, captured, output), *_loss_lines(output)]
    print("\n".join([*lines, *_summary_lines(captured, output, watch)]), flush=True)
    return output


FORWARD_REPORTERS["debug"] = debug_forward


class _Statistics:
    """Mean, standard deviation and range of the finite values of all tensors added to it."""

    def __init__(self, *tensors: torch.Tensor):
        self.shapes: list[list[int]] = []
        self.count = self.num_non_finite = 0
        self.sum = self.sum_of_squares = 0.0
        self.min, self.max = float("inf"), float("-inf")
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        self.shapes.append(list(tensor.shape))
        values = tensor.detach().float()
        values = values[values.isfinite()]
        self.num_non_finite += tensor.numel() - values.numel()
        if values.numel():
            mean = values.mean().item()
            self.count += values.numel()
            self.sum += values.numel() * mean
            self.sum_of_squares += values.numel() * (values.var(correction=0).item() + mean**2)
            self.min, self.max = min(self.min, values.min().item()), max(self.max, values.max().item())

    def row(self, name: str) -> list[str]:
        """The cells of a table's row."""
        shape = str(self.shapes[0]) + (f" and {len(self.shapes) - 1} more" if len(self.shapes) > 1 else "")
        numbers = ["-"] * 4
        if self.count:
            mean = self.sum / self.count
            std = max(self.sum_of_squares / self.count - mean**2, 0.0) ** 0.5
            numbers = [f"{number:.4g}" for number in (mean, std, self.min, self.max)]
        return [name, shape, *numbers, str(self.num_non_finite)]


@dataclass
class _Captured:
    """Inputs and outputs of a model's refiner and LM head."""

    base_logits: _Statistics = field(default_factory=_Statistics)  # those computed before the refiner ran
    refiner_inputs: dict[str, Any] = field(default_factory=dict)  # by name; empty if the refiner did not run
    refined: RefinerOutput | None = None


@contextmanager
def _capture(model: Any) -> Iterator[_Captured]:
    captured = _Captured()

    def request_statistics(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_statistics": True}

    def capture_refiner(module: nn.Module, args: Any, kwargs: dict[str, Any], output: RefinerOutput) -> None:
        names = ("hidden_states", "active_chunks", "attention_mask", "max_steps")
        captured.refiner_inputs, captured.refined = {**dict(zip(names, args)), **kwargs}, output

    def capture_logits(module: nn.Module, args: Any, logits: torch.Tensor) -> None:
        # Empty where the LM head of a backbone that is not ours is skipped.
        if captured.refined is None and logits.numel():
            captured.base_logits.add(logits)

    hooks = [
        model.refiner.register_forward_pre_hook(request_statistics, with_kwargs=True),
        model.refiner.register_forward_hook(capture_refiner, with_kwargs=True),
        model.get_output_embeddings().register_forward_hook(capture_logits),
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def _input_lines(model: Any, inputs: dict[str, Any]) -> Iterator[str]:
    mode = "training" if model.training else "evaluation"
    yield f"\n=== {type(model).__name__}.forward, {mode} " + "=" * 40
    rows = [["inputs", "shape", "dtype", "device", ""]]
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            shown = str(value) if isinstance(value, (bool, int, float)) else type(value).__name__
            rows.append([name, shown, "", "", ""])
            continue
        note = ""
        if name == "input_ids":
            note = f"{int((value == model.config.mask_token_id).sum())} masks"
        elif name == "attention_mask":
            note = f"{int((value == 0).sum())} padding"
        dtype = str(value.dtype).removeprefix("torch.")
        rows.append([name, str(list(value.shape)), dtype, str(value.device), note])
    yield from _table(rows)


def _state_lines(captured: _Captured, output: Any) -> Iterator[str]:
    rows = [["states and logits", "shape", "mean", "std", "min", "max", "not finite"]]
    if captured.refined is not None:
        before, after = captured.refiner_inputs["hidden_states"].detach(), captured.refined.hidden_states.detach()
        states = {"hidden states": before, "refined states": after, "their difference": after - before}
        rows += [_Statistics(values).row(name) for name, values in states.items()]
    if captured.base_logits.shapes:
        rows.append(captured.base_logits.row("base logits"))
    if output.logits is not None:
        rows.append(_Statistics(output.logits).row("final logits"))
    yield from _table(rows)


def _refinement_lines(model: Any, captured: _Captured, output: Any) -> Iterator[str]:
    if captured.refined is None:
        return
    active = captured.refiner_inputs.get("active_chunks")
    active = (output.refinement_steps > 0 if active is None else active).bool().cpu()
    nothing_to_decide = ~active & (output.chunk_confidence.cpu() == 1)
    left_alone = ~active & ~nothing_to_decide
    why = f" (confidence below {model.config.min_confidence})" if model.config.refine_low_confidence_only else ""
    yield (
        f"{active.numel()} chunks: {int(active.sum())} active{why}, {int(left_alone.sum())} left alone, "
        f"{int(nothing_to_decide.sum())} with nothing to decide"
    )
    statistics = dict(named_tensors(captured.refined.statistics or {}))
    similarity = statistics.pop("similarity", None)
    # A combination of refiners has no limit of its own: it does not say whether it converged.
    limit = getattr(model.refiner.config, "max_recursive_steps", None)
    if limit is not None and captured.refiner_inputs.get("max_steps") is not None:
        limit = captured.refiner_inputs["max_steps"]
    yield from _chunk_lines(output, active.nonzero().tolist(), similarity, limit)
    if statistics:
        header = ["refiner's statistics", "shape", "mean", "std", "min", "max", "not run"]
        yield from _table([header, *(_Statistics(values).row(name) for name, values in statistics.items())])


def _chunk_lines(
    output: Any, chunks: list[list[int]], similarity: torch.Tensor | None, limit: int | None
) -> Iterator[str]:
    """A line for each of the first `chunks`, the rows and numbers of the active ones; similarity `[B, N, K]`."""
    rows = [["row", "chunk", "confidence", "refiner's", "updates", "", "similarity with the step before, by step"]]
    for row, chunk in chunks[:MAX_CHUNK_LINES]:
        updates = int(output.refinement_steps[row, chunk])
        curve = [] if similarity is None else similarity[row, chunk].tolist()
        last_step = max((step for step, value in enumerate(curve, start=1) if value == value), default=updates)
        end = "" if limit is None else f"converged at step {last_step}" if updates < limit else "all steps"
        both = (output.chunk_confidence, output.refiner_confidence)
        confidences = [f"{confidence[row, chunk].item():.4f}" for confidence in both]
        values = ["-" if value != value else f"{value:.4f}" for value in curve[:last_step]]
        rows.append([str(row), str(chunk), *confidences, str(updates), end, " ".join(values)])
    if chunks:
        yield from _table(rows)
    if len(chunks) > MAX_CHUNK_LINES:
        yield f"  ... and {len(chunks) - MAX_CHUNK_LINES} more active chunks"


def _loss_lines(output: Any) -> Iterator[str]:
    if output.loss is None:
        return
    components = (f"{name} {value.item():.6g}" for name, value in (output.loss_components or {}).items())
    yield f"loss {output.loss.item():.6g}   before their weights: {', '.join(components)}"


def _summary_lines(captured: _Captured, output: Any, watch: NonFiniteWatch) -> Iterator[str]:
    if captured.refined is None:
        text = "the backbone alone"
    else:
        steps = output.refinement_steps
        refined = steps[steps > 0].float()
        mean = refined.mean().item() if len(refined) else 0.0
        text = f"{len(refined)} of {steps.numel()} chunks refined, {mean:.1f} updates each on average"
    yield f"summary: {text}; " + ("all values finite" if watch.finding is None else "NOT ALL VALUES FINITE")
    if watch.finding is not None:
        yield f"  {watch.finding}"


def _table(rows: list[list[str]]) -> Iterator[str]:
    """Aligned lines; the first row is the header, its first cell not indented."""
    rows = [[("  " if number else "") + first, *rest] for number, (first, *rest) in enumerate(rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
