"""
Does thinking in latent space replace a written chain of thought? examples/latent_thinking on three seeds.

    python benchmarks/latent_thinking.py [--seeds 0 1 2] [--threads 2] [--train_only]

For each seed `run.sh` makes the language model and trains the parts (an hour on a core; what is there already in
`--output_dir` is used), then GRPO from a shorter answer supervision too, and for seed 0 such a shorter one with 1 and
4 latents, and without distillation. Measured on 1,000 held-out chains of eight digits,
greedy: accuracy, tokens generated, and milliseconds an answer takes, all models in turn in one loop, alone and in
batches of 64. Writes benchmarks/results/latent_thinking.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import circumstances, mean_and_margin, write_result
from transformers import AutoTokenizer

from llada_trm_hf import LatentThinkingForCausalLM
from llada_trm_hf.evaluation.evaluate import EvaluationSettings, run_evaluation
from llada_trm_hf.evaluation.language_models import load_model, make_responder

EXAMPLE = Path(__file__).parents[1] / "examples" / "latent_thinking" / "run.sh"
# Name: folder, whether the chat template is told not to think.
MODELS = {
    "chain of thought": ("lm", False),
    "no thought": ("lm", True),
    "latent, distilled": ("distilled", False),
    "latent, answer supervision": ("answers", False),
    "latent, GRPO": ("grpo", False),
}
REASONING_STEPS = (1, 2, 3, 4, 8)
# Answer supervision with other settings and fewer steps: whether it starts from the distilled SequenceTRM, and flags.
NEW_TRM = ["--n_heads", "4", "--n_latent_steps", "4", "--n_deep_recursions", "1", "--n_supervision_steps", "1"]
VARIANTS: dict[str, tuple[bool, list[str]]] = {
    "1 latent": (True, ["--num_latents", "1"]),
    "2 latents": (True, ["--num_latents", "2"]),
    "4 latents": (True, ["--num_latents", "4"]),
    "without distillation": (False, ["--num_latents", "2", *NEW_TRM]),
}
VARIANT_STEPS = 3000
EARLY = "2 latents"  # the variant that GRPO also starts from, for every seed: it still has something to learn


def run(command: list[str], threads: int) -> None:
    bin_folder = str(Path(sys.executable).parent)  # where llada-trm is installed, too
    path = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads), "PATH": path})


def train(seed: int, folder: Path, threads: int, with_variants: bool) -> None:
    run(["sh", str(EXAMPLE), str(folder), str(seed)], threads)
    if not (folder / "distilled" / "config.json").exists():
        model = LatentThinkingForCausalLM.from_backbone(
            str(folder / "lm"), compressor=str(folder / "compressor"), trm=str(folder / "trm"), num_latents=2
        )
        model.save_pretrained(folder / "distilled")
        AutoTokenizer.from_pretrained(folder / "lm").save_pretrained(folder / "distilled")
    for name in VARIANTS if with_variants else [EARLY]:
        (distilled, flags), output = VARIANTS[name], variant_folder(folder, name)
        if (output / "model.safetensors").exists():
            continue
        data = ["--dataset_name", "arithmetic", "--data_files", f"{folder}/lm/train.jsonl", "--max_length", "64"]
        start = ["--backbone", f"{folder}/lm", "--compressor", f"{folder}/compressor"]
        start += ["--trm", f"{folder}/trm"] if distilled else []
        settings = ["--dropout", "0", "--lr", "3e-4", "--batch_size", "64", "--max_steps", str(VARIANT_STEPS)]
        rest = ["--save_strategy", "no", "--seed", str(seed), "--output_dir", str(output)]
        run(["llada-trm", "train", "--recipe", "latent_answer", *start, *data, *settings, *rest, *flags], threads)
    if not (folder / "grpo_early" / "model.safetensors").exists():
        flags = f"--eval_data_files {folder}/lm/test.jsonl --eval_split train[:300] --max_length 64"
        flags += " --dataset_name arithmetic --num_terms 8 --split train[:6400] --max_completion_length 4"
        flags += " --curriculum false --scale_rewards none --lr 1e-5 --batch_size 256 --max_steps 100"
        flags += " --per_device_eval_batch_size 400 --eval_strategy steps --eval_steps 50 --eval_on_start true"
        flags += f" --save_strategy no --seed {seed}"
        start = ["--checkpoint", str(variant_folder(folder, EARLY)), "--output_dir", str(folder / "grpo_early")]
        run(["llada-trm", "train", "--recipe", "grpo", *start, *flags.split()], threads)


def variant_folder(folder: Path, name: str) -> Path:
    return folder / f"answers_{name.replace(' ', '_')}"


def evaluate(model: Path, problems: Path, no_thinking: bool = False) -> dict[str, float]:
    """Accuracy on the held-out problems, and tokens generated for one."""
    output = model / ("held_out_no_thinking" if no_thinking else "held_out")
    summary = run_evaluation(
        EvaluationSettings(
            model=str(model),
            output_dir=str(output),
            dataset_name="arithmetic",
            split="train",  # all of the file
            data_files=str(problems),
            generation={"max_new_tokens": 64} | ({"enable_thinking": False} if no_thinking else {}),
            batch_size=100,
        )
    )
    assert summary is not None
    return {"accuracy": summary.accuracy.value, "tokens": summary.tokens}


def milliseconds(folder: Path, batch_size: int, repeats: int) -> dict[str, float]:
    """Of an answer, of each model, in turn on the same problems; medians."""
    problems = [json.loads(line)["prompt"] for line in (folder / "lm" / "test.jsonl").read_text().splitlines()]
    responders = {}
    for name, (kind, no_thinking) in MODELS.items():
        settings = {"max_new_tokens": 64} | ({"enable_thinking": False} if no_thinking else {})
        responders[name] = make_responder(*load_model(str(folder / kind)), settings)
    times: dict[str, list[float]] = {name: [] for name in responders}
    for number in range(repeats + 1):
        batch = problems[number * batch_size : (number + 1) * batch_size]
        for name, responder in responders.items():
            prompts = [responder.prompt(problem) for problem in batch]
            start = time.perf_counter()
            responder.respond(prompts)
            times[name].append(1000 * (time.perf_counter() - start) / batch_size)
    return {name: statistics.median(spent[1:]) for name, spent in times.items()}  # the first one warms up


def trainable_parameters(folder: Path, name: str) -> int:
    """Those that the method trains on top of the language model."""
    if MODELS[name][0] == "lm":
        return 0
    thinker = LatentThinkingForCausalLM.from_pretrained(folder / MODELS[name][0]).thinker
    if name == "latent, distilled":
        return thinker.num_parameters() - sum(p.numel() for p in thinker.projector.parameters())
    return thinker.num_parameters() - sum(p.numel() for p in thinker.trm.halt_head.parameters())


def held_out_rewards(folder: Path) -> list[tuple[int, float]]:
    """Mean reward of sampled answers to held-out problems, by step of GRPO."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["eval_reward"]) for entry in history if "eval_reward" in entry]


