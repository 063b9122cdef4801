"""Debug mode: a forward pass of the hybrid prints what it saw and did."""

import inspect
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn

from .non_finite import NonFiniteWatch
from .refiner_output import RefinerOutput

# Refined chunks that get a line of their own.
MOST_CHUNKS = 8


def debug_enabled() -> bool:
    """Whether `LLADA_TRM_DEBUG`, or where that is not set `DEBUG`, is 1, true, yes or on in the environment."""
    value = os.environ.get("LLADA_TRM_DEBUG") or os.environ.get("DEBUG") or ""
    return value.lower() in ("1", "true", "yes", "on")


def debuggable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """
    Decorator of the `forward` of a model with `refiner` and `get_output_embeddings`: in debug mode it prints a report.
    Its results are the same, bit for bit; when debug mode is off, it costs a look at the environment.
    """
    signature = inspect.signature(forward)

    @wraps(forward)
    def reporting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not debug_enabled():
            return forward(self, *args, **kwargs)
        named = signature.bind(self, *args, **kwargs).arguments
        given = {**named, **named.get("kwargs", {})}
        inputs = {name: value for name, value in given.items() if name not in ("self", "kwargs") and value is not None}
        print("\n".join(_input_lines(self, inputs)), flush=True)
        with _Listener(self) as heard, NonFiniteWatch(self) as watch:
            watch.check_inputs(inputs)
            output = forward(self, *args, **kwargs)
            watch.check_output(output)
        lines = [*_state_lines(heard, output), *_refinement_lines(self, heard, output), *_loss_lines(output)]
        print("\n".join([*lines, *_summary_lines(heard, output, watch)]), flush=True)
        return output

    return reporting


