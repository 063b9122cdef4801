"""
The compressor on real hidden states: PCA against training, for several widths.

    python benchmarks/compressor.py --data train.jsonl --eval_data test.jsonl [--model DIR] [--sizes 16 32 64 128]

The states are those of the model of benchmarks/gsm8k_language_model.py on GSM8K's training texts, measured on held-out
texts of the test split. Training starts from random orthogonal rows and takes batches of 8 texts, in one order, with
AdamW. For every learning rate (constant, and decaying to 0 over `--max_steps`), the held-out error is looked at every
25 steps, outside the clock; "within 1%" is the fastest of them to come within 1% of the error PCA leaves. PCA sees the
same batches, and once more only the first `--few_batches` of them. Seconds are counted with the states at hand, and
with the language model's forward passes, which both need for each batch they see. Prints tables and writes
benchmarks/results/compressor.json.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gsm8k_language_model import DEFAULT_FOLDER, samples
from record import circumstances, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llada_trm_hf import DimensionCompressor, DimensionCompressorConfig
from llada_trm_hf.data import TextCollator, load_reasoning_dataset
from llada_trm_hf.training.compressor_trainer import last_layer_states
from llada_trm_hf.training.reconstruction_metrics import compare_next_tokens, reconstruction_metrics

LEARNING_RATES = [(rate, decays) for rate in (1e-3, 3e-3) for decays in (False, True)]
BATCH_TEXTS, LOOK_EVERY = 8, 25
SHOWN = (
    *(
        "mse",
        "training_mse",
        "cosine_similarity",
        "variance_ratio",
        "standardised_mse",
        "standardised_cosine_similarity",
    ),
    *(
        "top_token_agreement",
        "kl_divergence",
        "seconds",
        "times_faster_by_seconds",
        "times_faster_by_seconds_with_model",
    ),
)


def states_of(model: PreTrainedModel, texts: Any) -> tuple[list[torch.Tensor], float]:
    """The hidden states of each batch of texts, `[tokens, D]`, and the median seconds a batch took."""
    collate, states, spent = TextCollator(), [], []
    rows = [{"input_ids": ids} for ids in texts["input_ids"]]
    for first in range(0, len(rows), BATCH_TEXTS):
        batch = collate(rows[first : first + BATCH_TEXTS])
        start = time.perf_counter()
        hidden_states = last_layer_states(model, **batch)
        spent.append(time.perf_counter() - start)
        states.append(hidden_states[batch["attention_mask"].bool()])
    return states, statistics.median(spent)


def new_compressor(hidden_size: int, size: int) -> DimensionCompressor:
    torch.manual_seed(0)
    return DimensionCompressor(DimensionCompressorConfig(hidden_size=hidden_size, compressed_size=size))


@torch.no_grad()
def mean_squared_error(compressor: DimensionCompressor, states: torch.Tensor) -> float:
    return compressor(states).loss.item()


@torch.no_grad()
def measures(compressor: DimensionCompressor, states: torch.Tensor, head: torch.nn.Module) -> dict[str, float]:
    reconstructed = compressor(states).reconstructed
    same, divergence = compare_next_tokens(head, states, reconstructed)
    metrics = reconstruction_metrics(reconstructed, states)
    return {**metrics, "top_token_agreement": same.mean().item(), "kl_divergence": divergence.mean().item()}


def train(
    size: int, batches: list[torch.Tensor], held_out: torch.Tensor, goal: float, rate: float, decays: bool, steps: int
) -> tuple[DimensionCompressor, dict[str, Any]]:
    """The trained compressor, and after how many steps and seconds its held-out error was below `goal`."""
    compressor = new_compressor(held_out.shape[1], size)
    optimizer = torch.optim.AdamW(compressor.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if decays else 1.0)
    spent, reached = 0.0, None
    for step in range(1, steps + 1):
        start = time.perf_counter()
        compressor(batches[step % len(batches)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(compressor.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        spent += time.perf_counter() - start
        if reached is None and step % LOOK_EVERY == 0 and mean_squared_error(compressor, held_out) <= goal:
            reached = {"steps": step, "seconds": spent}
    return compressor, {"learning_rate": rate, "decays": decays, "within_1_percent": reached, "seconds": spent}


def fit(size: int, batches: list[torch.Tensor], held_out: torch.Tensor, head: Any, lm: float) -> dict[str, Any]:
    """PCA of `batches`; `lm` is the language model's seconds for a batch."""
    compressor = new_compressor(held_out.shape[1], size)
    start = time.perf_counter()
    compressor.fit_pca(batches)
    seconds = time.perf_counter() - start
    times = {"seconds": seconds, "seconds_with_model": seconds + lm * len(batches), "batches": len(batches)}
    return {"compressor": compressor, **times, **measures(compressor, held_out, head)}


