"""Generated mazes with exactly one shortest path."""

import functools
from collections.abc import Iterator
from random import Random

from .distinct_problems import Problem, check_split, draw_distinct, split_of

WALL, OPEN, START, GOAL, PATH = "#", ".", "S", "G", "*"
_LARGEST = 99
_OPENED = 0.1  # of the walls between rooms that a tree leaves: with none, every path would be the only one
_MOST_MISSES = 2_000  # reached where a maze is so small that there are not many


def mazes(num_problems: int, puzzle_size: int = 9, split: str = "train", seed: int = 0) -> Iterator[Problem]:
    """
    Mazes of `puzzle_size` x `puzzle_size` cells, each a wall `#` or open `.`, with a start `S` and a goal `G` between
    which one path is shorter than all others. The cells in odd rows and columns (from 1) are rooms; a depth-first walk
    joins all of them, and a tenth of the walls that it leaves between two rooms is opened too, so there are detours.
    What is outside of the grid is wall.

    The splits share no maze, turned, mirrored or with another start and goal.

    Args:
        num_problems: how many to make, all different.
        puzzle_size: cells of a side, walls included: an odd number from 5 to 99. A path has as many steps at least as
            lead from one side to the other.
        split: `"train"` or `"test"`.
        seed: of the random numbers.

    Yields:
        `{"prompt": "S.#...", "reasoning": "", "answer": "S*#..."}`, with `=` at the prompt's end: cell i of the
        prompt, row by row, is position i of the answer, in which the cells of the path are `*`.

    Raises:
        ValueError: for an unknown split, a size that is even or out of range, or more mazes than are found.
    """
    if not 5 <= puzzle_size <= _LARGEST or puzzle_size % 2 == 0:
        raise ValueError(f"puzzle_size of a maze must be an odd number from 5 to {_LARGEST}, got {puzzle_size}.")
    check_split(split)
    random = Random(f"maze-{split}-{puzzle_size}-{seed}")
    neighbours = _neighbours(puzzle_size, 1)
    rooms = [room for room in range(puzzle_size**2) if room // puzzle_size % 2 == room % puzzle_size % 2 == 0]

    def draw() -> Problem | None:
        grid = _carve(puzzle_size, rooms, random)
        if split_of(_up_to_symmetry("".join(grid), puzzle_size)) != split:
            return None
        start = random.choice(rooms)
        distance, num_paths = _shortest_paths(grid, start, neighbours)
        goals = [room for room in rooms if num_paths[room] == 1 and distance[room] >= puzzle_size - 1]
        if not goals:
            return None
        goal = random.choice(goals)
        grid[start], grid[goal] = START, GOAL
        solved = grid.copy()
        cell = goal
        while distance[cell] > 1:  # back along the only path
            cell = next(n for n in neighbours[cell] if grid[n] != WALL and distance[n] == distance[cell] - 1)
            solved[cell] = PATH
        return {"prompt": f"{''.join(grid)}=", "reasoning": "", "answer": "".join(solved)}

    described = f"{split} mazes of {puzzle_size}x{puzzle_size} cells"
    return draw_distinct(draw, num_problems, _MOST_MISSES, described, "ask for fewer, or a larger puzzle_size")


def _carve(size: int, rooms: list[int], random: Random) -> list[str]:
    """The cells of a maze without start and goal."""
    grid = [WALL] * size**2
    neighbours = _neighbours(size, 2)  # of rooms
    room = random.choice(rooms)
    grid[room], path = OPEN, [room]
    closed: set[int] = set()
    while path:
        room = path[-1]
        unvisited = [other for other in neighbours[room] if grid[other] == WALL]
        if unvisited:
            other = random.choice(unvisited)
            grid[(room + other) // 2] = grid[other] = OPEN
            path.append(other)
        else:
            closed.update((room + other) // 2 for other in neighbours[room] if grid[(room + other) // 2] == WALL)
            path.pop()
    for wall in sorted(closed):
        if random.random() < _OPENED:
            grid[wall] = OPEN
    return grid


def _shortest_paths(grid: list[str], start: int, neighbours: list[list[int]]) -> tuple[list[int], list[int]]:
    """The distance of each cell from the start, -1 for a wall, and how many paths are that short."""
    distance, num_paths = [-1] * len(grid), [0] * len(grid)
    distance[start], num_paths[start] = 0, 1
    reached = [start]
    for cell in reached:  # which grows
        for other in neighbours[cell]:
            if distance[other] < 0 and grid[other] != WALL:
                distance[other] = distance[cell] + 1
                reached.append(other)
            if distance[other] == distance[cell] + 1:
                num_paths[other] += num_paths[cell]
    return distance, num_paths


def _up_to_symmetry(cells: str, size: int) -> str:
    """The first, in the order of texts, of the eight ways to turn and mirror a grid."""
    ways = []
    for _ in range(4):
        mirrored = "".join(cells[start : start + size][::-1] for start in range(0, size**2, size))
        ways += [cells, mirrored]
        cells = "".join(mirrored[column::size] for column in range(size))  # mirrored and transposed: turned
    return min(ways)


@functools.cache
def _neighbours(size: int, step: int) -> list[list[int]]:
    """The cells that are `step` away from each cell, up, left, right and down."""
    return [
        [
            (row + down) * size + column + right
            for down, right in ((-step, 0), (0, -step), (0, step), (step, 0))
            if 0 <= row + down < size and 0 <= column + right < size
        ]
        for row in range(size)
        for column in range(size)
    ]
