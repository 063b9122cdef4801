"""
README's code, in a temporary folder, with the package as it is installed: `python run_readme.py`, or with `--extras`
what needs extras too. Small random models and a few problems lie where README names those of the Hub; training takes a
few steps.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
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
# Commands that are not run: other machines, a token, downloads, an older file, or not a command but an outline of one.
NOT_RUN = ("make ", "pip install", "torchrun", "accelerate launch", "push", "lm-eval", "...")
# Settings that make a command short, by what it starts with; the last of two counts.
SHORTER = {
    "train --recipe compressor_1b": "--max_steps 2 --num_eval_samples 4",
    "train": "--max_steps 2",
    "datagen": "--max_new_tokens 12",
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
        "HuggingFaceTB/SmolLM3-3B": SmolLM3ForCausalLM(SmolLM3Config(**SIZES, **ids, **heads)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, **ids, bos_token_id=None)),
        "user/name": LLaDATRMForMaskedDiffusion.from_backbone(llada, chunk_size=16),
        "runs/1b": DimensionCompressor(DimensionCompressorConfig(hidden_size=256, compressed_size=16)),
        "runs/trm": SequenceTRM(SequenceTRMConfig(hidden_size=16, n_heads=2)),
    }
    for name, model in found.items():
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)


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
    (folder / "small.json").write_text(json.dumps(SIZES))


def blocks():
    """Of README: what a block is written in ("" for commands), and its text."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """The lines of README that `llada-trm` can run here, shortened."""
    for language, block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("  #")[0].strip()
            if language or "llada-trm" not in command or any(part in command for part in NOT_RUN):
                continue
            start = next((start for start in SHORTER if f"llada-trm {start}" in command), None)
            yield command if start is None else f"{command} {SHORTER[start]}"


def run_command(command):
    """What went wrong, if anything."""
    words, environment = shlex.split(command), dict(os.environ)
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    words[0] = str(Path(sys.executable).with_name(words[0]))
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    if "--output_dir more_pairs" in command:
        # A random model closes no thought: what was made from traces takes the place of what it thought.
        shutil.copytree("more_pairs", "pairs", dirs_exist_ok=True)
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
    extras = parser.parse_args().extras
    assert ROOT / "llada_trm_hf" not in Path(llada_trm_hf.__file__).parents, "the wheel has to be installed"
    steps = [("llada-trm demo --smoke_test", run_command), *((line, run_command) for line in commands())]
    steps = steps if extras else []
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
