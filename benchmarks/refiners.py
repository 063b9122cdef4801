"""
The refiners on the demo's task, three seeds: what each adds, and what it costs.

    python benchmarks/refiners.py [--seeds 0 1 2] [--backbone_steps 5500] [--refiner_steps 1500] [--threads 2]

For each seed the demo's backbone is trained, then every refiner on a frozen copy of it, with the same steps, batches
and learning rate; "control" is the backbone trained on for as many seconds as the recursive head took. Measured on
held-out problems, in one and two diffusion steps: the share of responses that are right as a whole, and the time of a
generated token beside the bare backbone's, in turn in one loop. Then the recursive head, trained with and without deep
supervision, with 1 to 16 recursion steps at inference, and at several `min_confidence`: share of chunks refined,
accuracy, time (one diffusion step). A seed's figures are kept in `--output_dir`, and a seed that is there is not run
again. Prints tables and writes benchmarks/results/refiners.json and refiners.png.
"""

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from record import circumstances, mean_and_margin, write_result
from transformers import PreTrainedModel

from llada_trm_hf import (
    LLaDAForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
    SlotTRMRefinerConfig,
)
from llada_trm_hf.evaluation import exact_match_accuracy
from llada_trm_hf.recipes.demo import NUM_TERMS, Demo, DemoSize
from llada_trm_hf.training import set_trainable

matplotlib.use("Agg")
from matplotlib import pyplot

CHUNK = NUM_TERMS + 1
HEAD = RecursiveRefinementHeadConfig(
    hidden_size=64,
    chunk_size=CHUNK,
    head_hidden_size=192,
    head_intermediate_size=384,
    head_layers=1,
    max_recursive_steps=4,
    step_size=0.5,
    convergence_threshold=1e-4,
    initializer_range=0.06,
)
SLOTS = SlotTRMRefinerConfig(
    hidden_size=64,
    chunk_size=CHUNK,
    preset="tiny",
    max_recursive_steps=4,
    delta_scale=0.5,
    convergence_threshold=0.0,
    initializer_range=0.1,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "recursive head": {"refiner": HEAD},
    "slot refiner": {"refiner": SLOTS},
    "cascade": {"refiner": [HEAD, SLOTS], "integration": "cascade"},
    "mix": {"refiner": [HEAD, SLOTS], "integration": "mix"},
    "recursive head, no deep supervision": {"refiner": HEAD, "deep_supervision_weight": 0.0},
}
RECURSION_STEPS = (1, 2, 4, 8, 16)
MIN_CONFIDENCES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


