"""
SequenceTRM on real hidden pairs, held out, beside the baselines a reader will ask for.

    python benchmarks/sequence_trm.py --data train.jsonl --eval_data test.jsonl [--model DIR] [--epochs 3]

The pairs are made by `llada-trm datagen --stage states` from GSM8K's own solutions, with the model of
benchmarks/gsm8k_language_model.py: the states of the question, and the state at `</think>`. They are compressed by
PCA of the training pairs. Baselines: the mean of the training targets, the last context state copied, and ridge
regression from it and from a summary of the whole context (last state, mean, standard deviation, means of the first
and the last four states), with the penalty chosen on a tenth of the training pairs. "top_token_agreement": how often
the LM head says the same after the prediction as after the compressed target; "of_the_model": as after the target
itself. Then `reason` with 1, 4 and 16 trajectories at several noise levels, selected by halting probability and by
residual, on the first `--trajectory_pairs` held-out pairs.
Everything is left in `--output_dir`; results in benchmarks/results/sequence_trm.json.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gsm8k_language_model import DEFAULT_FOLDER
from record import circumstances, write_result
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from llada_trm_hf import DimensionCompressor, DimensionCompressorConfig, SequenceTRM, SequenceTRMConfig
from llada_trm_hf.hidden_pairs import HiddenPairsCollator, HiddenPairsDataset
from llada_trm_hf.training import TRMTrainer, TRMTrainingArguments
from llada_trm_hf.training.reconstruction_metrics import reconstruction_metrics, top_tokens

SHOWN = ("mse", "r2", "relative_error", "cosine_similarity", "standardised_cosine_similarity", "top_token_agreement")
NOISE_LEVELS = (0.1, 0.3, 1.0)
TRAJECTORIES = (1, 4, 16)


def make_pairs(options: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of training and held-out pairs."""
    folders = []
    for name, file in (("train", options.data), ("test", options.eval_data)):
        folder = options.output_dir / f"pairs_{name}"
        settings = {"model": options.model, "traces_file": file, "output_dir": folder}
        flags = [text for flag, value in settings.items() for text in (f"--{flag}", str(value))]
        command = [sys.executable, "-m", "llada_trm_hf.cli", "datagen", "--stage", "states", *flags]
        subprocess.run([*command, "--checkpoint_every", "512", "--batch_size", "16"], check=True)
        folders.append(folder)
    return folders[0], folders[1]


class Measure:
    """Compares predictions for held-out pairs with their targets."""

    def __init__(self, pairs: HiddenPairsDataset, compressor: DimensionCompressor, head: torch.nn.Module):
        self.targets = torch.stack([item["target"] for item in pairs])
        self.compressor, self.head = compressor, head
        self.tokens = self.top_tokens(self.targets)
        stored = torch.stack([pairs.stored(i)[1] for i in range(len(pairs))])
        self.tokens_of_the_model = top_tokens(head, stored)

    @torch.no_grad()
    def top_tokens(self, compressed: torch.Tensor) -> torch.Tensor:
        return top_tokens(self.head, self.compressor.decompress(compressed))

    def __call__(self, predictions: torch.Tensor) -> dict[str, float]:
        number = len(predictions)
        tokens = self.top_tokens(predictions)
        return {
            **reconstruction_metrics(predictions, self.targets[:number]),
            "top_token_agreement": (tokens == self.tokens[:number]).float().mean().item(),
            "top_token_of_the_model": (tokens == self.tokens_of_the_model[:number]).float().mean().item(),
        }


def summary(context: torch.Tensor) -> torch.Tensor:
    """`[5 * D']` of a context `[L, D']`."""
    parts = context[-1], context.mean(0), context.std(0, correction=0), context[:4].mean(0), context[-4:].mean(0)
    return torch.cat(parts)


