"""
Makes the language model of the latent-thinking example: a SmolLM3 of under a million parameters, trained from scratch
to solve chains of differences, with a written chain of thought or, told not to think, without.

    python examples/latent_thinking/language_model.py OUTPUT_FOLDER [--num_terms 8] [--max_steps 2500] [--seed 0]

OUTPUT_FOLDER gets the model, its tokenizer and its problems: `train.jsonl` has chains of 2 to `--num_terms` digits,
`test.jsonl` other chains of `--num_terms` digits. A sample is `3942=<think>39=6 64=2 22=0</think>0`; every third one
has an empty thought.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from llada_trm_hf.data import byte_tokenizer
from llada_trm_hf.data.arithmetic import difference_chains

# The message alone; told not to think, a model finds its thought closed already, as in SmolLM3's own template.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}<think>"
    "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in ("<think>", "</think>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|latent|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_problems(path: Path, problems: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    rows = list(problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def mixed_chains(num_problems: int, num_terms: int, seed: int) -> Iterator[dict[str, str]]:
    """As many chains of each length up to `num_terms`; of the short ones there are few, which come again and again."""
    lengths = range(2, num_terms + 1)
    share = -(-num_problems // len(lengths))
    # A tenth of all chains is held out.
    chains = [
        cycle(list(difference_chains(min(share, int(0.89 * 10**n)), n, "train", seed, equations=True)))
        for n in lengths
    ]
    return islice((next(chain) for _ in range(share) for chain in chains), num_problems)


def samples(problems: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    def tokenize(row: dict[str, str], number: int) -> dict[str, Any]:
        prompt = tokenizer(f"{row['prompt']}<think>")["input_ids"]
        thought = "" if number % 3 == 2 else row["reasoning"]
        answer = [*tokenizer(f"{thought}</think>{row['answer']}")["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    dataset = Dataset.from_list(problems)
    return dataset.map(tokenize, with_indices=True, remove_columns=dataset.column_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--num_terms", type=int, default=8, help="digits of the longest chains")
    parser.add_argument("--num_problems", type=int, default=100_000, help="to train on")
    parser.add_argument("--max_steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    options.output_dir.mkdir(parents=True, exist_ok=True)
    problems = write_problems(
        options.output_dir / "train.jsonl", mixed_chains(options.num_problems, options.num_terms, options.seed)
    )
    write_problems(
        options.output_dir / "test.jsonl",
        difference_chains(1000, options.num_terms, "test", options.seed, equations=True),
    )
    tokenizer = make_tokenizer()
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 32,
        num_key_value_heads=options.hidden_size // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = SmolLM3ForCausalLM(config)
    print(f"{model.num_parameters():,} parameters")
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.output_dir),
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(200, options.max_steps // 10),
            adam_beta2=0.98,
            weight_decay=0.05,
            seed=options.seed,
            use_cpu=True,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=samples(problems, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
