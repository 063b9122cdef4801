"""
Does recursion pay where more training of the backbone does not help? And does more of it than trained with do harm?

    python benchmarks/recursion.py [--num_terms 10] [--seeds 0 1 2 3 4] [--backbone_steps 5000] [--refiner_steps 2500]
        [--rows control trm one_step head slots cascade looped] [--threads 1] [--output_dir outputs/recursion]

For each seed a backbone is trained from scratch on chains of differences, its accuracy in one diffusion step measured
in sixths of that training (what it gains in the last third says whether it has converged). Then each row is trained
with the same batches and settings (Muon) for the same time: as many steps as take the time of `--refiner_steps` steps
of the TRM refiner. What a step takes is measured for all rows in turn, before they are trained, so that other work on
the machine does not favour any.

    control    the backbone trained on
    trm        TRMRefiner on the frozen backbone
    one_step   the same with a single recursion step in training and inference: one more layer with its parameters
    head, slots, cascade    RecursiveRefinementHead, SlotTRMRefiner, one after the other
    looped     a backbone whose layers are run through four times, from scratch for the time of backbone and row

Measured on 1,000 held-out problems: whole responses right, in one and two diffusion steps; with 1 to 32 recursion
steps and no early stop; and with the default threshold, with the mean number of recursion steps taken. A row's figures
are kept in `--output_dir`, and a row that is there is not run again; `--report` only prints what there is. Results go
to benchmarks/results/recursion_{num_terms}.json.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import circumstances, write_result
from torch import nn
from transformers import PreTrainedModel, ProgressCallback

from llada_trm_hf import (
    LLaDAForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    MaskedDiffusionCollator,
    MaskedDiffusionTrainer,
    MaskedDiffusionTrainingArguments,
    RecursiveRefinementHeadConfig,
    SlotTRMRefinerConfig,
    TRMRefinerConfig,
    byte_tokenizer,
    load_reasoning_dataset,
    tokenize_reasoning,
)
from llada_trm_hf.evaluation import exact_match_accuracy
from llada_trm_hf.recipes.demo import Demo, DemoSize
from llada_trm_hf.training import set_trainable

DEPTHS = (1, 2, 4, 8, 16, 32)
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.1)
LOOPS = 4
BATCH, LEARNING_RATE = 128, 3e-3
ROWS = ("control", "trm", "one_step", "head", "slots", "cascade", "looped")
TOKENIZER = byte_tokenizer()


def new_backbone(seed: int, loops: int = 1) -> LLaDAForMaskedDiffusion:
    """The demo's, its two layers run through `loops` times."""
    torch.manual_seed(seed)
    model = LLaDAForMaskedDiffusion(Demo("", seed, DemoSize()).backbone_config())
    model.model.layers = nn.ModuleList([*model.model.layers] * loops)
    return model


def refiners(chunk_size: int) -> dict[str, dict[str, Any]]:
    sizes = {"hidden_size": 64, "chunk_size": chunk_size}
    trm = TRMRefinerConfig(**sizes, initializer_range=0.1)
    one_step = TRMRefinerConfig(
        **sizes, initializer_range=0.1, trained_steps=1, max_free_steps=0, max_recursive_steps=1
    )
    head = RecursiveRefinementHeadConfig(
        **sizes,
        head_hidden_size=192,
        head_intermediate_size=384,
        head_layers=1,
        recall=True,
        step_size=0.5,
        max_recursive_steps=16,
        convergence_threshold=1e-4,
        initializer_range=0.06,
    )
    slots = SlotTRMRefinerConfig(
        **sizes,
        preset="tiny",
        recall=True,
        max_recursive_steps=16,
        delta_scale=0.5,
        convergence_threshold=1e-4,
        initializer_range=0.1,
    )
    return {
        "trm": {"refiner": trm},
        "one_step": {"refiner": one_step},
        "head": {"refiner": head},
        "slots": {"refiner": slots},
        "cascade": {"refiner": [head, slots], "integration": "cascade"},
    }