def milliseconds_per_token(models: dict[str, tuple[PreTrainedModel, dict[str, Any]]], prompts: torch.Tensor) -> dict:
    """Of each model, in one diffusion step over all prompts, in turn; medians of 7."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(7):
        for name, (model, settings) in models.items():
            start = time.perf_counter()
            model.generate(prompts, max_new_tokens=CHUNK, num_diffusion_steps=1, **settings)
            times[name].append(1000 * (time.perf_counter() - start) / (len(prompts) * CHUNK))
    return {name: statistics.median(spent) for name, spent in times.items()}


@torch.no_grad()
def share_refined(hybrid: LLaDATRMForMaskedDiffusion, prompts: torch.Tensor) -> float:
    """Of the responses, when all of their tokens are masked."""
    masks = torch.full((len(prompts), CHUNK), hybrid.config.mask_token_id)
    steps = hybrid(torch.cat([prompts, masks], dim=1)).refinement_steps
    return (steps[:, -1] > 0).float().mean().item()


def accuracies(
    model: PreTrainedModel, test: Any, steps: tuple[int, ...] = (1, 2), **settings: Any
) -> dict[str, float]:
    return {str(n): exact_match_accuracy(model, test, num_diffusion_steps=n, **settings).value for n in steps}


def run_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    size = DemoSize(backbone_steps=options.backbone_steps, head_steps=options.refiner_steps)
    demo = Demo(str(options.output_dir / f"seed_{seed}"), seed, size)
    torch.manual_seed(seed)
    train, test = demo.make_data()
    backbone = LLaDAForMaskedDiffusion(demo.backbone_config())
    demo.timed("train the backbone", lambda: demo.train(backbone, train, "backbone", size.backbone_steps))
    hybrids: dict[str, LLaDATRMForMaskedDiffusion] = {}
    for name, settings in VARIANTS.items():
        torch.manual_seed(seed)
        hybrid = LLaDATRMForMaskedDiffusion.from_backbone(copy.deepcopy(backbone), min_confidence=0.95, **settings)
        set_trainable(hybrid, ["refiner"])
        stage = "train the head" if name == "recursive head" else f"train {name}"
        demo.timed(stage, lambda model=hybrid: demo.train(model, train, "head", size.head_steps))
        hybrids[name] = hybrid.eval()
    control = copy.deepcopy(backbone).requires_grad_(True)
    control_steps = demo.steps_in_the_same_time()
    demo.timed("train the control", lambda: demo.train(control, train, "control", control_steps))

    prompts = torch.tensor(test["input_ids"])[:, :CHUNK]
    models: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {"no refiner": (backbone.eval(), {})}
    models |= {name: (hybrid, {}) for name, hybrid in hybrids.items()}
    times = milliseconds_per_token(models, prompts)
    rows = {
        name: {
            "parameters": getattr(model, "refiner", model).num_parameters() if name != "no refiner" else 0,
            "ms_per_token": times[name],
            "extra_ms_per_token": times[name] - times["no refiner"],
            "accuracy": accuracies(model, test),
        }
        for name, (model, _) in models.items()
    }
    rows["control"] = {"parameters": 0, "steps": control_steps, "accuracy": accuracies(control.eval(), test)}
    result = {"seed": seed, "rows": rows, "seconds": demo.seconds}
    result["recursion_steps"] = {
        name: [accuracy_with_steps(hybrids[name], test, steps) for steps in RECURSION_STEPS]
        for name in ("recursive head", "recursive head, no deep supervision", "slot refiner")
    }
    head, bare = hybrids["recursive head"], {"no refiner": models["no refiner"]}
    result["selective"] = [selective(head, bare, test, prompts, threshold) for threshold in MIN_CONFIDENCES]
    return result


def accuracy_with_steps(hybrid: LLaDATRMForMaskedDiffusion, test: Any, steps: int) -> dict[str, float]:
    """Every chunk takes exactly so many steps."""
    trained = copy.deepcopy(hybrid.refiner.config)
    hybrid.refiner.config.max_recursive_steps, hybrid.refiner.config.convergence_threshold = steps, 0.0
    try:
        return accuracies(hybrid, test)
    finally:
        for name in ("max_recursive_steps", "convergence_threshold"):
            setattr(hybrid.refiner.config, name, getattr(trained, name))


def selective(
    hybrid: LLaDATRMForMaskedDiffusion, bare: dict[str, Any], test: Any, prompts: torch.Tensor, min_confidence: float
) -> dict[str, float]:
    trained = hybrid.config.min_confidence
    hybrid.config.min_confidence = min_confidence
    try:
        times = milliseconds_per_token({**bare, "hybrid": (hybrid, {})}, prompts)
        return {
            "min_confidence": min_confidence,
            "share_refined": share_refined(hybrid, prompts),
            "accuracy": accuracies(hybrid, test, (1,))["1"],
            "ms_per_token": times["hybrid"],
            "bare_ms_per_token": times["no refiner"],
        }
    finally:
        hybrid.config.min_confidence = trained


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {}
    for name, row in seeds[0]["rows"].items():
        # A seed may lack its control: paused, a run gives it a wrong number of steps.
        having = [seed for seed in seeds if name in seed["rows"]]
        table[name] = {"parameters": row["parameters"], "seeds": len(having)}
        for steps in ("1", "2"):
            values = [seed["rows"][name]["accuracy"][steps] for seed in having]
            table[name][f"accuracy_{steps}"] = [*mean_and_margin(values), values]
            gains = [value - seed["rows"]["no refiner"]["accuracy"][steps] for value, seed in zip(values, having)]
            table[name][f"gain_{steps}"] = mean_and_margin(gains)
        if "extra_ms_per_token" in row:
            table[name]["extra_ms_per_token"] = statistics.mean(s["rows"][name]["extra_ms_per_token"] for s in seeds)
    return table


def show(table: dict[str, Any], seeds: list[dict[str, Any]]) -> None:
    print(f"{'':38}{'parameters':>11}{'ms/token more':>15}{'1 step':>18}{'2 steps':>18}")
    for name, row in table.items():
        cells = "".join(
            f"{f'{100 * mean:.1f}% ± {100 * half:.1f}':>18}"
            for mean, half, _ in (row["accuracy_1"], row["accuracy_2"])
        )
        print(f"{name:38}{row['parameters']:>11,}{row.get('extra_ms_per_token', math.nan):>15.4f}{cells}")
    for name, rows in seeds[0]["recursion_steps"].items():
        means = [statistics.mean(s["recursion_steps"][name][i]["1"] for s in seeds) for i in range(len(rows))]
        print(f"{name:38}", *(f"{steps}: {100 * mean:.1f}%" for steps, mean in zip(RECURSION_STEPS, means)))
    for i, threshold in enumerate(MIN_CONFIDENCES):
        rows = [seed["selective"][i] for seed in seeds]
        share, accuracy, spent, bare = (
            statistics.mean(row[name] for row in rows)
            for name in ("share_refined", "accuracy", "ms_per_token", "bare_ms_per_token")
        )
        print(
            f"min_confidence {threshold}: {100 * share:.1f}% refined, {100 * accuracy:.1f}%, {spent / bare:.2f}x time"
        )


def plot(seeds: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in seeds[0]["recursion_steps"]:
        curves = [[100 * row["1"] for row in seed["recursion_steps"][name]] for seed in seeds]
        means = [statistics.mean(values) for values in zip(*curves)]
        (line,) = left.plot(RECURSION_STEPS, means, marker="o", label=name)
        for curve in curves:
            left.plot(RECURSION_STEPS, curve, color=line.get_color(), alpha=0.25, linewidth=1)
    left.set_xscale("log", base=2)
    left.set_xticks(RECURSION_STEPS, [str(steps) for steps in RECURSION_STEPS])
    left.set(xlabel="recursion steps at inference (trained with 4)", ylabel="whole responses right, %")
    left.legend(fontsize=8)
    for seed in seeds:
        shares = [100 * row["share_refined"] for row in seed["selective"]]
        right.plot(
            shares, [100 * row["accuracy"] for row in seed["selective"]], marker="o", label=f"seed {seed['seed']}"
        )
    for row in seeds[0]["selective"]:
        right.annotate(
            f"{row['min_confidence']:g}", (100 * row["share_refined"], 100 * row["accuracy"]), fontsize=7, alpha=0.7
        )
    right.set(xlabel="chunks refined, % (points: min_confidence)", ylabel="whole responses right, %")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone_steps", type=int, default=5500)
    parser.add_argument("--refiner_steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/refiners_benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    seeds = []
    for seed in options.seeds:
        file = options.output_dir / f"seed_{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(run_seed(seed, options)), encoding="utf-8")
        seeds.append(json.loads(file.read_text(encoding="utf-8")))
    table = summarise(seeds)
    show(table, seeds)
    command = f"python benchmarks/refiners.py --seeds {' '.join(map(str, options.seeds))}"
    command += f" --backbone_steps {options.backbone_steps} --refiner_steps {options.refiner_steps}"
    command += f" --threads {options.threads}"
    write_result("refiners", {**circumstances(command), "table": table, "seeds": seeds})
    plot(seeds, Path(__file__).parent / "results" / "refiners.png")


if __name__ == "__main__":
    main()
