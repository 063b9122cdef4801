"""Generated sudokus of 4x4, 6x6 and 9x9 cells with one solution each, and how hard they are."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from random import Random

from .distinct_problems import Problem, check_split, draw_distinct, split_of
from .sudoku_solver import BOX_SHAPES, SudokuSolver, bit_numbers, sudoku_solver

# The fewest clues with which a solution can be unique; for 9x9: McGuire, Tugemann and Civario 2012, arXiv 1201.0749.
_FEWEST_CLUES = {4: 4, 6: 8, 9: 17}
_DEFAULT_CLUES = {4: (4, 8), 6: (9, 16), 9: (24, 34)}
# Puzzles of 4x4 cells with one solution, by the number of clues; those with four are the fewest.
_PUZZLES_OF_4 = dict(
    zip(
        range(4, 16),
        (25728, 284160, 1041408, 2141184, 2961024, 2958336, 2204928, 1239552, 522624, 161280, 34560, 4608),
    )
)
_MOST_MISSES = {4: 20_000, 6: 2_000, 9: 500}  # a few seconds


def sudoku_puzzles(
    num_problems: int,
    puzzle_size: int = 4,
    num_clues: int | Sequence[int] | None = None,
    num_guesses: int | Sequence[int] | None = None,
    split: str = "train",
    seed: int = 0,
) -> Iterator[Problem]:
    """
    Sudokus with exactly one solution: clues are taken from a random solution, in random order, as long as it stays the
    only one and more are left than wanted.

    The splits share no puzzle of 4x4 cells (whose 288 solutions are two up to symmetry), no solution of 6x6, and of
    9x9 no solution up to symmetry: a grid of one split becomes none of the other by any relabelling of the digits,
    exchange of bands, of stacks, of rows in a band and of columns in a stack, or transposition.

    Args:
        num_problems: how many to make, all different.
        puzzle_size: cells of a side: 4 (boxes of 2x2), 6 (2x3) or 9 (3x3).
        num_clues: a number, or the least and the most; fewer are harder. By default 4 to 8, 9 to 16, 24 to 34.
        num_guesses: a number, or the least and the most, of `sudoku_guesses`. By default any.
        split: `"train"` or `"test"`.
        seed: of the random numbers.

    Yields:
        `{"prompt": ".3..14...1233..4=", "reasoning": "", "answer": "2341143241233214"}`: cell i of the prompt, row by
        row, is position i of the answer.

    Raises:
        ValueError: for an unknown size or split, a range that is none, or more puzzles than are found.
    """
    if puzzle_size not in BOX_SHAPES:
        raise ValueError(f"puzzle_size of a sudoku must be 4, 6 or 9, got {puzzle_size}.")
    check_split(split)
    cells = puzzle_size**2
    clues = _bounds("num_clues", num_clues, (_FEWEST_CLUES[puzzle_size], cells - 1), _DEFAULT_CLUES[puzzle_size])
    guesses = _bounds("num_guesses", num_guesses, (0, math.inf), (0, math.inf))
    random = Random(f"sudoku-{split}-{puzzle_size}-{clues}-{seed}")
    solver = sudoku_solver(puzzle_size)

    def draw() -> Problem | None:
        solution = _random_solution(solver, split, random)
        puzzle = _take_clues(solver, solution, random.randint(*map(int, clues)), random)
        prompt, answer = solver.write(puzzle), solver.write(bit_numbers(solution))
        if not clues[0] <= len(puzzle) <= clues[1] or (puzzle_size == 4 and split_of(prompt) != split):
            return None
        if num_guesses is not None and not guesses[0] <= sudoku_guesses(prompt) <= guesses[1]:
            return None
        return {"prompt": f"{prompt}=", "reasoning": "", "answer": answer}

    described = f"{split} sudokus of {puzzle_size}x{puzzle_size} cells with {_told(clues)} clues"
    if puzzle_size == 4:
        _check_number(num_problems, range(int(clues[0]), int(clues[1]) + 1), split, described)
    described += "" if num_guesses is None else f" and {_told(guesses)} guesses"
    remedy = "ask for fewer, for more clues or for any num_guesses"
    return draw_distinct(draw, num_problems, _MOST_MISSES[puzzle_size], described, remedy)


def sudoku_guesses(puzzle: str) -> int:
    """
    How hard a sudoku is: the guesses that a plain solver tries until all are refuted but the solution. It fills in
    what is the only candidate of a cell, or the only place of a digit in a row, column or box; where that ends, it
    tries each candidate of the first cell, row by row, that has the fewest.

    Args:
        puzzle: 16, 36 or 81 cells, row by row, empty ones as `.` or `0`; an `=`, as in a prompt, may follow.

    Raises:
        ValueError: for any other text, or a puzzle with no solution or several.
    """
    grid = puzzle.removesuffix("=")
    size = math.isqrt(len(grid))
    if size not in BOX_SHAPES or size**2 != len(grid):
        raise ValueError(f"A sudoku has 16, 36 or 81 cells; got {len(grid)} in {puzzle!r}.")
    wrong = set(grid) - set(".0123456789"[: size + 2])
    if wrong:
        raise ValueError(f"A cell is a digit from 1 to {size}, or . or 0 for none; got {min(wrong)!r} in {puzzle!r}.")
    solver = sudoku_solver(size)
    solutions, guesses = solver.search(*solver.state(solver.read(grid)), most_solutions=2)
    if len(solutions) != 1:
        number = "several solutions" if solutions else "no solution"
        raise ValueError(f"A sudoku has one solution; {puzzle!r} has {number}.")
    return guesses


def _check_number(num_problems: int, num_clues: range, split: str, described: str) -> None:
    """Raises ValueError for more than half of the puzzles of 4x4 cells: the last ones take long to find."""
    available = (0.1 if split == "test" else 0.9) * sum(_PUZZLES_OF_4[number] for number in num_clues)
    if num_problems > available / 2:
        raise ValueError(
            f"There are about {int(available):,} different {described}, and at most half of them are drawn: "
            f"{num_problems:,} are too many. Ask for fewer, or a wider range of num_clues."
        )


def _random_solution(solver: SudokuSolver, split: str, random: Random) -> int:
    """A solution of an empty grid that belongs to the split, as a state of the solver."""
    height, width = BOX_SHAPES[solver.size]
    while True:
        # Boxes on the diagonal do not exclude each other: at random first, which spares most of the guesses.
        clues = []
        for corner in range(min(solver.size // height, solver.size // width)):
            row, column = corner * height, corner * width
            digits = random.sample(range(solver.size), solver.size)
            for place, digit in enumerate(digits):
                cell = (row + place // width) * solver.size + column + place % width
                clues.append(digit * solver.cells + cell)
        solutions, _ = solver.search(*solver.state(clues), random=random)
        if solutions and (solver.size == 4 or split_of(_split_key(solver.write(bit_numbers(solutions[0])))) == split):
            return solutions[0]


def _take_clues(solver: SudokuSolver, solution: int, num_clues: int, random: Random) -> list[int]:
    """The clues that are left of a solution: `num_clues`, or more where none can be spared."""
    clues = list(bit_numbers(solution))
    random.shuffle(clues)
    # The state that clue i and all after it lead to, and the one of the clues before it that were needed.
    later = [solver.everything]
    for bit in reversed(clues):
        later.append(later[-1] & solver.consequences[bit])
    later.reverse()
    needed: list[int] = []
    state, decided = solver.everything, solution
    for i, bit in enumerate(clues):
        if len(needed) + len(clues) - i <= num_clues:
            return needed + clues[i:]
        # The clue can be spared if there is no solution in which its cell holds another digit.
        other_state, other_decided = state & later[i + 1] & ~(1 << bit), decided & ~(1 << bit)
        possible = all(other_state & unit for unit in solver.units_of[bit])
        if possible and solver.search(other_state, other_decided)[0]:
            needed.append(bit)
            state &= solver.consequences[bit]
        else:
            decided = other_decided
    return needed


def _split_key(solution: str) -> str:
    """
    What decides on the split: of 6x6 cells the solution; of 9x9 what no symmetry changes. Two rows of a band are a
    permutation, which takes each digit of one to the digit below it in the other. Exchanging columns does not change
    it, relabelling conjugates it, so the lengths of its cycles stay; the order of rows, bands and of rows and columns
    is left out.
    """
    if len(solution) != 81:
        return solution
    rows = [solution[start : start + 9] for start in range(0, 81, 9)]
    columns = [solution[start::9] for start in range(9)]
    return str(sorted(sorted(_band_cycles(lines[i : i + 3]) for i in (0, 3, 6)) for lines in (rows, columns)))


def _band_cycles(lines: list[str]) -> list[list[int]]:
    """The lengths of the cycles of each two of three lines."""
    return sorted(_cycle_lengths(dict(zip(first, second))) for first, second in combinations(lines, 2))


def _cycle_lengths(permutation: dict[str, str]) -> list[int]:
    lengths = []
    while permutation:
        start, length = next(iter(permutation)), 0
        while start in permutation:
            start, length = permutation.pop(start), length + 1
        lengths.append(length)
    return sorted(lengths)


def _bounds(
    name: str, value: int | Sequence[int] | None, possible: tuple[float, float], default: tuple[float, float]
) -> tuple[float, float]:
    """The least and the most of an option; ValueError for what is no range, or not a possible one."""
    if value is None:
        return default
    numbers = [value] if isinstance(value, int) else list(value)
    least, most = possible
    if len(numbers) not in (1, 2) or not least <= numbers[0] <= numbers[-1] <= most:
        limits = f"from {least} to {most}" if most < math.inf else f"from {least}"
        found = " ".join(map(str, numbers))
        raise ValueError(f"{name} must be a number {limits}, or the least and the most such as 5 8; got {found}.")
    return numbers[0], numbers[-1]


def _told(bounds: tuple[float, float]) -> str:
    least, most = bounds
    return f"{least}" if least == most else f"{least} or more" if most == math.inf else f"{least} to {most}"