def ridge(inputs: torch.Tensor, targets: torch.Tensor, held_out: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Predictions for `held_out`, and the penalty, which a tenth of the training pairs chose."""

    def fit(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        centred = x - x.mean(0)
        gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=x.dtype)
        return torch.linalg.solve(gram, centred.T @ (y - y.mean(0))), x.mean(0), y.mean(0)

    def predict(model: tuple[torch.Tensor, torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        weight, x_mean, y_mean = model
        return (x - x_mean) @ weight + y_mean

    inputs, targets = inputs.double(), targets.double()
    tenth = len(inputs) // 10
    errors = {
        penalty: (predict(fit(inputs[tenth:], targets[tenth:], penalty), inputs[:tenth]) - targets[:tenth])
        .square()
        .mean()
        for penalty in (10.0**exponent for exponent in range(-2, 7))
    }
    penalty = min(errors, key=lambda p: errors[p].item())
    return predict(fit(inputs, targets, penalty), held_out.double()).float(), penalty


@torch.no_grad()
def reason(model: SequenceTRM, pairs: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and steps."""
    torch.manual_seed(0)
    loader = DataLoader(pairs, batch_size=32, collate_fn=HiddenPairsCollator())
    thoughts = [model.reason(batch["context"], batch["mask"], **settings) for batch in loader]
    return torch.cat([t.prediction for t in thoughts]), torch.cat([t.num_steps for t in thoughts])


def show(name: str, measures: dict[str, float]) -> None:
    print(f"{name:36}", *(f"{key}={measures[key]:.4f}" for key in SHOWN if key in measures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--eval_data", required=True, help="GSM8K's test.jsonl")
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--compressed_size", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--halt_threshold", type=float, default=0.5)
    parser.add_argument("--n_latent_steps", type=int, default=3)
    parser.add_argument("--n_deep_recursions", type=int, default=2)
    parser.add_argument("--n_trained_recursions", type=int, default=1)
    parser.add_argument("--n_supervision_steps", type=int, default=4)
    parser.add_argument("--max_free_steps", type=int, default=0)
    parser.add_argument("--trajectory_pairs", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sequence_trm_benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_folder, test_folder = make_pairs(options)

    stored = HiddenPairsDataset(train_folder)
    config = DimensionCompressorConfig(hidden_size=stored.hidden_size, compressed_size=options.compressed_size)
    compressor = DimensionCompressor(config)
    fit = compressor.fit_pca(torch.cat([item["context"], item["target"][None]]) for item in stored)
    train, test = (HiddenPairsDataset(folder, compressor) for folder in (train_folder, test_folder))
    head = AutoModelForCausalLM.from_pretrained(options.model).get_output_embeddings()
    measure = Measure(test, compressor, head)
    print(f"{len(train)} pairs, {len(test)} held out; PCA keeps {fit.variance_kept:.1%}")

    last, targets = (
        torch.stack(tensors) for tensors in zip(*((pair["context"][-1], pair["target"]) for pair in train))
    )
    held_out_last = torch.stack([pair["context"][-1] for pair in test])
    regression, penalty = ridge(last, targets, held_out_last)
    summaries, held_out_summaries = (
        torch.stack([summary(pair["context"]) for pair in pairs]) for pairs in (train, test)
    )
    strong_regression, _ = ridge(summaries, targets, held_out_summaries)
    rows: dict[str, dict[str, float]] = {
        "mean of the training targets": measure(targets.mean(0).expand_as(held_out_last)),
        "last context state": measure(held_out_last),
        "ridge regression": measure(regression),
        "ridge regression, whole context": measure(strong_regression),
    }
    for name, measures in rows.items():
        show(name, measures)

    torch.manual_seed(0)
    model = SequenceTRM(SequenceTRMConfig(hidden_size=options.compressed_size, n_heads=4, dropout=options.dropout))
    arguments = TRMTrainingArguments(
        output_dir=str(options.output_dir / "trm"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_grad_norm=1.0,
        n_latent_steps=options.n_latent_steps,
        n_deep_recursions=options.n_deep_recursions,
        n_trained_recursions=options.n_trained_recursions,
        n_supervision_steps=options.n_supervision_steps,
        max_free_steps=options.max_free_steps,
        bce_halt_loss=True,
        halt_threshold=options.halt_threshold,
        adaptive_halt_threshold=True,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=100,
        use_cpu=True,
        report_to="none",
    )
    trainer = TRMTrainer(model, arguments, train, test, lm_head=head, compressor=compressor)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    evaluation = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    trainer.save_model()
    model.eval()
    predictions, num_steps = reason(model, test)
    rows["SequenceTRM"] = {**evaluation, **measure(predictions)}
    for steps in (1, 2, options.n_supervision_steps, 2 * options.n_supervision_steps):
        fixed, _ = reason(model, test, max_steps=steps, halt_threshold=1.0)
        rows[f"SequenceTRM, {steps} steps each"] = measure(fixed)
    for name in list(rows)[4:]:
        show(name, rows[name])
    print({name: rows["SequenceTRM"][name] for name in ("halting_accuracy", "solved_share", "mean_steps")})

    some = torch.utils.data.Subset(test, range(options.trajectory_pairs))
    trajectories = []
    for noise in NOISE_LEVELS:
        for number in TRAJECTORIES:
            for select_by in ("halt", "residual") if number > 1 else ("halt",):
                settings = {"num_trajectories": number, "noise_std": noise, "select_by": select_by}
                predictions, steps = reason(model, some, **settings)
                row = {"trajectories": number, "noise_std": noise, "select_by": select_by}
                row["mean_steps"] = steps.float().mean().item()
                trajectories.append({**row, **measure(predictions)})
                show(f"{number} trajectories, noise {noise}, by {select_by}", trajectories[-1])
    plain, _ = reason(model, some)
    show("without noise", measure(plain))
    shown = ("data", "eval_data", "model", "output_dir")
    flags = " ".join(f"--{name} {value}" for name, value in vars(options).items() if name not in shown)
    result = {
        "rows": rows,
        "ridge_penalty": penalty,
        "variance_kept": fit.variance_kept,
        "training_seconds": seconds,
        "steps_taken": torch.bincount(num_steps).tolist(),
        "without_noise": measure(plain),
        "trajectories": trajectories,
    }
    command = f"python benchmarks/sequence_trm.py --data train.jsonl --eval_data test.jsonl {flags}"
    write_result("sequence_trm", {**circumstances(command), **result})


if __name__ == "__main__":
    main()