class _Spread:
    """Mean, standard deviation and range of the finite values of all tensors it is shown."""

    def __init__(self, *tensors: torch.Tensor):
        self.shapes: list[list[int]] = []
        self.count = self.broken = 0
        self.total = self.squares = 0.0
        self.low, self.high = float("inf"), float("-inf")
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Takes one more tensor in."""
        self.shapes.append(list(tensor.shape))
        values = tensor.detach().float()
        values = values[values.isfinite()]
        self.broken += tensor.numel() - values.numel()
        if values.numel():
            mean = values.mean().item()
            self.count += values.numel()
            self.total += values.numel() * mean
            self.squares += values.numel() * (values.var(correction=0).item() + mean**2)
            self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())

    def row(self, name: str) -> list[str]:
        more = f" and {len(self.shapes) - 1} more" if len(self.shapes) > 1 else ""
        if not self.count:
            return [name, f"{self.shapes[0]}{more}", *["-"] * 4, str(self.broken)]
        mean = self.total / self.count
        std = max(self.squares / self.count - mean**2, 0.0) ** 0.5
        numbers = [f"{number:.4g}" for number in (mean, std, self.low, self.high)]
        return [name, f"{self.shapes[0]}{more}", *numbers, str(self.broken)]


class _Listener:
    """
    What the refiner and the LM head of `model` were given and returned while it was open.

    Attributes:
        base_logits: those computed before the refiner ran.
        given: the refiner's arguments by name, `hidden_states` among them; empty if it did not run.
        refined: what it returned.
    """

    def __init__(self, model: Any):
        self.model = model
        self.base_logits = _Spread()
        self.given: dict[str, Any] = {}
        self.refined: RefinerOutput | None = None

    def __enter__(self) -> "_Listener":
        refiner, head = self.model.refiner, self.model.get_output_embeddings()
        self.hooks = [
            refiner.register_forward_pre_hook(self._ask_for_statistics, with_kwargs=True),
            refiner.register_forward_hook(self._hear_refiner, with_kwargs=True),
            head.register_forward_hook(self._hear_logits),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _ask_for_statistics(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_statistics": True}

    def _hear_refiner(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: RefinerOutput) -> None:
        self.given = {**dict(zip(("hidden_states", "active_chunks", "attention_mask", "max_steps"), args)), **kwargs}
        self.refined = output

    def _hear_logits(self, module: nn.Module, args: Any, logits: torch.Tensor) -> None:
        # Empty where another kind of backbone is spared the work of its own LM head.
        if self.refined is None and logits.numel():
            self.base_logits.add(logits)


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


def _state_lines(heard: _Listener, output: Any) -> Iterator[str]:
    rows = [["states and logits", "shape", "mean", "std", "min", "max", "not finite"]]
    if heard.refined is not None:
        before, after = heard.given["hidden_states"].detach(), heard.refined.hidden_states.detach()
        rows.append(_Spread(before).row("hidden states"))
        rows.append(_Spread(after).row("refined states"))
        rows.append(_Spread(after - before).row("their difference"))
    if heard.base_logits.shapes:
        rows.append(heard.base_logits.row("base logits"))
    if output.logits is not None:
        rows.append(_Spread(output.logits).row("final logits"))
    yield from _table(rows)


def _refinement_lines(model: Any, heard: _Listener, output: Any) -> Iterator[str]:
    if heard.refined is None:
        return
    steps, confidence = output.refinement_steps.cpu(), output.chunk_confidence.float().cpu()
    active = heard.given.get("active_chunks")
    active = (steps > 0 if active is None else active.cpu()).bool()
    idle = ~active & (confidence == 1)
    why = f" (confidence below {model.config.min_confidence})" if model.config.refine_low_confidence_only else ""
    yield (
        f"{active.numel()} chunks: {int(active.sum())} active{why}, {int((~active & ~idle).sum())} left alone, "
        f"{int(idle.sum())} with nothing to decide"
    )
    statistics = dict(_named_tensors(heard.refined.statistics or {}))
    similarity = statistics.pop("similarity", None)
    # Without a limit of its own, as a refiner made of several, it does not say whether it converged.
    limit = getattr(model.refiner.config, "max_recursive_steps", None)
    if limit is not None and heard.given.get("max_steps") is not None:
        limit = heard.given["max_steps"]
    yield from _chunk_lines(active, confidence, steps, output.refiner_confidence.float().cpu(), similarity, limit)
    if statistics:
        yield from _table(
            [
                ["refiner's statistics", "shape", "mean", "std", "min", "max", "not run"],
                *(_Spread(values).row(name) for name, values in statistics.items()),
            ]
        )


def _chunk_lines(
    active: torch.Tensor,
    confidence: torch.Tensor,
    steps: torch.Tensor,
    refiner_confidence: torch.Tensor,
    similarity: torch.Tensor | None,
    limit: int | None,
) -> Iterator[str]:
    """A line for each of the first active chunks; all tensors `[B, N]`, the similarity `[B, N, K]`."""
    chosen = active.nonzero().tolist()
    if not chosen:
        return
    rows = [["row", "chunk", "confidence", "refiner's", "updates", "", "similarity with the step before, by step"]]
    for row, chunk in chosen[:MOST_CHUNKS]:
        number = int(steps[row, chunk])
        curve = [] if similarity is None else similarity[row, chunk].tolist()
        looked = max((step for step, value in enumerate(curve, start=1) if value == value), default=number)
        end = "" if limit is None else f"converged at step {looked}" if number < limit else "all steps"
        sure = [f"{values[row, chunk].item():.4f}" for values in (confidence, refiner_confidence)]
        values = ["-" if value != value else f"{value:.4f}" for value in curve[:looked]]
        rows.append([str(row), str(chunk), *sure, str(number), end, " ".join(values)])
    yield from _table(rows)
    if len(chosen) > MOST_CHUNKS:
        yield f"  ... and {len(chosen) - MOST_CHUNKS} more active chunks"


def _loss_lines(output: Any) -> Iterator[str]:
    if output.loss is None:
        return
    components = {name: value.item() for name, value in (output.loss_components or {}).items()}
    yield f"loss {output.loss.item():.6g}   before their weights: " + ", ".join(
        f"{name} {value:.6g}" for name, value in components.items()
    )


def _summary_lines(heard: _Listener, output: Any, watch: NonFiniteWatch) -> Iterator[str]:
    if heard.refined is None:
        text = "the backbone alone"
    else:
        steps = output.refinement_steps
        refined = steps[steps > 0].float()
        mean = refined.mean().item() if len(refined) else 0.0
        text = f"{len(refined)} of {steps.numel()} chunks refined, {mean:.1f} updates each on average"
    yield f"summary: {text}; " + ("all values finite" if watch.finding is None else "NOT ALL VALUES FINITE")
    if watch.finding is not None:
        yield f"  {watch.finding}"


def _named_tensors(statistics: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested statistics by name."""
    if isinstance(statistics, torch.Tensor):
        yield name, statistics.detach().cpu()
    elif isinstance(statistics, dict):
        for key, value in statistics.items():
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(statistics, (tuple, list)):
        for index, value in enumerate(statistics):
            yield from _named_tensors(value, f"{name}[{index}]")


def _table(rows: list[list[str]]) -> Iterator[str]:
    """Aligned lines; the first row is the header, its first cell not indented."""
    rows = [[("  " if number else "") + first, *rest] for number, (first, *rest) in enumerate(rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
