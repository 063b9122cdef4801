"""Refinement traces shown: as a page to watch, as a picture for a report, as a few lines of text."""

import json
import math
import os
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from ..generation import RefinementTrace
from ..generation.refinement_trace import TRACE_RENDERERS

# Where the page's template expects the data, and the drawings made from it.
DATA_PLACEHOLDER, CURVES_PLACEHOLDER = "{{trace}}", "{{curves}}"
# Of a drawing, in pixels.
WIDTH, HEIGHT, MARGIN = 160, 48, 4


def write_html(trace: RefinementTrace, path: str | os.PathLike, tokenizer: Any = None) -> None:
    """
    Writes one self-contained page that plays the trace of `generate(..., output_refinement_trace=True)`; it loads
    nothing from anywhere. Without a tokenizer, anything with `decode([id])`, it shows token ids.
    """
    # Every "<" is escaped, not only "</": "<!--<script" in a text would hide the end of the script element as well.
    data = json.dumps(trace.to_dict(tokenizer)).replace("<", "\\u003c")
    page = files(__package__).joinpath("trace.html").read_text(encoding="utf-8")
    # The curves first: the data may hold a text that looks like a placeholder.
    page = page.replace(CURVES_PLACEHOLDER, _similarity_curves(trace)).replace(DATA_PLACEHOLDER, data)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def plot_trace(trace: RefinementTrace, path: str | os.PathLike) -> None:
    """
    Writes a PNG about the first row of the batch: similarity curves of its chunks over the recursion steps, and their
    updates and confidence over the diffusion steps.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a trace of a model without refiner.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("Plotting a trace needs matplotlib: pip install llada-trm-hf[demo]") from error
    if not trace.passes:
        raise ValueError("The trace has no refinement passes: there is nothing to plot for a model without refiner.")
    similarity, num_steps, confidence = _first_row(trace, "similarity", "num_steps", "chunk_confidence")
    num_passes, num_chunks, max_steps = similarity.shape
    most_updates = max(max_steps, int(num_steps.max()))  # a refiner without similarities has updates all the same

    # Not pyplot's figure: nothing global, so it works in threads and without a display.
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    curve_axes, update_axes, confidence_axes = figure.subplots(1, 3)

    colors = ScalarMappable(Normalize(1, max(num_chunks, 2)), "viridis")
    for chunk in range(num_chunks):
        # Points as well as lines: a chunk that stops after one update has a single value.
        color, curves = colors.cmap(chunk / max(num_chunks - 1, 1)), similarity[:, chunk].T.numpy()
        curve_axes.plot(range(1, max_steps + 1), curves, ".-", color=color, alpha=0.6, linewidth=1)
    figure.colorbar(colors, ax=curve_axes, label="chunk", ticks=MaxNLocator(integer=True))
    curve_axes.set(title="When a chunk settles", xlabel="recursion step", ylabel="similarity with the step before")
    curve_axes.set_xlim(0.5, max_steps + 0.5)

    extent = (0.5, num_passes + 0.5, num_chunks + 0.5, 0.5)  # everything counts from 1
    for axes, values, blank, title, largest in (
        (update_axes, num_steps, 0, "Updates (blank: left alone)", most_updates),
        # 1 is also what a chunk with nothing to decide reports; painted, it would drown the rest.
        (confidence_axes, confidence, 1, "Confidence (blank: nothing to decide)", 1),
    ):
        painted = values.masked_fill(values == blank, torch.nan).T.numpy()
        image = axes.imshow(painted, aspect="auto", interpolation="nearest", extent=extent, vmin=0, vmax=largest)
        figure.colorbar(image, ax=axes)
        axes.set(title=title, xlabel="diffusion step", ylabel="chunk")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (curve_axes, update_axes, confidence_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, format="png", dpi=150)


def trace_summary(trace: RefinementTrace) -> str:
    """What happened to the first row of the batch, as lines of text."""
    canvases = torch.stack([canvas[0] for canvas in trace.canvases])  # [steps + 1, L]
    decided = ((canvases[0] == trace.mask_token_id) & (canvases[-1] != trace.mask_token_id)).sum()
    lines = [f"{int(decided)} tokens decided in {len(canvases) - 1} diffusion steps"]
    if not trace.passes:
        return "\n".join([*lines, "no refiner ran"])
    num_steps, similarity = _first_row(trace, "num_steps", "similarity")
    before, after = _first_row(trace, "chunk_confidence", "refiner_confidence")
    refined = num_steps > 0  # [S, N]
    changed = sum(int(done.changed_tokens[0].sum()) for done in trace.passes if 0 in done.rows)
    lines.append(
        f"{int(refined.sum())} chunks refined, in {int(refined.any(1).sum())} of the steps: {int(num_steps.sum())} "
        f"updates, {changed} best guesses changed"
    )
    if refined.any():
        means = [confidence[refined].mean().item() for confidence in (before, after)]
        lines.append(f"mean confidence in them {means[0]:.3f} of the backbone, {means[1]:.3f} of the refiner")
    last = [curve[curve.isfinite()][-1].item() for curve in similarity.flatten(0, 1) if curve.isfinite().any()]
    if last:
        lines.append(f"similarity at the end {sum(last) / len(last):.4f} on average, {min(last):.4f} at worst")
    return "\n".join(lines)


def _first_row(trace: RefinementTrace, *names: str) -> list[torch.Tensor]:
    """Fields of the passes of row 0, `[S, N]` or `[S, N, K]`; a padded row has fewer chunks than the batch."""
    # Rows only ever leave the batch, in order: as long as row 0 is in it, it comes first.
    passes = [done for done in trace.passes if 0 in done.rows]
    num_chunks = int(passes[0].chunk_of_token[0].max()) + 1
    return [torch.stack([getattr(done, name)[0, :num_chunks].float() for done in passes]) for name in names]


TRACE_RENDERERS["html"] = write_html
TRACE_RENDERERS["plot"] = plot_trace


class _Curve(NamedTuple):
    step: int  # of diffusion
    similarity: list[float]  # of the recursion steps that have one
    num_updates: int


def _similarity_curves(trace: RefinementTrace) -> str:
    """
    HTML with a drawing for each refined chunk of each row: a polyline for each diffusion step that refined it, over
    the recursion steps, from the lowest similarity of the row at the bottom to 1 at the top. Titles give the numbers.
    """
    rows = []
    for row in range(len(trace.canvases[0])):
        chunks = _chunks(trace, row)
        similarities = [curve.similarity for curves in chunks.values() for curve in curves]
        lowest = min(map(min, similarities), default=1.0)
        longest = max(map(len, similarities), default=0)
        drawings = (_drawing(chunk, chunks[chunk], lowest, longest) for chunk in sorted(chunks))
        rows.append(f'<div class="curves" data-row="{row}">{"".join(drawings)}</div>')
    return "\n".join(rows)


def _chunks(trace: RefinementTrace, row: int) -> dict[int, list[_Curve]]:
    """The curves of each chunk of a row that has any."""
    chunks: dict[int, list[_Curve]] = {}
    for step, done in enumerate(trace.passes, start=1):
        for index in (done.rows == row).nonzero().flatten().tolist():
            for chunk, curve in enumerate(done.similarity[index].tolist()):
                if values := [value for value in curve if math.isfinite(value)]:
                    chunks.setdefault(chunk, []).append(_Curve(step, values, int(done.num_steps[index, chunk])))
    return chunks


def _drawing(chunk: int, curves: list[_Curve], lowest: float, longest: int) -> str:
    updates, steps = sum(curve.num_updates for curve in curves), len(curves)
    lines = "".join(
        f'<polyline data-step="{step}" points="{" ".join(_points(similarity, lowest, longest))}">'
        f"<title>step {step}: {' '.join(f'{value:.4f}' for value in similarity)}</title></polyline>"
        for step, similarity, _ in curves
    )
    return (
        f'<figure data-chunk="{chunk}"><svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<path d="M0 {MARGIN}H{WIDTH}"/>{lines}</svg>'
        f"<figcaption>Chunk {chunk + 1} <small>{updates} update{'s' * (updates != 1)} in "
        f"{steps} step{'s' * (steps != 1)}</small></figcaption></figure>"
    )


def _points(similarity: list[float], lowest: float, longest: int) -> list[str]:
    scale = (HEIGHT - 2 * MARGIN) / max(1 - lowest, 1e-6)
    width = (WIDTH - 2 * MARGIN) / max(longest - 1, 1)
    points = [f"{MARGIN + n * width:.2f},{MARGIN + (1 - value) * scale:.2f}" for n, value in enumerate(similarity)]
    return points * 2 if len(points) == 1 else points  # a line of no length is drawn as a dot
