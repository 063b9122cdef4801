"""Generated prefix sums: the parity of a row of bits up to each of them."""

import random
from collections.abc import Iterator
from itertools import accumulate
from operator import xor

from .distinct_problems import Problem, check_split, draw_distinct, split_of

_MOST_MISSES = 50_000  # a tenth of a second


def prefix_sums(num_problems: int, num_terms: int = 32, split: str = "train", seed: int = 0) -> Iterator[Problem]:
    """
    Rows of bits, and for each bit the parity of all up to it: the task on which recurrent networks were first shown to
    solve longer inputs than they were trained on by iterating longer (Schwarzschild et al. 2021, arXiv 2106.04537).

    Args:
        num_problems: how many to make, all different.
        num_terms: bits of a row; the difficulty.
        split: `"train"` or `"test"`, which share no row of bits.
        seed: of the random numbers.

    Yields:
        `{"prompt": "10110=", "reasoning": "", "answer": "11011"}`: position i of the answer belongs to bit i.

    Raises:
        ValueError: for an unknown split, a `num_terms` out of range, or more problems than there are.
    """
    if not 2 <= num_terms <= 1000:
        raise ValueError(f"num_terms must be between 2 and 1000, got {num_terms}.")
    check_split(split)
    share = 0.1 if split == "test" else 0.9
    described = f"{split} rows of {num_terms} bits"
    if num_problems > share * 2**num_terms:
        raise ValueError(
            f"There are about {int(share * 2**num_terms):,} different {described}, not {num_problems:,}: ask for "
            f"fewer problems or more terms."
        )
    generator = random.Random(f"prefix_sum-{split}-{num_terms}-{seed}")

    def draw() -> Problem | None:
        bits = f"{generator.getrandbits(num_terms):0{num_terms}b}"
        if split_of(bits) != split:
            return None
        return {"prompt": f"{bits}=", "reasoning": "", "answer": "".join(map(str, accumulate(map(int, bits), xor)))}

    return draw_distinct(draw, num_problems, _MOST_MISSES, described, "ask for fewer problems or more terms")
