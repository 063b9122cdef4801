"""
README's code from top to bottom, in a temporary folder, with the package as it is installed: `python run_readme.py`,
or with `--extras` what needs extras too. Small random models and a few problems lie where README names those of the
Hub, uploads go to a server here, and training takes a few steps.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from hub_http_server import TOKEN, model_hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import llada_trm_hf
from llada_trm_hf import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    SequenceTRM,
    SequenceTRMConfig,
)

ROOT = Path(__file__).resolve().parents[1]
MASK, END = "<|mdm_mask|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
SIZES = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
# Python code that is not run without extras: it has to say which one it needs.
NEEDS_EXTRAS = ("latent_thinking_prompt", "Trainer", "HiddenPairs", "onnxruntime")
# What is not run: it makes the installation that is there already.
NOT_RUN = ("make ", "pip install")
# Settings that make a command short, by what it starts with; the last of two counts.
SHORTER = {
    "train --recipe compressor_1b": "--max_steps 2 --num_eval_samples 4",
    "train": "--max_steps 2",
    "datagen": "--max_new_tokens 12",
    "lm-eval": "--limit 2 --gen_kwargs max_gen_toks=16",
}
# What stands for the dots of a command that README only outlines, by a part of it.
OUTLINED = {
    "accelerate launch": "--use_cpu --backbone GSAI-ML/LLaDA-8B-Instruct --dataset_name gsm8k "
    "--output_dir runs/launched --max_steps 2",
    "--profile_steps": "--backbone runs/small --num_terms 7 --output_dir runs/profiled --max_steps 7",
    "llada_trm_hf.cli evaluate": "--model runs/head --dataset_name gsm8k --max_new_tokens 16 --output_dir results/two",
    "--no_thinking": "--dataset_name gsm8k --max_new_tokens 16 --output_dir results/bare_thinker",
    "llada_trm_hf.cli datagen": "--model HuggingFaceTB/SmolLM3-3B --dataset gsm8k "
    "--max_new_tokens 12 --output_dir two",
}
# For a machine with fewer devices than README's.
FEWER = {
    "--nproc_per_node 8": "--nproc_per_node 2",
    "accelerate launch": "accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no",
}


def tokenizer():
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = PreTrainedTokenizerFast(tokenizer_object=words, mask_token=MASK, eos_token=END, pad_token=END)
    made.chat_template = TEMPLATE
    return made


def make_workspace(folder):
    """What README takes for granted, under the names it uses."""
    torch.manual_seed(0)
    words = tokenizer()
    ids = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    llada = LLaDAForMaskedDiffusion(LLaDAConfig(**SIZES, **ids, bos_token_id=None, mask_token_id=words.mask_token_id))
    heads = {"num_key_value_heads": 2, "bos_token_id": None}
    found = {
        "GSAI-ML/LLaDA-8B-Instruct": llada,
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, **ids, bos_token_id=None)),
        "user/name": LLaDATRMForMaskedDiffusion.from_backbone(llada, chunk_size=16),
        "user/llada-trm": LLaDATRMForMaskedDiffusion.from_backbone(llada, chunk_size=16),
        "runs/1b": DimensionCompressor(DimensionCompressorConfig(hidden_size=256, compressed_size=16)),
        "runs/trm": SequenceTRM(SequenceTRMConfig(hidden_size=16, n_heads=2)),
    }
    for name, model in found.items():
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    save_thinking_model(folder / "HuggingFaceTB/SmolLM3-3B", heads)


def save_thinking_model(folder, heads):
    """A random model that closes its thoughts: with such a row of the LM head, about every second token does."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    model = SmolLM3ForCausalLM(SmolLM3Config(**SIZES, **ids, **heads, tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight[words.convert_tokens_to_ids("</think>")] *= 20
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def make_data(folder):
    problems = [(f"What is {i} + {i + 1}?", f"It is {i} and {i + 1}.\n", str(2 * i + 1)) for i in range(40)]
    gsm8k = [{"question": q, "answer": f"{r}#### {a}"} for q, r, a in problems]
    own = [{"prompt": q, "reasoning": r, "answer": a} for q, r, a in problems]
    texts = [{"text": f"{q} {r} {a}"} for q, r, a in problems]
    thought = [{**row, "completion": f"{row['reasoning']}</think>"} for row in own]
    for name, rows in {
        "openai/gsm8k/train.jsonl": gsm8k,
        "openai/gsm8k/test.jsonl": gsm8k[:3],
        "HuggingFaceFW/fineweb-edu/train.jsonl": texts * 20,
        "train.jsonl": own,
        "prompts.jsonl": own[:3],
        "traces.jsonl": thought,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, config, splits in (
        ("openai/gsm8k", "main", ("train", "test")),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", ("train",)),
    ):
        files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
        card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
        (folder / name / "README.md").write_text(f"---\n{card}\n---\n")
    (folder / "texts.txt").write_text("\n".join(row["text"] for row in texts * 20))


def make_older_file(folder):
    """A trm.pt as a trainer of llm-trm wrote it, with a dataclass of its script pickled in it."""
    size, layer = 16, "net.layers.0"
    shapes = {"reasoning_token": (1, 1, size), "output_norm.weight": (size,)}
    shapes |= {f"{layer}.norm{n}.weight": (size,) for n in (1, 2)}
    for name, (rows, columns) in {
        f"{layer}.self_attn.in_proj_": (3 * size, size),
        f"{layer}.self_attn.out_proj.": (size, size),
        f"{layer}.mlp.0.": (4 * size, size),
        f"{layer}.mlp.2.": (size, 4 * size),
        "halt_head.": (1, size),
    }.items():
        shapes |= {f"{name}weight": (rows, columns), f"{name}bias": (rows,)}
    settings = {"n_layers": 1, "n_heads": 2, "n_latent_steps": 2, "n_deep_recursions": 2, "n_supervision_steps": 2}
    settings |= {"dropout": 0.1, "halt_threshold": 0.5, "halt_loss_weight": 0.5, "bce_halt_loss": True}
    config = dataclasses.make_dataclass("Phase2Config", [(key, type(value), value) for key, value in settings.items()])
    config.__module__ = "__main__"
    globals()["Phase2Config"] = config
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"trm_state_dict": weights, "config": config(), "ema_shadow": weights}, folder / "trm.pt")


