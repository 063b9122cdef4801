"""What generators of problems share: the split that a problem belongs to, and drawing until there are enough."""

import hashlib
from collections.abc import Callable, Iterator

_DRAWS_A_FIND = 200
Problem = dict[str, str]  # prompt, reasoning, answer


def check_split(split: str) -> None:
    """Raises ValueError for a split that no generator has."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")


def split_of(key: str) -> str:
    """
    `"test"` for a tenth of all keys, else `"train"`, by their hash: the same in every run, whatever the seed. Problems
    that must not be in both splits need the same key.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < 2**64 // 10 else "train"


def draw_distinct(
    draw: Callable[[], Problem | None], num_problems: int, most_misses: int, described: str, remedy: str
) -> Iterator[Problem]:
    """
    Yields `num_problems` problems with different prompts.

    Args:
        draw: makes one at random; None if what it made will not do.
        most_misses: draws in a row that may give nothing new. A find makes up for 200: fewer would take too long.
        described: what is drawn, in the plural, for the error.
        remedy: what to ask for instead.

    Raises:
        ValueError: if there are not so many, or finding them takes too long.
    """
    seen: set[str] = set()
    misses = draws = 0
    while len(seen) < num_problems:
        problem = draw()
        draws += 1
        if problem is not None and problem["prompt"] not in seen:
            seen.add(problem["prompt"])
            misses = max(misses - _DRAWS_A_FIND, 0)
            yield problem
        elif (misses := misses + 1) >= most_misses:
            wanted = f"{num_problems:,} different {described}"
            raise ValueError(f"Of {wanted}, {draws:,} draws found {len(seen):,}, and new ones are rare: {remedy}.")