def new_model(row: str, backbone: LLaDAForMaskedDiffusion, seed: int, chunk_size: int) -> PreTrainedModel:
    if row == "control":
        return copy.deepcopy(backbone).requires_grad_(True)
    if row == "looped":
        return new_backbone(seed, LOOPS)
    torch.manual_seed(seed)
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(
        copy.deepcopy(backbone),
        min_confidence=0.95,
        deep_supervision_weight=1.0,
        change_loss_weight=1.0,
        **refiners(chunk_size)[row],
    )
    set_trainable(hybrid, ["refiner"])
    return hybrid


def new_trainer(
    model: PreTrainedModel, samples: Any, steps: int, seed: int, folder: Path, callbacks: Any = None
) -> MaskedDiffusionTrainer:
    arguments = MaskedDiffusionTrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        use_muon=True,
        lr_scheduler_type="linear",
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=100,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    return MaskedDiffusionTrainer(
        model, arguments, train_dataset=samples, processing_class=TOKENIZER, callbacks=callbacks
    )


def step_seconds(models: dict[str, PreTrainedModel], samples: Any, folder: Path, rounds: int = 15) -> dict[str, float]:
    """What a training step of each takes, in turn; means without the two shortest and longest."""
    collator = MaskedDiffusionCollator(TOKENIZER.mask_token_id, TOKENIZER.pad_token_id)
    batch = collator([samples[i] for i in range(BATCH)])
    models = {name: copy.deepcopy(model).train() for name, model in models.items()}
    optimizers = {name: new_trainer(model, samples, 1, 0, folder).create_optimizer() for name, model in models.items()}
    spent: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(2):  # with and without steps without gradient
                model(**batch).loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
            spent[name].append((time.perf_counter() - start) / 2)
    return {name: statistics.mean(sorted(values)[2:-2]) for name, values in spent.items()}


def train(model: PreTrainedModel, samples: Any, steps: int, seed: int, folder: Path, on_step: Any = None) -> None:
    new_trainer(model, samples, steps, seed, folder, [on_step] if on_step else None).train()
    model.eval()


def accuracies(model: PreTrainedModel, test: Any) -> list[float]:
    """Whole responses right, in one and two diffusion steps."""
    return [exact_match_accuracy(model, test, num_diffusion_steps=n).value for n in (1, 2)]


@torch.no_grad()
def mean_steps(hybrid: PreTrainedModel, test: Any, prompt: int) -> float:
    """Recursion steps of the chunks refined when the whole response is masked."""
    canvas = torch.tensor(test["input_ids"])
    canvas[:, prompt:] = hybrid.config.mask_token_id
    steps = hybrid(canvas).refinement_steps
    return steps[steps > 0].float().mean().item()


def measure(model: PreTrainedModel, test: Any, prompt: int) -> dict[str, Any]:
    result: dict[str, Any] = {"accuracy": accuracies(model, test)}
    if not isinstance(model, LLaDATRMForMaskedDiffusion):
        return result
    members = getattr(model.refiner, "refiners", [model.refiner])
    most = max(member.config.max_recursive_steps for member in members)
    result["mean_steps"], result["max_steps"] = mean_steps(model, test, prompt), most
    result["depths"] = {}
    own = [(member.config, copy.deepcopy(vars(member.config))) for member in members]
    for depth in DEPTHS:
        for config, _ in own:
            config.max_recursive_steps, config.convergence_threshold = depth, 0.0
        result["depths"][depth] = accuracies(model, test)
    result["thresholds"] = {}
    for threshold in THRESHOLDS:
        for config, fields in own:
            config.max_recursive_steps, config.convergence_threshold = fields["max_recursive_steps"], threshold
        result["thresholds"][threshold] = [mean_steps(model, test, prompt), *accuracies(model, test)]
    for config, fields in own:
        config.max_recursive_steps = fields["max_recursive_steps"]
        config.convergence_threshold = fields["convergence_threshold"]
    return result


