"""
Does recursion solve sudokus in one diffusion step, where a model without it has had the same time to learn them?

    python benchmarks/puzzles.py --size 4 [--seeds 0] [--rows hybrid plain bare deep] [--threads 1]
        [--output_dir outputs/puzzles]

Each row is what `llada-trm train --recipe sudoku_4` (or sudoku_6) trains from scratch, with another backbone:

    hybrid    the recipe: a backbone of two layers and a TRM refiner
    plain     a plain TRM: the same with a backbone of one layer
    bare      the backbone of two layers without refiner
    deep      a backbone of eight layers without refiner

All but `hybrid` take as many steps as fit into the time of the recipe's steps for the hybrid. What a step takes is
measured for all rows in turn before they are trained, so that other work on the machine does not favour any.

Measured on 1,000 held-out puzzles: whole grids right, in one and two diffusion steps; with 1 to 32 recursion steps and
no early stop; and with the default threshold, with the mean number of recursion steps taken. A row's figures and its
model are kept in `--output_dir`, and a row that is there is not run again; `--report` only prints what there is.
Results go to benchmarks/results/puzzles_{size}.json.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import circumstances, write_result
from recursion import kept, kept_rows, measure
from transformers import HfArgumentParser

from llada_trm_hf import byte_tokenizer, load_reasoning_dataset, tokenize_reasoning
from llada_trm_hf.recipes.recipe import load_settings, parse_recipe

BACKBONE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},  # so that most frequencies tell 74 places apart
    "initializer_range": 0.1,
}
LAYERS = {"hybrid": 2, "plain": 1, "bare": 2, "deep": 8}
WITHOUT_REFINER = ("bare", "deep")
HELD_OUT = 1_000


def train(row: str, size: int, seed: int, folder: Path, steps: int, *more: str) -> Any:
    """The trainer of a row after its training, with `more` flags."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "backbone_config.json"
    config.write_text(json.dumps({**BACKBONE, "num_hidden_layers": LAYERS[row]}), encoding="utf-8")
    flags = f"--backbone {config} --seed {seed} --output_dir {folder / 'model'} --disable_tqdm true"
    flags += f" --max_steps {steps}"
    if row in WITHOUT_REFINER:
        flags += " --refiner none"
    method, settings = load_settings(f"sudoku_{size}")
    parser = HfArgumentParser((method.script_arguments, method.training_arguments), allow_abbrev=False)
    return method.run(*parse_recipe(parser, [*flags.split(), *more], settings))


def step_seconds(size: int, rounds: int = 5, steps: int = 20) -> dict[str, float]:
    """What a training step of each row takes, measured in turn; means without the extremes."""
    spent: dict[str, list[float]] = {row: [] for row in LAYERS}
    for _ in range(rounds):
        for row in LAYERS:
            with tempfile.TemporaryDirectory() as folder:
                state = train(row, size, 0, Path(folder), steps, "--split", "train[:640]").state
            spent[row].append(state.log_history[-1]["train_runtime"] / steps)
    return {row: statistics.fmean(sorted(values)[1:-1]) for row, values in spent.items()}


def run_seed(seed: int, options: argparse.Namespace) -> None:
    rows, folder = options.rows, options.output_dir / f"{options.size}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{row}.json").exists() for row in rows):
        return
    problems, response = load_reasoning_dataset("sudoku", f"test[:{HELD_OUT}]", puzzle_size=options.size)
    test = tokenize_reasoning(problems, byte_tokenizer(), response)
    clock = kept(folder / "clock.json", lambda: step_seconds(options.size))
    all_steps = load_settings(f"sudoku_{options.size}")[1]["max_steps"]
    for row in rows:
        steps = round(all_steps * clock["hybrid"] / clock[row])

        def train_row(row: str = row, steps: int = steps) -> dict[str, Any]:
            trainer = train(row, options.size, seed, folder / row, steps)
            model, log = trainer.model.eval(), trainer.state.log_history[-1]
            found = {"steps": steps, "minutes": log["train_runtime"] / 60, "parameters": model.num_parameters()}
            return {**found, **measure(model, test, options.size**2 + 1)}

        print(f"seed {seed}: {row} {kept(folder / f'{row}.json', train_row)}", flush=True)


def report(options: argparse.Namespace) -> None:
    seeds = kept_rows(options.output_dir, f"{options.size}")
    command = f"python benchmarks/puzzles.py --size {options.size} --seeds {' '.join(seeds)}"
    measured = [row for row in LAYERS if any(row in rows for rows in seeds.values())]
    command += f" --rows {' '.join(measured)} --threads {options.threads}"
    write_result(f"puzzles_{options.size}", {**circumstances(command), "seeds": seeds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(4, 6), default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/puzzles"))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.report:
        for seed in options.seeds:
            run_seed(seed, options)
    report(options)


if __name__ == "__main__":
    main()
