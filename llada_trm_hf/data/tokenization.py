"""From problems, prompts and plain texts to tokens, and how the steps of a reasoning are laid out in chunks."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .rows import Rows, column_names, is_data_file, read_hub, read_rows

SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",  # as in LLaDA: padding is the end of the text, and is learned
    "mask_token": "<|mdm_mask|>",
}
# A line break ends a step, but not inside a LaTeX environment or a drawing, where a blank line would be an error.
_LINES = re.compile(r"(?P<open>\\begin\{|\[asy\])|(?P<close>\\end\{|\[/asy\])|\n\s*")
_SENTENCES = re.compile(r"[.!?]\s+(?=[A-Z$\\(])")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens and the special tokens of LLaDA (start, end = padding, mask), to train from scratch."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None) -> list[int]:
    """
    The tokens a prompt is generated from: a user's message if the tokenizer has a chat template, else the text.

    `enable_thinking` is for templates that take it (SmolLM3's, Qwen3's), None leaves it to them; ValueError without
    a template.
    """
    if not tokenizer.chat_template:
        if enable_thinking is not None:
            raise ValueError("enable_thinking needs a chat template; the tokenizer has none.")
        return tokenizer(prompt)["input_ids"]
    message = [{"role": "user", "content": prompt}]
    thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    batch = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, **thinking)
    return batch["input_ids"]


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a sample; ValueError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-sequence token: set tokenizer.eos_token.")
    return tokenizer.eos_token_id


def tokenize_reasoning(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    response: str = "{reasoning}\n#### {answer}",
    max_length: int = 512,
    align_steps_to_chunks: int | None = None,
) -> Rows:
    """
    Turns problems into samples for [`MaskedDiffusionCollator`]: `input_ids` (prompt, response, end of sequence),
    `prompt_length` and `index`. A tokenizer with a chat template formats the prompt as a user's message.

    A response is cut at `max_length` tokens; a problem without answer, or whose prompt leaves no room, is dropped,
    and, but for streams, counted.

    Args:
        dataset, response: of `load_reasoning_dataset`.
        max_length: tokens of prompt and response together.
        align_steps_to_chunks: the chunk size of a refiner. Every step of the reasoning, and the answer, then starts
            at a chunk's first token, chunks counted from the prompt's first token, so no chunk holds tokens of two
            steps. Steps are lines, or sentences where there is only one line. The gaps, also the one before the
            response, are line breaks that the model learns to produce: they stay in the text as blank lines.
            (End-of-sequence tokens would vanish from the text, but generation stops at the first.)

    Raises:
        ValueError: if nothing is left, or the tokenizer lacks an end-of-sequence token or what aligning steps needs.
    """
    end = end_of_sequence(tokenizer)
    layout = None if align_steps_to_chunks is None else _StepLayout(align_steps_to_chunks, tokenizer)

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = prompt_tokens(row["prompt"], tokenizer)
        text, starts = _format_response(response, row["reasoning"], row["answer"])
        gap = 0 if layout is None else layout.gap(len(prompt))
        sample = prompt
        if row["answer"].strip() and len(prompt) + gap < max_length:
            if layout is None:
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                tokens = layout.tokenize(text, starts, len(prompt))
            sample = [*prompt, *tokens, end]
        return {"input_ids": sample[:max_length], "prompt_length": len(prompt), "index": index}

    progress = {"desc": "Tokenizing"} if isinstance(dataset, Dataset) else {}
    samples = dataset.map(tokenize, with_indices=True, remove_columns=column_names(dataset), **progress)
    fitting = samples.filter(lambda sample: sample["prompt_length"] < len(sample["input_ids"]))
    if isinstance(samples, Dataset) and len(fitting) < len(samples):
        dropped = f"{len(samples) - len(fitting)} of {len(samples)} problems"
        if not len(fitting):
            raise ValueError(f"{dropped} have no answer or max_length={max_length} prompt tokens: raise max_length.")
        print(f"Dropped {dropped}: no answer, or prompt over {max_length} tokens.")
    return fitting


class _StepLayout:
    """Tokens of a response with line breaks between its steps, so that each step starts at a chunk's first token."""

    def __init__(self, chunk_size: int, tokenizer: PreTrainedTokenizerBase):
        if chunk_size < 1:
            raise ValueError(f"align_steps_to_chunks must be at least 1, got {chunk_size}.")
        if not tokenizer.is_fast:
            raise ValueError("Aligning steps to chunks needs a fast tokenizer, which knows what text a token is of.")
        # Some tokenizers write a space first.
        line_break = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        if tokenizer.decode(line_break) != "\n":
            raise ValueError("Aligning steps to chunks needs a token for a line break; the tokenizer has none.")
        self.chunk_size, self.tokenizer, self.line_break = chunk_size, tokenizer, line_break

    def gap(self, position: int) -> int:
        """Tokens from a position to the next chunk's first."""
        return -position % self.chunk_size

    def tokenize(self, text: str, starts: list[int], position: int) -> list[int]:
        """The tokens of `text`, which is at `position` in the sample: line breaks precede its steps at `starts`."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = np.array([end for _, end in encoded["offset_mapping"]])
        # A step's first token is the first that ends after the step starts: it may begin with a space before it.
        cuts = {0, *np.searchsorted(ends, starts, side="right").tolist()}
        tokens: list[int] = []
        for start, stop in pairwise([*sorted(cuts), len(ends)]):
            tokens += self.line_break * self.gap(position + len(tokens)) + encoded["input_ids"][start:stop]
        return tokens


def _format_response(response: str, reasoning: str, answer: str) -> tuple[str, list[int]]:
    """The text of a response, and where each of its steps but the first starts."""
    head, field, tail = response.partition("{reasoning}")
    head, body, tail = head.format(answer=answer), reasoning if field else "", tail.format(answer=answer)
    text, answer_start = (head + body + tail).rstrip(), len(head) + len(body) + len(tail) - len(tail.lstrip())
    lead = len(text) - len(text.lstrip())
    starts = {*(len(head) + start for start in _steps(body.rstrip())), answer_start}
    # Where no space separates the answer from the reasoning, a line break between them would change the text.
    separated = {start for start in starts if lead < start < len(text) and text[start - 1].isspace()}
    return text[lead:], sorted(start - lead for start in separated)


def _steps(reasoning: str) -> list[int]:
    """Where each step starts."""
    first, starts, depth = len(reasoning) - len(reasoning.lstrip()), [], 0
    for match in _LINES.finditer(reasoning):
        depth += bool(match["open"]) - bool(match["close"])
        if match[0].isspace() and depth <= 0:
            starts.append(match.end())
    return [first, *(starts or [match.end() for match in _SENTENCES.finditer(reasoning)])]


def load_text_dataset(
    name: str, split: str = "train", data_files: str | None = None, text_column: str = "text", streaming: bool = False
) -> Rows:
    """
    Loads texts as the column `text`.

    Args:
        name: a local txt (a text per line), json, jsonl, csv or parquet file, or a dataset of the Hub such as
            `"HuggingFaceFW/fineweb-edu"`.
        split: a split, or a slice of one such as `"train[:1000]"`. A local file is one split.
        data_files: a local file to read instead.
        text_column: the column that holds the text; in a txt file it is `text`.
        streaming: read a dataset of the Hub as it comes instead of downloading it first.

    Raises:
        ValueError: for an unknown name, a missing column, or an empty dataset.
        FileNotFoundError: for a file that does not exist.
    """
    path = data_files or (name if is_data_file(name) else None)
    if path is not None:
        rows = read_rows(path, split)
    elif "/" in name:
        rows = read_hub(name, None, split, streaming)
    else:
        files = ".txt, .json, .jsonl, .csv or .parquet file"
        raise ValueError(f"Unknown text {name!r}: name a {files}, or a dataset of the Hub as owner/name.")
    if text_column not in column_names(rows):
        found = ", ".join(column_names(rows))
        raise ValueError(f"{path or name} has no column {text_column!r}, it has {found}: name one with text_column.")
    rows = rows.select_columns([text_column])
    return rows if text_column == "text" else rows.rename_column(text_column, "text")


def tokenize_texts(dataset: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> Rows:
    """`input_ids`: the first `max_length` tokens of each `text` that is not empty; ValueError if all are empty."""

    def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
        # None stands for a value that a file does not give.
        texts = [text or "" for text in rows["text"]]
        return {"input_ids": tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]}

    dataset = dataset.filter(lambda row: bool(row["text"] and row["text"].strip()))
    samples = dataset.map(tokenize, batched=True, remove_columns=["text"])
    if isinstance(samples, Dataset) and not len(samples):
        raise ValueError("The texts are all empty.")
    return samples


class TextCollator:
    """Pads `input_ids` to the longest, on the right: `{"input_ids": [B, L], "attention_mask": [B, L]}`."""

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.as_tensor(sample["input_ids"], dtype=torch.long) for sample in samples]
        masks = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": masks}
