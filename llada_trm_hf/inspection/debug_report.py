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
    """`forward(model, *args, **kwargs)`, the same bit for bit; in debug mode it also prints a report."""
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
    lines = [*_state_lines(captured, output), *_refinement_lines(model, captured, output)]
    print("\n".join([*lines, *_summary_lines(captured, output, watch)]), flush=True)
    return output


FORWARD_REPORTERS["debug"] = debug_forward


@dataclass
class _Captured:
    """Inputs and outputs of a model's refiner and LM head."""

    base_logits: list[torch.Tensor] = field(default_factory=list)  # computed before the refiner ran, on the CPU
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
            # A copy: refined logits overwrite these.
            captured.base_logits.append(logits.detach().to("cpu", copy=True))

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
    counted = {"input_ids": ("masks", model.config.mask_token_id), "attention_mask": ("padding", 0)}
    rows = []
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            word, token = counted.get(name, ("", 0))
            note = f"{int((value == token).sum())} {word}" if word else ""
            dtype = str(value.dtype).removeprefix("torch.")
            rows.append([name, str(list(value.shape)), dtype, str(value.device), note])
        else:
            shown = str(value) if isinstance(value, (bool, int, float)) else type(value).__name__
            rows.append([name, shown, "", "", ""])
    yield from _table(["inputs", "shape", "dtype", "device", ""], rows)


def _state_lines(captured: _Captured, output: Any) -> Iterator[str]:
    tensors: dict[str, list[torch.Tensor]] = {}
    if captured.refined is not None:
        before, after = captured.refiner_inputs["hidden_states"].detach(), captured.refined.hidden_states.detach()
        tensors = {"hidden states": [before], "refined states": [after], "their difference": [after - before]}
    tensors["base logits"] = captured.base_logits
    tensors["final logits"] = [] if output.logits is None else [output.logits.detach()]
    yield from _statistics_table("states and logits", tensors, "not finite")


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
    tensors = {name: [values.detach()] for name, values in statistics.items()}
    yield from _statistics_table("refiner's statistics", tensors, "not run")


def _chunk_lines(
    output: Any, chunks: list[list[int]], similarity: torch.Tensor | None, limit: int | None
) -> Iterator[str]:
    """A line for each of the first `chunks`, the rows and numbers of the active ones; similarity `[B, N, K]`."""
    rows = []
    for row, chunk in chunks[:MAX_CHUNK_LINES]:
        updates = int(output.refinement_steps[row, chunk])
        curve = [] if similarity is None else similarity[row, chunk].tolist()
        last_step = max((step for step, value in enumerate(curve, start=1) if value == value), default=updates)
        end = "" if limit is None else f"converged at step {last_step}" if updates < limit else "all steps"
        both = (output.chunk_confidence, output.refiner_confidence)
        confidences = [f"{confidence[row, chunk].item():.4f}" for confidence in both]
        values = ["-" if value != value else f"{value:.4f}" for value in curve[:last_step]]
        rows.append([str(row), str(chunk), *confidences, str(updates), end, " ".join(values)])
    similarities = "similarity with the step before, by step"
    yield from _table(["row", "chunk", "confidence", "refiner's", "updates", "", similarities], rows)
    if len(chunks) > MAX_CHUNK_LINES:
        yield f"  ... and {len(chunks) - MAX_CHUNK_LINES} more active chunks"


def _summary_lines(captured: _Captured, output: Any, watch: NonFiniteWatch) -> Iterator[str]:
    if output.loss is not None:
        components = (f"{name} {value.item():.6g}" for name, value in (output.loss_components or {}).items())
        yield f"loss {output.loss.item():.6g}   before their weights: {', '.join(components)}"
    text = "the backbone alone"
    if captured.refined is not None:
        steps = output.refinement_steps
        refined = int((steps > 0).sum())
        mean = int(steps.sum()) / max(refined, 1)
        text = f"{refined} of {steps.numel()} chunks refined, {mean:.1f} updates each on average"
    yield f"summary: {text}; " + ("all values finite" if watch.finding is None else "NOT ALL VALUES FINITE")
    if watch.finding is not None:
        yield f"  {watch.finding}"


def _statistics_table(title: str, named: dict[str, list[torch.Tensor]], not_finite: str) -> Iterator[str]:
    """Moments and range of the finite values of one or several tensors per row, and the number of other values."""
    rows = []
    for name, tensors in named.items():
        if tensors:
            values = torch.cat([tensor.float().flatten() for tensor in tensors])
            finite = values[values.isfinite()]
            numbers = ["-"] * 4
            if len(finite):
                statistics = (finite.mean(), finite.std(correction=0), finite.min(), finite.max())
                numbers = [f"{number.item():.4g}" for number in statistics]
            shape = str(list(tensors[0].shape)) + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")
            rows.append([name, shape, *numbers, str(len(values) - len(finite))])
    yield from _table([title, "shape", "mean", "std", "min", "max", not_finite], rows)


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Aligned lines; nothing without rows."""
    if rows:
        lines = [header, *(["  " + first, *rest] for first, *rest in rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        for line in lines:
            yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
