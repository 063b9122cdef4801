"""The cells of a trace whose response is a square grid: a sudoku, a maze."""

import math
from typing import Any

from ..generation import RefinementTrace
from .trace_story import TokenTexts

_BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box of a sudoku
_EMPTY = (".", "0")  # in a prompt


class TraceGrid:
    """
    The first `width * width` tokens of each response as the cells of a grid, row by row.

    Where a prompt ends with as many tokens of one character each and one more, such as `=`, these are the same grid
    before it was filled in: the cells that are neither `.` nor `0` there were given.

    Raises:
        ValueError: if a width is none, or the response has not so many tokens.
    """

    def __init__(self, trace: RefinementTrace, width: int, texts: TokenTexts):
        num_new = trace.canvases[0].shape[1] - trace.prompt_length
        if width < 2 or width * width > num_new:
            raise ValueError(
                f"grid_width={width} does not fit: a grid needs a width of at least 2 and a token for each cell, and "
                f"{num_new} tokens were generated (room for a width of {math.isqrt(num_new)})."
            )
        self.trace, self.width, self.texts = trace, width, texts
        self.first = trace.prompt_length  # the column of the first cell

    def given(self, row: int) -> list[int]:
        """For each cell the token that the prompt of a row of the batch gives, -1 where it gives none."""
        cells = self.width**2
        prompt = self.trace.canvases[0][row, max(self.first - 1 - cells, 0) : max(self.first - 1, 0)].tolist()
        letters = [self.texts.texts.get(token, "") for token in prompt]
        if len(prompt) < cells or any(len(letter) != 1 for letter in letters):
            return [-1] * cells
        return [-1 if letter in _EMPTY else token for token, letter in zip(prompt, letters)]

    def boxes(self) -> tuple[int, int] | None:
        """Rows and columns of a box where all that is given are digits of a sudoku; None elsewhere."""
        tokens = {token for row in range(len(self.trace.canvases[0])) for token in self.given(row)} - {-1}
        letters = {self.texts.texts[token] for token in tokens}
        return _BOXES.get(self.width) if letters and letters <= set("123456789"[: self.width]) else None

    def place(self, column: int) -> str:
        """A column of the canvas for a reader."""
        row, place = divmod(column - self.first, self.width)
        return f"row {row + 1}, column {place + 1}" if 0 <= row < self.width else "behind the grid"

    def data(self) -> dict[str, Any]:
        """For the page's script."""
        return {"width": self.width, "first": self.first, "boxes": self.boxes()}
