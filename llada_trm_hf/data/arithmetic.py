"""Generated arithmetic: reasoning problems of any difficulty, made on the spot."""

import random
from collections.abc import Iterator


def running_sums(
    num_problems: int, num_terms: int = 8, split: str = "train", seed: int = 0
) -> Iterator[dict[str, str]]:
    """
    Sums of single digits, with the last digit of every running total as the reasoning.

    Each total follows from the one before in one look-up, so a model that writes them one after the other learns the
    task quickly; written all at once, the last one takes `num_terms - 1` look-ups in a single forward pass.

    Args:
        num_problems: how many to make, all different.
        num_terms: digits in a sum; the difficulty.
        split: `"train"` or `"test"`, which share no problem.
        seed: of the random generator.

    Yields:
        `{"prompt": "3942=", "reasoning": "326", "answer": "8"}`: 3, 3+9=12, 12+4=16, 16+2=18.

    Raises:
        ValueError: for an unknown split, or more problems than there are.
    """
    if num_terms < 2:
        raise ValueError(f"num_terms must be at least 2, got {num_terms}.")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    generator, seen, misses = random.Random(f"{split}-{num_terms}-{seed}"), set(), 0
    while len(seen) < num_problems:
        number = generator.randrange(10**num_terms)
        if number in seen or _is_held_out(number) != (split == "test"):
            misses += 1
            if misses > 1000 * (num_problems + 1):
                raise ValueError(
                    f"There are fewer than {num_problems} different {split} sums of {num_terms} digits: ask for fewer "
                    f"problems or more terms."
                )
            continue
        seen.add(number)
        digits = f"{number:0{num_terms}d}"
        total, totals = 0, ""
        for digit in digits:
            total += int(digit)
            totals += str(total % 10)
        yield {"prompt": f"{digits}=", "reasoning": totals[:-1], "answer": totals[-1]}


def _is_held_out(number: int) -> bool:
    """Whether a problem belongs to the test split: a tenth of all, spread evenly by a multiplicative hash."""
    return (number * 2654435761 % 2**32) / 2**32 < 0.1