class Curve(ProgressCallback):
    """The accuracy in sixths of the training."""

    def __init__(self, model: PreTrainedModel, test: Any, steps: int):
        super().__init__()
        self.model, self.test, self.every = model, test, max(steps // 6, 1)
        self.points: list[tuple[int, list[float]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.model.eval()
            self.points.append((state.global_step, accuracies(self.model, self.test)))
            self.model.train()

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    on_train_begin = on_log = on_evaluate = on_predict = on_train_end = on_prediction_step = _nothing


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not file.exists():
        start = time.perf_counter()
        found = make()
        file.write_text(json.dumps({**found, "seconds": time.perf_counter() - start}), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def run_seed(seed: int, options: argparse.Namespace) -> None:
    folder = options.output_dir / f"{options.num_terms}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{row}.json").exists() for row in ("backbone", *options.rows)):
        return
    samples = []
    for split in ("train[:100000]", "test[:1000]"):
        problems, response = load_reasoning_dataset("arithmetic", split, num_terms=options.num_terms, seed=seed)
        samples.append(tokenize_reasoning(problems, TOKENIZER, response))
    training, test = samples
    chunk = prompt = options.num_terms + 1

    backbone, weights = new_backbone(seed), folder / "backbone.pt"

    def train_backbone() -> dict[str, Any]:
        curve = Curve(backbone, test, options.backbone_steps)
        train(backbone, training, options.backbone_steps, seed, folder, curve)
        torch.save(backbone.state_dict(), weights)
        return {"steps": options.backbone_steps, "curve": curve.points, **measure(backbone, test, prompt)}

    found = kept(folder / "backbone.json", train_backbone)
    print(f"seed {seed}: backbone {found['accuracy']}", flush=True)
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    backbone.eval()
    timed = {row: new_model(row, backbone, seed, chunk) for row in dict.fromkeys(("control", "trm", *options.rows))}
    clock = kept(folder / f"clock_{'_'.join(timed)}.json", lambda: step_seconds(timed, training, folder))
    for row in options.rows:
        budget = clock["trm"] * options.refiner_steps
        if row == "looped":
            budget += clock["control"] * options.backbone_steps
        steps = round(budget / clock[row])

        def train_row(row: str = row, steps: int = steps) -> dict[str, Any]:
            model = new_model(row, backbone, seed, chunk)
            # The control does not see the same order of problems once more.
            train(model, training, steps, seed + (row == "control"), folder)
            parameters = getattr(model, "refiner", model).num_parameters()
            return {"steps": steps, "parameters": parameters, **measure(model.eval(), test, prompt)}

        print(f"seed {seed}: {row} {kept(folder / f'{row}.json', train_row)}", flush=True)


def kept_rows(folder: Path, name: str) -> dict[str, Any]:
    """What is kept of each seed, by row; prints it."""
    seeds: dict[str, Any] = {}
    for of_seed in sorted(folder.glob(f"{name}_*")):
        rows = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(of_seed.glob("*.json"))}
        seeds[of_seed.name.split("_")[1]] = rows
    percent = lambda values: " / ".join(f"{100 * value:5.1f}" for value in values)  # noqa: E731
    for seed, rows in seeds.items():
        for title, row in rows.items():
            if "accuracy" not in row:
                continue
            minutes = f" in {row['minutes']:.1f} min" if "minutes" in row else ""
            print(f"{seed} {title:9} {row['steps']:6,} steps{minutes}  {percent(row['accuracy'])}", end="")
            if "depths" in row:
                print(f"  {row['mean_steps']:.1f} of {row['max_steps']} steps; ", end="")
                print("  ".join(f"{depth}: {percent(found)}" for depth, found in row["depths"].items()), end="")
            if "curve" in row:
                print("  in sixths:", *(f"{100 * found[0]:.1f}" for _, found in row["curve"]), end="")
            print()
    return seeds


def report(options: argparse.Namespace) -> None:
    seeds = kept_rows(options.output_dir, f"{options.num_terms}")
    command = f"python benchmarks/recursion.py --num_terms {options.num_terms} --seeds {' '.join(seeds)}"
    command += f" --backbone_steps {options.backbone_steps} --refiner_steps {options.refiner_steps}"
    measured = [row for row in ROWS if any(row in rows for rows in seeds.values())]
    command += f" --rows {' '.join(measured)} --threads {options.threads}"
    about = {"num_terms": options.num_terms, "optimizer": "Muon"}
    write_result(f"recursion_{options.num_terms}", {**circumstances(command), **about, "seeds": seeds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_terms", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--backbone_steps", type=int, default=5000)
    parser.add_argument("--refiner_steps", type=int, default=2500)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/recursion"))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.report:
        for seed in options.seeds:
            run_seed(seed, options)
    report(options)


if __name__ == "__main__":
    main()
