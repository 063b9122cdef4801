"""
A sudoku as one integer, and a plain solver of it: naked and hidden singles, then guesses.

Bit `digit * cells + cell` of a state says that the cell may still hold the digit (both from 0). A unit is a set of `n`
bits of which exactly one is true: a cell and its digits, or a row, column or box and one digit's places in it. The
units of a kind have the same shape, so operations on the whole integer find the singles of all of them at once.
"""

import functools
from collections.abc import Iterable, Iterator
from random import Random
from typing import NamedTuple

BOX_SHAPES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box


class _UnitKind(NamedTuple):
    first: int  # the first bit of each unit
    shifts: list[int]  # from there to each of its bits
    pattern: int  # the bits of a unit whose first is bit 0


class SudokuSolver:
    """
    Solves sudokus of `size` 4, 6 or 9; see `sudoku_solver`.

    Attributes:
        cells: their number.
        everything: the state of an empty grid.
        consequences: for each bit, the bits that may still be set if it is true.
        units_of: for each bit, its four units.
    """

    def __init__(self, size: int):
        height, width = BOX_SHAPES[size]
        self.size, self.cells = size, size * size
        self.everything = (1 << size**3) - 1
        numbers = range(size)

        def bits(digits: range, rows: range, columns: range) -> int:
            places = (d * self.cells + r * size + c for d in digits for r in rows for c in columns)
            return sum(1 << place for place in places)

        def kind(digits: range, rows: range, columns: range, shifts: list[int]) -> _UnitKind:
            return _UnitKind(bits(digits, rows, columns), shifts, sum(1 << shift for shift in shifts))

        one, box_rows, box_columns = range(1), range(0, size, height), range(0, size, width)
        self._kinds = [
            kind(one, numbers, numbers, [digit * self.cells for digit in numbers]),
            kind(numbers, numbers, one, list(numbers)),
            kind(numbers, one, numbers, [row * size for row in numbers]),
            kind(numbers, box_rows, box_columns, [r * size + c for r in range(height) for c in range(width)]),
        ]
        self.units_of: list[list[int]] = [[] for _ in range(size**3)]
        for first, shifts, pattern in self._kinds:
            for start in bit_numbers(first):
                for shift in shifts:
                    self.units_of[start + shift].append(pattern << start)
        self.consequences = []
        for bit, units in enumerate(self.units_of):
            excluded = functools.reduce(int.__or__, units) & ~(1 << bit)
            self.consequences.append(self.everything & ~excluded)
        self._candidates = [self._kinds[0].pattern << cell for cell in range(self.cells)]

    def state(self, clues: Iterable[int]) -> tuple[int, int]:
        """The state in which these bits are true, and the bits decided in it; singles are not looked for."""
        state, decided = self.everything, 0
        for bit in clues:
            state &= self.consequences[bit]
            decided |= 1 << bit
        return state, decided

    def fill_singles(self, state: int, decided: int) -> tuple[int, int]:
        """Decides what is the only candidate of a cell, or a digit's only place in a unit; (0, 0) if that fails."""
        before = -1
        while decided != before:
            before = decided
            for first, shifts, pattern in self._kinds:
                once = twice = 0
                for shift in shifts:
                    members = state >> shift
                    twice |= once & members
                    once |= members
                once &= first
                if once != first:  # a unit without candidates
                    return 0, 0
                singles = (once & ~twice) * pattern & state & ~decided
                if singles:
                    decided |= singles
                    for bit in bit_numbers(singles):
                        state &= self.consequences[bit]
                    if decided & ~state:  # two singles exclude each other
                        return 0, 0
        return state, decided

    def search(
        self, state: int, decided: int = 0, most_solutions: int = 1, random: Random | None = None
    ) -> tuple[list[int], int]:
        """
        Up to `most_solutions` solutions, and the number of guesses tried. Where singles end, every candidate of the
        first cell with the fewest is a guess; they are tried in the order of the digits, or with `random` in any.
        """
        solutions: list[int] = []
        guesses = 0
        waiting = [(state, decided)]
        while waiting and len(solutions) < most_solutions:
            state, decided = self.fill_singles(*waiting.pop())
            if decided.bit_count() == self.cells:
                solutions.append(state)
            elif state:
                candidates = list(bit_numbers(self._cell_to_guess(state, decided)))
                if random is not None:
                    random.shuffle(candidates)
                guesses += len(candidates)
                waiting += [(state & self.consequences[bit], decided | 1 << bit) for bit in reversed(candidates)]
        return solutions, guesses

    def _cell_to_guess(self, state: int, decided: int) -> int:
        """The candidates of the undecided cell that has the fewest."""
        fewest, found = self.size + 1, 0
        for cell in self._candidates:
            candidates = state & cell
            if not candidates & decided and (number := candidates.bit_count()) < fewest:
                fewest, found = number, candidates
                if number == 2:
                    break
        return found

    def read(self, grid: str) -> list[int]:
        """The bits that the digits of a grid, row by row, say are true."""
        return [(int(digit) - 1) * self.cells + cell for cell, digit in enumerate(grid) if digit not in ".0"]

    def write(self, clues: Iterable[int]) -> str:
        """The grid of these bits, row by row, with `.` for a cell without any."""
        grid = ["."] * self.cells
        for bit in clues:
            digit, cell = divmod(bit, self.cells)
            grid[cell] = str(digit + 1)
        return "".join(grid)


@functools.cache
def sudoku_solver(size: int) -> SudokuSolver:
    """The solver for a size, made once."""
    return SudokuSolver(size)


def bit_numbers(bits: int) -> Iterator[int]:
    """The numbers of the bits that are set, from the lowest."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