def blocks():
    """Of README: what a block is written in ("" for commands), and its text."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """The lines of README's commands, shortened, those it outlines filled in."""
    for language, block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("  #")[0].strip()
            if language or not command or command.startswith(NOT_RUN):
                continue
            if command.endswith(" ..."):
                rest = next(rest for part, rest in OUTLINED.items() if part in command)
                command = command.removesuffix("...") + rest
            else:
                start = next((start for start in SHORTER if f"llada-trm {start}" in command), None)
                command = command if start is None else f"{command} {SHORTER[start]}"
            for many, few in FEWER.items():
                command = command.replace(many, few)
            yield command


def run_command(command, hub):
    """What went wrong, if anything."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if "push" in command:
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        environment["HF_HUB_DISABLE_XET"] = "1"
    # (The shell of a person; its file for a new backbone is written by it.)
    result = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=900)
    return "" if result.returncode == 0 else (result.stdout + result.stderr)[-2000:]


def run_python(code, names, extras):
    needs_extras = any(word in code for word in NEEDS_EXTRAS)
    try:
        exec(compile(code, "README", "exec"), names)
    except ImportError as error:
        named = "pip install" in str(error) or error.name == "onnxruntime"
        return "" if needs_extras and not extras and named else traceback.format_exc()
    except Exception:
        return traceback.format_exc()
    return "" if extras or not needs_extras else "It ran without the extra it is thought to need."


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", action="store_true", help="with the extras, and the commands too")
    parser.add_argument("--installed", action="store_true", help="refuse a package that is not installed, but here")
    options = parser.parse_args()
    if options.installed and ROOT / "llada_trm_hf" in Path(llada_trm_hf.__file__).parents:
        parser.error("the wheel has to be installed")
    with model_hub() as hub:
        return run_all(options.extras, hub)


def run_all(extras, hub):
    type_command = partial(run_command, hub=hub)
    typed = [("llada-trm demo --smoke_test --output_dir outputs/demo", type_command)]
    steps = [*typed, *((line, type_command) for line in commands())] if extras else []
    # What the loop over an exported model is given.
    names = {"__name__": "README", "tokens": np.array([[5, 6, tokenizer().mask_token_id]])}
    names["mask_token_id"] = tokenizer().mask_token_id
    run_block = partial(run_python, names=names, extras=extras)
    steps += [(code, run_block) for language, code in blocks() if language == "python"]
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_workspace(Path(folder))
        make_data(Path(folder))
        make_older_file(Path(folder))
        for step, run in steps:
            problem = run(step)
            print("FAILED" if problem else "ok", "|", step.strip().splitlines()[0], flush=True)
            failures += [f"{step}\n{problem}"] if problem else []
        os.chdir(ROOT)
    print("\n\n".join(failures))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{len(steps) - len(failures)} of {len(steps)} of README's snippets did what they should ({versions}).")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
