"""
What a TRM refiner costs on a backbone of LLaDA-8B's shape, everything masked, with all its steps: alone, with every
chunk refined, and in the hybrid, with half of the chunks.

    python benchmarks/refiner_cost.py [--length 256] [--layers 1 3] [--threads 2] [--repeats 5]

The backbone is built with few layers, in float32, with random weights; floating point operations (counted while it
runs) and seconds (medians, in turn) of a layer are the difference of the two sizes, from which those of all 32 follow.
The hybrid looks for unsure chunks with the LM head, which the backbone's own pass has too, and evaluates it once more
where it has refined. Writes benchmarks/results/refiner_cost.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from record import circumstances, write_result
from torch.utils.flop_counter import FlopCounterMode

from llada_trm_hf import LLaDAConfig, LLaDAForMaskedDiffusion, LLaDATRMForMaskedDiffusion, TRMRefinerConfig

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "vocab_size": 126_464,
    "mask_token_id": 126_336,
}
LAYERS = 32


def operations(run: Callable[[], object]) -> int:
    """Floating point operations of one run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    few, more = options.layers
    backbone = LLaDAForMaskedDiffusion(LLaDAConfig(**SHAPE, num_hidden_layers=more)).eval()
    config = TRMRefinerConfig(hidden_size=SHAPE["hidden_size"], convergence_threshold=0.0)
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(backbone, config).eval()
    backbone, refiner, layers = hybrid.backbone, hybrid.refiner, hybrid.backbone.model.layers
    masks = torch.full((1, options.length), SHAPE["mask_token_id"])
    states = torch.randn(1, options.length, SHAPE["hidden_size"])

    def layered(number: int) -> Callable[[], object]:
        def run() -> object:
            backbone.model.layers = layers[:number]
            return backbone(masks)

        return run

    def run_hybrid() -> torch.Tensor:
        backbone.model.layers = layers[:few]
        return hybrid(masks).chunk_confidence

    confidences = run_hybrid().flatten().sort().values
    hybrid.config.min_confidence = confidences[len(confidences) // 2].item() + 1e-6  # at least half are refined
    refined = (hybrid(masks).refinement_steps > 0).float().mean().item()

    parts = {
        "hybrid": run_hybrid,
        "few": layered(few),
        "more": layered(more),
        "refiner": lambda: refiner(states),
        "LM head": lambda: backbone.lm_head(states),
    }
    flops = {name: operations(run) for name, run in parts.items()}
    spent: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.repeats):
        for name, run in parts.items():
            start = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in spent.items()}
    result: dict[str, dict[str, float]] = {}
    for name, measured in (("flops", flops), ("seconds", seconds)):
        whole = measured["few"] + (LAYERS - few) * (measured["more"] - measured["few"]) / (more - few)
        extra = measured["hybrid"] - measured["few"]
        result[name] = {
            "throughput_of_hybrid": whole / (whole + extra),
            "backbone": whole,
            "refiner": measured["refiner"],
            "lm_head": measured["LM head"],
            "refiner_share": measured["refiner"] / whole,
            "share_with_lm_head": (measured["refiner"] + measured["LM head"]) / whole,
        }
        shares = [f"{100 * result[name][key]:.2f}%" for key in ("refiner_share", "share_with_lm_head")]
        print(
            f"{name}: backbone {whole:.4g}, refiner {shares[0]} of it, with the LM head once more {shares[1]}", end=""
        )
        print(f"; hybrid, {100 * refined:.0f}% of chunks refined: throughput {whole / (whole + extra):.3f}")
    command = f"python benchmarks/refiner_cost.py --length {options.length} --layers {few} {more}"
    command += f" --threads {options.threads} --repeats {options.repeats}"
    print(
        f"{refiner.num_parameters():,} parameters, width {config.recursion_size}, {config.max_recursive_steps} steps"
    )
    write_result(
        "refiner_cost",
        {
            **circumstances(command),
            "chunks_refined": refined,
            "parameters": refiner.num_parameters(),
            "recursion_size": config.recursion_size,
            "max_recursive_steps": config.max_recursive_steps,
            **result,
        },
    )


if __name__ == "__main__":
    main()
