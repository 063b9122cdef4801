"""A refinement trace as one self-contained page to watch."""

import html
import json
import math
import os
import re
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from ..generation import RefinementPass, RefinementTrace
from ..generation.refinement_trace import TRACE_RENDERERS
from .trace_grid import TraceGrid
from .trace_story import TokenTexts, first_masked, guess_changes, headline, passes_of_row, plural, visible_text

# Of a drawing, in pixels.
WIDTH, HEIGHT, MARGIN = 160, 48, 4
MOST_CHANGES = 200  # in the table of a row; the player shows all of them, step by step


def write_html(
    trace: RefinementTrace, path: str | os.PathLike, tokenizer: Any = None, grid_width: int | None = None
) -> None:
    """
    Writes one self-contained page that plays the trace of `generate(..., output_refinement_trace=True)`; it loads
    nothing from anywhere. Without a tokenizer, anything with `decode([id])`, it shows token ids. With `grid_width`,
    the response is drawn as a square grid; raises ValueError as `TraceGrid`.
    """
    texts, rows = TokenTexts(trace, tokenizer), range(len(trace.canvases[0]))
    grid = None if grid_width is None else TraceGrid(trace, grid_width, texts)
    stories = (f'<p class="story" data-row="{row}">{html.escape(headline(trace, row))}</p>' for row in rows)
    parts = {
        "stories": "\n".join(stories),
        "changes": "\n".join(_changes_table(trace, row, texts, grid) for row in rows),
        "end": ", ".join(f"<code>{html.escape(visible_text(name))}</code>" for name in texts.end.values()),
        "curves": _similarity_curves(trace),
        # Every "<" is escaped, not only "</": "<!--<script" in a text would hide the end of the script element too.
        "trace": json.dumps(page_data(trace, texts, grid), separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = files(__package__).joinpath("trace.html").read_text(encoding="utf-8")
    # In one pass: what is filled in may itself look like a placeholder.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def page_data(trace: RefinementTrace, texts: TokenTexts, grid: TraceGrid | None = None) -> dict[str, Any]:
    """
    The trace as the page's script reads it: each text once, of each canvas the tokens that are new in it, guesses
    where something happened, and probabilities in thousandths, so that long generations stay small.
    """
    return {
        "mask_token_id": trace.mask_token_id,
        "texts": {token: visible_text(text, keep="\n") for token, text in texts.texts.items()} or None,
        "end": list(texts.end),
        "grid": None if grid is None else grid.data(),
        "rows": [_row_data(trace, row, grid) for row in range(len(trace.canvases[0]))],
    }


def _row_data(trace: RefinementTrace, row: int, grid: TraceGrid | None) -> dict[str, Any]:
    passes = dict(passes_of_row(trace, row))
    steps = []
    for step in range(1, len(trace.canvases)):
        before, after = trace.canvases[step - 1][row], trace.canvases[step][row]
        columns = (before != after).nonzero().flatten().tolist()
        data: dict[str, Any] = {"set": [[column, int(after[column])] for column in columns]}
        if step in passes:
            data["refinement"] = _pass_data(*passes[step], set(columns))
        steps.append(data)
    data = {"tokens": trace.canvases[0][row].tolist(), "steps": steps}
    if passes:
        done, index = next(iter(passes.values()))
        data["chunk_of_token"] = done.chunk_of_token[index].tolist()
    if trace.expected is not None:
        data["expected"] = trace.expected[row].tolist()
    if grid is not None:
        data["given"] = grid.given(row)
    return data


def _pass_data(done: RefinementPass, index: int, decided: set[int]) -> dict[str, Any]:
    """One row of a pass. Guesses are `[column, backbone's, its probability, refined, its probability]`."""
    # What is nearly 1 stays below it: exactly 1 says that a chunk had nothing to decide.
    confidence = [
        value if value >= 1 else min(round(value, 4), 0.9999) for value in done.chunk_confidence[index].tolist()
    ]
    similarity = [[value for value in curve if math.isfinite(value)] for curve in done.similarity[index].tolist()]
    data = {
        "num_steps": done.num_steps[index].tolist(),
        "chunk_confidence": confidence,
        "refiner_confidence": [round(value, 4) for value in done.refiner_confidence[index].tolist()],
        "similarity": [[round(value, 4) for value in (curve[:1] + curve[-1:])] for curve in similarity],
        "changed": done.changed_tokens[index].nonzero().flatten().tolist(),
    }
    if done.guesses is not None and done.guess_probability is not None:
        tokens, probability = done.guesses[index], (1000 * done.guess_probability[index]).round().nan_to_num().long()
        chunks = done.chunk_of_token[index]
        in_refined = (done.num_steps[index] > 0)[chunks.clamp(min=0)] & (chunks >= 0)
        there = (in_refined & (tokens[0] >= 0)).nonzero().flatten().tolist()
        told = sorted({*there, *(column for column in decided if tokens[0, column] >= 0)})
        both = torch.stack([tokens[0], probability[0], tokens[1], probability[1]], dim=-1)[told].tolist()
        data["guesses"] = [[column, *guesses] for column, guesses in zip(told, both)]
    return data


def _changes_table(trace: RefinementTrace, row: int, texts: TokenTexts, grid: TraceGrid | None) -> str:
    """HTML with a table of the best guesses that the refiner changed in a row; nothing without any."""
    changes, first = guess_changes(trace, row), first_masked(trace, row)
    if not changes:
        return ""
    known = trace.expected is not None and any(change.outcome for change in changes)
    heads = [
        "Step",
        "Token" if grid is None else "Cell",
        "Backbone",
        "Refiner",
        *(["Known answer", ""] if known else []),
        "In this step",
    ]
    lines = []
    for change in changes[:MOST_CHANGES]:
        cells = [
            f'<a href="#step={change.step}&amp;row={row}">{change.step}</a>',
            str(change.position - first + 1) if grid is None else grid.place(change.position),
            _guess(texts, change.backbone, change.backbone_probability),
            _guess(texts, change.refined, change.refined_probability),
        ]
        if known:
            expected = int(trace.expected[row, change.position])  # type: ignore[index]
            cells += [html.escape(texts(expected)) if expected >= 0 else "", _outcome(change.outcome)]
        cells.append("left open" if change.committed is None else f"decided: {html.escape(texts(change.committed))}")
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    more = len(changes) - len(lines)
    note = f'<p class="hint">And {more} more: play the steps to see them.</p>' if more else ""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<div class="changes" data-row="{row}" role="region" tabindex="0" aria-label="Changes"><table><caption>'
        f"{plural(len(changes), 'change')}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>{note}</div>"
    )


def _guess(texts: TokenTexts, token: int, probability: float) -> str:
    return f"<strong>{html.escape(texts(token))}</strong> <small>{100 * probability:.0f}%</small>"


def _outcome(outcome: str) -> str:
    name = outcome.rpartition(" ")[2] if outcome else ""
    return f'<span class="{name}">{"✓" if name == "right" else "✗"} {outcome}</span>' if outcome else ""


TRACE_RENDERERS["html"] = write_html


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
