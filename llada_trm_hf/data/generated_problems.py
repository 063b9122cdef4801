"""The datasets that are made on the spot, by name, and the options that say what their problems are like."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from .arithmetic import difference_chains
from .distinct_problems import Problem
from .maze import mazes
from .prefix_sum import prefix_sums
from .reasoning_sources import SCHEMA
from .rows import Rows, parse_split, row_range, text_features
from .sudoku import sudoku_puzzles

# What makes each: a function of the number of problems, its own options, the split and the seed.
GENERATORS: dict[str, Callable[..., Iterator[Problem]]] = {
    "arithmetic": difference_chains,
    "prefix_sum": prefix_sums,
    "sudoku": sudoku_puzzles,
    "maze": mazes,
}
_NUMBER_OF_PROBLEMS = {"train": 50_000, "test": 1_000}  # where the split is not sliced
_SLOW = 3  # seconds after which a bar shows how far it is


@dataclass(kw_only=True)
class GeneratorOptions:
    """
    Options of generated datasets, inherited by all settings that name a dataset; None is the dataset's own default.
    Each takes those that its function does: `difference_chains`, `prefix_sums`, `sudoku_puzzles`, `mazes`.
    """

    num_terms: int | None = HfArg(default=None, help="Digits of generated arithmetic (8) or bits of prefix_sum (32).")
    puzzle_size: int | None = HfArg(default=None, help="Side of a generated sudoku: 4, 6 or 9 (4), or maze: odd (9).")
    num_clues: list[int] | None = HfArg(default=None, help="Clues of a generated sudoku: a number, or least and most.")
    num_guesses: list[int] | None = HfArg(default=None, help="Guesses a plain solver needs for it, in the same way.")

    def generator_options(self) -> dict[str, Any]:
        """The options that are given."""
        options = {field.name: getattr(self, field.name) for field in fields(GeneratorOptions)}
        return {name: value for name, value in options.items() if value is not None}


def options_taken(name: str) -> dict[str, Any]:
    """The options that a generated dataset takes, and their defaults."""
    known = {field.name for field in fields(GeneratorOptions)}
    parameters = inspect.signature(GENERATORS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name in known}


def generate_problems(name: str, split: str, seed: int, options: dict[str, Any], streaming: bool = False) -> Rows:
    """
    The problems of a split or a slice of one, of a generated dataset with its `options`; a stream makes them anew,
    from the first, whenever it is read.

    Raises:
        ValueError: for an option that the dataset does not take, an empty slice, and as its function does.
    """
    taken = options_taken(name)
    for option, value in options.items():
        if option not in taken:
            raise ValueError(f"{name} takes no {option} (got {value}), only {', '.join(taken)}: leave it out.")
    split_name, _ = parse_split(split)
    start, stop = row_range(split, name)
    stop = _NUMBER_OF_PROBLEMS[split_name] if stop is None else stop
    if start >= stop:
        raise ValueError(f"{name} [{split}] is empty: {split_name} has the problems from {start:,} to {stop:,} then.")
    make = partial(GENERATORS[name], stop, split=split_name, seed=seed, **options)
    next(make())  # what is wrong with the options is raised here, not when a stream is read

    def problems() -> Iterator[Problem]:
        return islice(make(), start, None)

    if streaming:
        return IterableDataset.from_generator(problems, features=text_features(SCHEMA))
    progress = tqdm(problems(), desc=f"Generating {name}", total=stop - start, delay=_SLOW)
    return Dataset.from_list(list(progress), features=text_features(SCHEMA))