def compare(
    size: int, batches: list[torch.Tensor], held_out: torch.Tensor, head: Any, lm: float, options: Any
) -> dict:
    """One width."""
    pca = fit(size, batches, held_out, head, lm)
    few = fit(size, batches[: options.few_batches], held_out, head, lm)
    runs = [train(size, batches, held_out, 1.01 * pca["mse"], *rate, options.max_steps) for rate in LEARNING_RATES]
    best, _ = min(runs, key=lambda run: mean_squared_error(run[0], held_out))
    times = [run["within_1_percent"] for _, run in runs if run["within_1_percent"]]
    fastest = min(times, key=lambda reached: reached["steps"], default=None)
    everything = torch.cat(batches)
    row: dict[str, Any] = {
        "compressed_size": size,
        "trained": {**measures(best, held_out, head), "training_mse": mean_squared_error(best, everything)},
        "runs": [run for _, run in runs],
        "within_1_percent": fastest,
    }
    if fastest:
        fastest["seconds_with_model"] = fastest["seconds"] + lm * fastest["steps"]
    for name, fitted in (("pca", pca), (f"pca of {options.few_batches} batches", few)):
        fitted["training_mse"] = mean_squared_error(fitted.pop("compressor"), everything)
        for clock in ("seconds", "seconds_with_model"):
            fitted[f"times_faster_by_{clock}"] = fastest[clock] / fitted[clock] if fastest else None
        row[name] = fitted
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--eval_data", required=True, help="GSM8K's test.jsonl")
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--texts", type=int, default=3200)
    parser.add_argument("--few_batches", type=int, default=64)
    parser.add_argument("--max_steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    train_texts, _ = load_reasoning_dataset("gsm8k", f"train[:{options.texts}]", data_files=options.data)
    eval_texts, _ = load_reasoning_dataset("gsm8k", "test[:300]", data_files=options.eval_data)
    batches, seconds_per_batch = states_of(model, samples(train_texts, tokenizer))
    held_out = torch.cat(states_of(model, samples(eval_texts, tokenizer))[0])
    print(f"{sum(map(len, batches)):,} states, {len(held_out):,} held out; {seconds_per_batch:.3f} s a batch")

    rows = []
    for size in options.sizes:
        row = compare(size, batches, held_out, model.get_output_embeddings(), seconds_per_batch, options)
        rows.append(row)
        for name in ("pca", f"pca of {options.few_batches} batches", "trained"):
            shown = {key: value for key, value in row[name].items() if key in SHOWN and value is not None}
            print(f"{size:4} {name:18}", *(f"{key}={value:.4g}" for key, value in shown.items()))
        print(f"     training within 1%: {row['within_1_percent']}", flush=True)
    constant = {name: value for name, value in rows[0]["pca"].items() if name.startswith("constant")}
    print("constant", *(f"{name}={value:.4f}" for name, value in constant.items()))
    command = "python benchmarks/compressor.py --data train.jsonl --eval_data test.jsonl"
    command += f" --texts {options.texts} --few_batches {options.few_batches} --max_steps {options.max_steps}"
    command += f" --threads {options.threads} --sizes {' '.join(map(str, options.sizes))}"
    parameters = model.num_parameters()
    result = {"parameters": parameters, "language_model_seconds_per_batch": seconds_per_batch, "rows": rows}
    write_result("compressor", {**circumstances(command), **result})


if __name__ == "__main__":
    main()
