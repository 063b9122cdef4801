"""Generated arithmetic: reasoning problems of any difficulty."""

import math
import random
from collections.abc import Iterator
from itertools import pairwise

_MOST_DRAWS = 2e7  # about 20 seconds


def difference_chains(
    num_problems: int, num_terms: int = 8, split: str = "train", seed: int = 0, equations: bool = False
) -> Iterator[dict[str, str]]:
    """
    Chains of single-digit operations: take the difference of the running value and the next digit, again and again.

    Written step by step, each value follows from the one before in one look-up, which a small model learns quickly.
    Answered at once, it takes `num_terms - 1` look-ups in a single forward pass, without a shortcut: unlike a sum, a
    chain of absolute differences cannot be regrouped.

    Args:
        num_problems: how many to make, all different.
        num_terms: digits in a chain; the difficulty.
        split: `"train"` or `"test"`, which share no problem.
        equations: write each step of the reasoning as a chain of its own, `39=6 64=2 22=0`.

    Yields:
        `{"prompt": "3942=", "reasoning": "362", "answer": "0"}`: 3, |3-9|=6, |6-4|=2, |2-2|=0.

    Raises:
        ValueError: for an unknown split, more problems than there are, or so many that they take minutes to find.
    """
    if not 2 <= num_terms <= 1000:
        raise ValueError(f"num_terms must be between 2 and 1000, got {num_terms}.")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    _check_number(num_problems, num_terms, split)
    generator = random.Random(f"{split}-{num_terms}-{seed}")
    seen: set[int] = set()
    while len(seen) < num_problems:
        number = generator.randrange(10**num_terms)
        if number in seen or _is_test(number) != (split == "test"):
            continue
        seen.add(number)
        digits = f"{number:0{num_terms}d}"
        values = [int(digits[0])]
        for digit in digits[1:]:
            values.append(abs(values[-1] - int(digit)))
        if equations:
            reasoning = " ".join(f"{a}{digit}={b}" for (a, b), digit in zip(pairwise(values), digits[1:]))
        else:
            reasoning = "".join(map(str, values[:-1]))
        yield {"prompt": f"{digits}=", "reasoning": reasoning, "answer": str(values[-1])}


def _is_test(number: int) -> bool:
    """Whether a chain belongs to the tenth that is the test split, which a multiplicative hash spreads."""
    return (number * 2654435761 % 2**32) / 2**32 < 0.1


def _check_number(num_problems: int, num_terms: int, split: str) -> None:
    """Raises ValueError if there are not so many chains, or finding them takes too many draws."""
    chains = f"{num_problems:,} different {split} chains of {num_terms} digits"
    all_chains = 10.0 ** min(num_terms, 300)
    available = all_chains * (0.1 if split == "test" else 0.9)
    if num_terms <= 5:
        available = sum(_is_test(number) == (split == "test") for number in range(10**num_terms))
    if num_problems > available:
        raise ValueError(f"There are fewer than {chains}: ask for fewer problems or more terms.")
    # Of a draw, the chance to be new shrinks from `available / all_chains` to that of the last chain that is missing.
    draws = all_chains / available * num_problems
    if num_problems > available / 10:
        draws = all_chains * math.log(available / max(available - num_problems, 1))
    if draws > _MOST_DRAWS:
        raise ValueError(f"Making {chains} takes minutes: they are drawn one by one, from the first. Ask for fewer.")
