"""A refinement trace as a picture for a report."""

import os
from typing import Any

import torch

from ..generation import RefinementTrace
from ..generation.refinement_trace import TRACE_RENDERERS
from .trace_grid import TraceGrid
from .trace_story import TokenTexts, first_masked, first_row, guess_changes, headline, passes_of_row, plural

# Letters and numbers stand in the cells as long as these are large enough to be read.
MOST_LETTERED_TOKENS, MOST_LETTERED_STEPS, MOST_NUMBERED_CELLS = 24, 10, 160
MOST_CURVES = 6  # similarity curves drawn one by one
MOST_GRIDS, GRIDS_IN_A_ROW = 12, 6
WIDTH = 13.0  # of the figure, in inches
BACKBONE, REFINER, RIGHT, WRONG = "#c4641a", "#6a35d9", "#137a3d", "#c02626"
SHARP: dict[str, Any] = {"interpolation": "nearest"}  # cells, not a landscape
OPEN, DECIDED, DECIDED_NOW, CHANGED, WALL = "#f3f1ec", "#d3d1cc", "#33343a", "#cdb6f7", "#7d7a73"


def plot_trace(
    trace: RefinementTrace, path: str | os.PathLike, tokenizer: Any = None, grid_width: int | None = None
) -> None:
    """
    Writes a PNG about the first row of the batch: which best guesses the refiner changed in which diffusion step, how
    often it updated each chunk, the confidence before and after, and how its updates die down. With a tokenizer,
    anything with `decode([id])`, short texts are written out, else the ids of their tokens are. With `grid_width`, the
    response is drawn as a square grid, once for each of some steps.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a trace of a model without refiner, and as `TraceGrid`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plotting a trace needs matplotlib: pip install llada-trm-hf[demo]") from error
    if not trace.passes:
        raise ValueError("The trace has no refinement passes: there is nothing to plot for a model without refiner.")
    texts = TokenTexts(trace, tokenizer)
    picture = _Picture(trace, texts, None if grid_width is None else TraceGrid(trace, grid_width, texts))
    lines = picture.num_passes + (trace.expected is not None)
    top = min(1.2 + 0.75 * lines, 6.0) if picture.has_letters else 3.8
    if picture.grid is not None:
        top = 0.6 + picture.grid_rows * WIDTH / GRIDS_IN_A_ROW

    # Not pyplot's figure: nothing global, so it works in threads and without a display.
    figure = Figure(figsize=(WIDTH, top + 4.2), layout="constrained")
    figure.suptitle(headline(trace), fontsize=14, fontweight="bold", wrap=True)
    halves: Any = figure.subfigures(2, 1, height_ratios=[top, 3.6])
    upper, lower = halves
    if picture.grid is None:
        picture.draw_guesses(upper.subplots())
    else:
        picture.draw_grids(upper)
    updates, confidence, similarity = lower.subplots(1, 3, width_ratios=[1.1, 1.2, 1])
    picture.draw_updates(updates)
    picture.draw_confidence(confidence)
    picture.draw_similarity(similarity)
    for axes in (updates, confidence, similarity):
        axes.title.set_fontsize(11)
    figure.savefig(path, format="png", dpi=150)


class _Picture:
    """The panels, each about the steps that row 0 took part in."""

    def __init__(self, trace: RefinementTrace, texts: TokenTexts, grid: TraceGrid | None = None):
        self.trace, self.texts, self.grid = trace, texts, grid
        self.passes = [done for _, (done, _) in passes_of_row(trace, 0)]
        self.num_passes, self.first = len(self.passes), first_masked(trace, 0)
        self.canvases = torch.stack([canvas[0] for canvas in trace.canvases[: self.num_passes + 1]])[:, self.first :]
        self.num_steps, self.similarity = first_row(trace, "num_steps", "similarity")  # [S, N], [S, N, K]
        self.changes = guess_changes(trace)
        is_short = self.canvases.shape[1] <= MOST_LETTERED_TOKENS and self.num_passes <= MOST_LETTERED_STEPS
        self.has_letters = is_short

        self.grid_rows = -(-min(self.num_passes, MOST_GRIDS) // GRIDS_IN_A_ROW)

    def draw_grids(self, figure: Any) -> None:
        """The grid after some of the steps, the last one among them, by what became of each cell."""
        from matplotlib.patches import Patch, Rectangle

        assert self.grid is not None
        width, first = self.grid.width, self.grid.first
        cells, given, boxes = slice(first, first + width**2), self.grid.given(0), self.grid.boxes()
        shown = torch.linspace(0, self.num_passes - 1, min(self.num_passes, MOST_GRIDS)).round().long().tolist()
        changed: dict[int, set[int]] = {}
        for change in self.changes:
            changed.setdefault(change.step - 1, set()).add(change.position - first)
        panels = figure.subplots(self.grid_rows, GRIDS_IN_A_ROW, squeeze=False).flatten()
        for axes in panels:
            axes.set(xlim=(0, width), ylim=(width, 0), aspect="equal")
            axes.axis("off")
        for axes, step in zip(panels, shown):
            before, after = (self.trace.canvases[step + i][0, cells].tolist() for i in (0, 1))
            wrong = set() if self.trace.expected is None else self._wrong_cells(after, cells)
            for cell, (old, token, clue) in enumerate(zip(before, after, given)):
                row, column = divmod(cell, width)
                is_open, is_new = token == self.trace.mask_token_id, token != old
                letter = self.texts(clue if is_open else token) if not is_open or clue >= 0 else ""
                color = OPEN if is_open else DECIDED_NOW if is_new else DECIDED
                color = WALL if letter == "#" else CHANGED if cell in changed.get(step, ()) else color
                axes.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.6))
                ink = (
                    "white" if color == DECIDED_NOW else WRONG if cell in wrong else "black" if clue >= 0 else BACKBONE
                )
                if letter not in ("#", "."):
                    style = {"color": ink, "fontweight": "bold" if clue >= 0 else "normal"}
                    size = 72 * WIDTH / GRIDS_IN_A_ROW / width * 0.5
                    axes.text(
                        column + 0.5, row + 0.54, _drawable(letter), size=size, ha="center", va="center", **style
                    )
            for line in range(0, width + 1):
                if line in (0, width) or (boxes and line % boxes[0] == 0):
                    axes.plot([0, width], [line, line], color="black", linewidth=1.2, clip_on=False)
                if line in (0, width) or (boxes and line % boxes[1] == 0):
                    axes.plot([line, line], [0, width], color="black", linewidth=1.2, clip_on=False)
            axes.set_title(f"step {step + 1}", fontsize=10)
        names = {"still open": OPEN, "decided before": DECIDED, "decided in this step": DECIDED_NOW}
        names["best guess changed by the refiner"] = CHANGED
        handles = [Patch(facecolor=color, edgecolor="grey", label=name) for name, color in names.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)

    def _wrong_cells(self, tokens: list[int], cells: slice) -> set[int]:
        """The decided cells of the grid that are not as in the known answer."""
        assert self.trace.expected is not None
        pairs = enumerate(zip(tokens, self.trace.expected[0, cells].tolist()))
        return {
            cell for cell, (token, right) in pairs if right >= 0 and token not in (right, self.trace.mask_token_id)
        }

    def draw_guesses(self, axes: Any) -> None:
        """A row of cells for each step, a column for each token, by what became of the token there."""
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        before, after = self.canvases[:-1], self.canvases[1:]  # [S, L]
        state = torch.where(after == self.trace.mask_token_id, 0, torch.where(after == before, 1, 2))
        changed = torch.stack([done.changed_tokens[0, self.first :] for done in self.passes])
        state = state.masked_fill(changed, 3)
        num_passes, length = state.shape
        extent = (0.5, length + 0.5, num_passes + 0.5, 0.5)  # everything counts from 1
        names = ["still open", "decided before", "decided in this step", "best guess changed by the refiner"]
        colors = [OPEN, DECIDED, DECIDED_NOW, CHANGED]
        axes.imshow(state.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=3, aspect="auto", extent=extent, **SHARP)
        handles = [Patch(facecolor=c, edgecolor="grey", label=name) for c, name in zip(colors, names)]
        if self.has_letters:
            self._write_letters(axes, state)
            if any(token in self.texts.end for token in self.canvases[-1].tolist()):
                handles.append(Patch(alpha=0, label="∎ end of the text"))
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, borderaxespad=0.2
        )
        axes.set(xlabel="token", ylabel="diffusion step")
        _whole_numbers(axes)
        if self.trace.expected is not None:
            self._mark_answer(axes, num_passes)

    def _write_letters(self, axes: Any, state: torch.Tensor) -> None:
        """In each cell the token decided, or an open one's best guess; where the refiner changed it, both guesses."""
        num_passes, length = state.shape
        changes = {(change.step - 1, change.position - self.first): change for change in self.changes}
        for step, done in enumerate(self.passes):
            for column in range(length):
                token, now = int(self.canvases[step + 1, column]), int(state[step, column]) == 2
                if (change := changes.get((step, column))) is not None:
                    share = f"{100 * change.backbone_probability:.0f}→{100 * change.refined_probability:.0f}%"
                    box = (
                        {} if change.committed is None else {"bbox": {"facecolor": DECIDED_NOW, "boxstyle": "square"}}
                    )
                    color = REFINER if change.committed is None else "white"
                    self._write(axes, column, step - 0.32, f"{self.texts(change.backbone)} →", 10, color=BACKBONE)
                    style: dict[str, Any] = {"color": color, "fontweight": "bold", **box}
                    self._write(axes, column, step, self.texts(change.refined), 15, **style)
                    self._write(axes, column, step + 0.34, share, 8, color="#333")
                elif token != self.trace.mask_token_id:
                    self._write(axes, column, step, self.texts(token), 15, color="white" if now else "#555")
                elif done.guesses is not None and (guess := int(done.guesses[0, 1, self.first + column])) >= 0:
                    self._write(axes, column, step, self.texts(guess), 13, color="#6f6d67", fontstyle="italic")
        for edge in range(1, length):
            axes.axvline(edge + 0.5, color="white", linewidth=1)
        for edge in range(1, num_passes):
            axes.axhline(edge + 0.5, color="white", linewidth=1)

    def _write(self, axes: Any, column: int, row: float, text: str, size: float, **style: Any) -> None:
        """A text in the middle of a cell, both counted from 0, cut to the cell's width."""
        room = max(int(0.85 * 72 * WIDTH / self.canvases.shape[1] / (0.65 * size)), 1)
        text = _drawable(text if len(text) <= room else f"{text[: max(room - 1, 1)]}…")
        axes.text(column + 1, row + 1, text, fontsize=size, ha="center", va="center", parse_math=False, **style)

    def _mark_answer(self, axes: Any, num_passes: int) -> None:
        """One more row of cells: the known answer, green where the result is the same, red where it is not."""
        from matplotlib.colors import ListedColormap

        assert self.trace.expected is not None
        expected, final = self.trace.expected[0, self.first :], self.trace.canvases[-1][0, self.first :]
        outcome = torch.where(expected < 0, 0, torch.where(expected == final, 1, 2))
        colors = ListedColormap([OPEN, RIGHT, WRONG])
        height = max(1.0, 0.06 * num_passes)  # of the row, so that it is seen below many
        bottom, middle = num_passes + 0.5 + height, num_passes + 0.5 + 0.55 * height
        extent = (0.5, len(final) + 0.5, bottom, num_passes + 0.5 + 0.1 * height)
        axes.imshow(
            outcome[None].numpy(), cmap=colors, vmin=0, vmax=2, aspect="auto", extent=extent, alpha=0.3, **SHARP
        )
        if self.has_letters:
            for column, (token, kind) in enumerate(zip(expected.tolist(), outcome.tolist())):
                if kind:
                    color, mark = (RIGHT, "✓") if kind == 1 else (WRONG, "✗")
                    self._write(axes, column, middle - 1, f"{mark} {self.texts(token)}", 13, color=color)
        axes.set(xlim=(0.5, len(final) + 0.5), ylim=(bottom, 0.5))
        ticks = [tick for tick in axes.get_yticks() if 1 <= tick <= num_passes]
        axes.set_yticks([*ticks, middle], [*(f"{tick:.0f}" for tick in ticks), "known answer"])

    def draw_updates(self, axes: Any) -> None:
        """How many updates each chunk got in each step, for the chunks that had something to decide."""
        from matplotlib.colors import LinearSegmentedColormap

        chunk_of_token = self.passes[0].chunk_of_token[0]
        was_open = self.trace.canvases[0][0] == self.trace.mask_token_id
        chunks = sorted({*chunk_of_token[was_open].tolist(), *self.num_steps.any(0).nonzero().flatten().tolist()})
        values = self.num_steps[:, chunks].T  # [chunks, S]
        shown = values.masked_fill(values == 0, torch.nan)
        most = max(int(values.max()), 1)
        extent = (0.5, self.num_passes + 0.5, len(chunks) + 0.5, 0.5)
        colors = LinearSegmentedColormap.from_list("updates", ["#e9ddff", REFINER])
        axes.set_facecolor(OPEN)
        image = axes.imshow(shown.numpy(), cmap=colors, vmin=0, vmax=most, aspect="auto", extent=extent, **SHARP)
        if values.numel() <= MOST_NUMBERED_CELLS and self.num_passes <= 20:
            size = 13 if self.num_passes <= 10 else 8
            for chunk, numbers in enumerate(values.int().tolist(), start=1):
                for step, number in enumerate(numbers, start=1):
                    text = plural(number, "update") if self.num_passes <= 4 else str(number)
                    color = "#999" if not number else "white" if number > most / 2 else "black"
                    axes.text(step, chunk, text, ha="center", va="center", color=color, fontsize=size)
        else:
            axes.figure.colorbar(image, ax=axes, label="updates")
        _whole_numbers(axes)
        if len(chunks) <= 12:
            spans = [(chunk_of_token == chunk).nonzero().flatten() - self.first + 1 for chunk in chunks]
            names = [f"tokens {max(int(span[0]), 1)}-{int(span[-1])}" for span in spans]
            axes.set_yticks(range(1, len(chunks) + 1), names)
        title = "Where it stepped in: updates of each chunk\n(none where the backbone was sure)"
        axes.set(title=title, xlabel="diffusion step", ylabel="" if len(chunks) <= 12 else "chunk")

    def draw_confidence(self, axes: Any) -> None:
        """The mean probability of the best guesses of the tokens still open, before and after refining, per step."""
        steps = range(1, self.num_passes + 1)
        if all(done.guesses is not None for done in self.passes):
            both = torch.stack([done.guess_probability[0].nanmean(-1) for done in self.passes]).T  # [2, S]
            title, names = (
                "Confidence: mean probability of the best\nguess, over the tokens still open",
                ("backbone", "after the refiner"),
            )
        else:  # of an earlier version
            refined = self.num_steps > 0
            values = first_row(self.trace, "chunk_confidence", "refiner_confidence")
            both = torch.stack([value.masked_fill(~refined, torch.nan).nanmean(-1) for value in values])
            title, names = "Confidence in the chunks refined", ("backbone", "the refiner's own")
        percent = 100 * both.numpy()
        axes.fill_between(steps, percent[0], percent[1], color=REFINER, alpha=0.1, linewidth=0)
        for values, name, color, marker in zip(percent, names, (BACKBONE, REFINER), "os"):
            axes.plot(
                steps, values, marker=marker, color=color, label=name, markersize=6 if self.num_passes <= 32 else 2
            )
        if self.num_passes <= 8:
            for step, (low, high) in enumerate(percent.T.tolist(), start=1):
                above = high >= low
                for value, color, is_above in ((low, BACKBONE, not above), (high, REFINER, above)):
                    if value == value:
                        axes.annotate(
                            f"{value:.0f}%", (step, value), (0, 9 if is_above else -9), textcoords="offset points",
                            ha="center", va="bottom" if is_above else "top", color=color, fontweight="bold",
                        )  # fmt: skip
        axes.set(title=title, xlabel="diffusion step", ylabel="%", ylim=(-4, 112), xlim=(0.6, self.num_passes + 0.4))
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="lower right", frameon=False)
        _whole_numbers(axes, "x")

    def draw_similarity(self, axes: Any) -> None:
        """How similar each update left a chunk to the update before: 1 is settled."""
        curves = [
            (f"step {step + 1}, chunk {chunk + 1}", curve)
            for step, chunks in enumerate(self.similarity)
            for chunk, curve in enumerate(chunks)
            if curve.isfinite().any()
        ]
        axes.set(
            title="Did it settle? Similarity of each update\nto the one before (1: no more change)", xlabel="update"
        )
        if not curves:
            axes.text(
                0.5, 0.5, "this refiner reports none", ha="center", va="center", transform=axes.transAxes, color="grey"
            )
            axes.set_axis_off()
            return
        if len(curves) <= MOST_CURVES:
            for number, (name, curve) in enumerate(curves):
                color = f"C{number}"
                axes.plot(range(1, len(curve) + 1), curve.numpy(), ".-", label=name, color=color)
            axes.legend(frameon=False, fontsize=9)
        else:
            stacked = torch.stack([curve for _, curve in curves])  # [curves, K]
            stacked = stacked[:, stacked.isfinite().any(0)]
            low, middle, high = stacked.nanquantile(torch.tensor([0.1, 0.5, 0.9]), dim=0).numpy()
            updates = range(1, stacked.shape[1] + 1)
            axes.fill_between(updates, low, high, color=REFINER, alpha=0.2, linewidth=0, label="80% of them")
            axes.plot(updates, middle, "o-", color=REFINER, label=f"median of {plural(len(curves), 'refinement')}")
            axes.legend(frameon=False, fontsize=9)
        axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.grid(axis="y", alpha=0.3)
        _whole_numbers(axes, "x")


def _whole_numbers(axes: Any, which: str = "both") -> None:
    from matplotlib.ticker import MaxNLocator

    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        if which in (name, "both"):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _drawable(text: str) -> str:
    """The text with a box for every character that matplotlib's own font lacks; it would warn of each."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(character if ord(character) in known else "□" for character in text)


TRACE_RENDERERS["plot"] = plot_trace
