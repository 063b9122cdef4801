"""Generated arithmetic: reasoning problems of any difficulty."""

import random
from collections.abc import Iterator
from itertools import pairwise


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
        ValueError: for an unknown split, or more problems than there are.
    """
    if num_terms < 2:
        raise ValueError(f"num_terms must be at least 2, got {num_terms}.")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    generator, misses = random.Random(f"{split}-{num_terms}-{seed}"), 0
    seen: set[int] = set()
    while len(seen) < num_problems:
        number = generator.randrange(10**num_terms)
        # A multiplicative hash spreads the tenth of all problems that is the test split.
        is_test = (number * 2654435761 % 2**32) / 2**32 < 0.1
        if number in seen or is_test != (split == "test"):
            misses += 1
            if misses > 1000 * (num_problems + 1):
                chains = f"{num_problems} different {split} chains of {num_terms} digits"
                raise ValueError(f"There are fewer than {chains}: ask for fewer problems or more terms.")
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