@torch.no_grad()
def accuracy_by_steps(folder: Path) -> dict[int, float]:
    """Of greedy answers, with so many supervision steps to think, none halting before."""
    model, tokenizer = load_model(str(folder))
    responder = make_responder(model, tokenizer, {"max_new_tokens": 64})
    problems = [json.loads(line) for line in (folder.parent / "lm" / "test.jsonl").read_text().splitlines()]
    model.config.halt_threshold, result = 1.0, {}
    for steps in REASONING_STEPS:
        model.config.max_reasoning_steps, right = steps, 0
        for start in range(0, len(problems), 100):
            batch = problems[start : start + 100]
            responses = responder.respond([responder.prompt(problem["prompt"]) for problem in batch])
            right += sum(response.text.strip() == problem["answer"] for response, problem in zip(responses, batch))
        result[steps] = right / len(problems)
    return result


def measure(folder: Path, with_variants: bool) -> dict[str, Any]:
    problems = folder / "lm" / "test.jsonl"
    models: dict[str, dict[str, Any]] = {}
    for name, (kind, no_thinking) in MODELS.items():
        models[name] = evaluate(folder / kind, problems, no_thinking)
        models[name]["trainable_parameters"] = trainable_parameters(folder, name)
    for batch_size, repeats in ((1, 100), (64, 15)):
        for name, value in milliseconds(folder, batch_size, repeats).items():
            models[name][f"milliseconds_{batch_size}"] = value
    result: dict[str, Any] = {
        "models": models,
        "held_out_rewards": held_out_rewards(folder / "grpo"),
        "held_out_rewards_early": held_out_rewards(folder / "grpo_early"),
        "accuracy_by_steps": accuracy_by_steps(folder / "answers"),
    }
    if with_variants:
        result["variant_steps"] = VARIANT_STEPS
        result["variants"] = {name: evaluate(variant_folder(folder, name), problems) for name in VARIANTS}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train_only", action="store_true", help="measure nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/latent_thinking_benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folders = {seed: options.output_dir / f"seed_{seed}" for seed in options.seeds}
    for seed, folder in folders.items():
        train(seed, folder, options.threads, with_variants=seed == 0)
    if options.train_only:
        return
    seeds = [{"seed": seed, **measure(folder, with_variants=seed == 0)} for seed, folder in folders.items()]
    for name in MODELS:
        accuracy, margin = mean_and_margin([seed["models"][name]["accuracy"] for seed in seeds])
        print(f"{name}: {accuracy:.1%} ± {margin:.1%}", seeds[0]["models"][name])
    arguments = " ".join(sys.argv[1:])
    command = f"python benchmarks/latent_thinking.py{' ' * bool(arguments)}{arguments}"
    table = {
        name: {key: mean_and_margin([seed["models"][name][key] for seed in seeds]) for key in seeds[0]["models"][name]}
        for name in MODELS
    }
    write_result("latent_thinking", {**circumstances(command), "table": table, "seeds": seeds})


if __name__ == "__main__":
    main()
