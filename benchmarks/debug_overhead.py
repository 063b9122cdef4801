"""
What the hybrid's debug mode costs while it is off: the forward pass as it is against the same one without the
decorator that looks for debug mode, same model and inputs, in turn in one process.

    python benchmarks/debug_overhead.py [--repeats 201] [--threads 2]

Prints a table and writes benchmarks/results/debug_overhead.json. The cost does not depend on the model, so it shows
most in a small one; what a look for debug mode takes by itself is measured as well.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from timeit import timeit
from typing import Any

import torch
from record import circumstances, write_result
from transformers.utils import can_return_tuple

from llada_trm_hf import (
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
)
from llada_trm_hf.models.llada_trm.modeling_llada_trm import reported

CASES = {"hidden 64, 1 layer, 16 tokens": (64, 1, 16), "hidden 512, 8 layers, 128 tokens": (512, 8, 128)}
# The function that `@can_return_tuple` and `@reported` decorate.
BARE_FORWARD = LLaDATRMForMaskedDiffusion.forward.__wrapped__.__wrapped__


def make_hybrid(size: int, layers: int) -> LLaDATRMForMaskedDiffusion:
    """Every masked chunk is refined, with 8 steps."""
    config = LLaDAConfig(
        vocab_size=1000,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        mask_token_id=999,
        pad_token_id=0,
    )
    head = RecursiveRefinementHeadConfig(hidden_size=size, head_hidden_size=size // 4, convergence_threshold=0.0)
    backbone = LLaDAForMaskedDiffusion(config)
    return LLaDATRMForMaskedDiffusion.from_backbone(backbone, refiner=head, min_confidence=1.0).eval()


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=201)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name in ("DEBUG", "LLADA_TRM_DEBUG"):
        os.environ.pop(name, None)

    rows = []
    for name, (size, layers, length) in CASES.items():
        hybrid = make_hybrid(size, layers)
        input_ids = torch.randint(1, 999, (1, length))
        input_ids[:, length // 2 :] = 999
        without = partial(can_return_tuple(BARE_FORWARD), hybrid)
        assert torch.equal(hybrid.forward(input_ids).logits, without(input_ids).logits)
        pairs = [(seconds(hybrid.forward, input_ids), seconds(without, input_ids)) for _ in range(options.repeats)]
        ours, bare = (statistics.median(side) for side in zip(*pairs))
        rows.append({"case": name, "with_s": ours, "without_s": bare, "ratio": ours / bare})
    decorated, calls = reported(lambda self: None), 100_000
    look = min(timeit(lambda: decorated(None), number=calls) for _ in range(5)) / calls

    print(f"{'case':<36}{'with':>12}{'without':>12}{'ratio':>9}")
    for row in rows:
        times = f"{1e3 * row['with_s']:>9.3f} ms{1e3 * row['without_s']:>9.3f} ms"
        print(f"{row['case']:<36}{times}{row['ratio']:>9.4f}")
    print(f"a look for debug mode: {1e6 * look:.2f} microseconds")
    command = f"python benchmarks/debug_overhead.py --repeats {options.repeats} --threads {options.threads}"
    write_result("debug_overhead", {**circumstances(command), "rows": rows, "look_s": look})


if __name__ == "__main__":
    main()
