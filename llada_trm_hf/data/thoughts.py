"""Thoughts in tokens: prompt, opening marker, thought, closing marker; and latent thoughts with their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..models import LatentThinkingConfig
from ..models.latent_thinking.thinking_chat_template import thought_texts, without_latent_thought
from .tokenization import end_of_sequence

COMPLETE = "complete"
# Why a problem has no pair.
NO_END_OF_THOUGHT = "no_end_of_thought"  # max_new_tokens were written, or the trace holds no closing marker
ENDED_EARLY = "ended_early"  # the text ended before the closing marker
TOO_LONG = "too_long"  # beyond the context of the model
EMPTY_PROMPT = "empty_prompt"
NO_THOUGHT = "no_thought"  # the trace has neither completion nor reasoning
NOT_FINITE = "not_finite"  # the states hold NaN or infinite values
REASONS = (NO_END_OF_THOUGHT, ENDED_EARLY, TOO_LONG, EMPTY_PROMPT, NO_THOUGHT, NOT_FINITE)


@dataclass(frozen=True)
class ThoughtTokens:
    """`hidden_pre` are the states at the positions of `context`, `hidden_post` the state at the last of `closing`."""

    context: list[int]  # everything before `<think>`: the prompt in the chat template, if there is one
    opening: list[int]  # `<think>`, and the white space a chat template puts after it
    thought: list[int]
    closing: list[int]  # `</think>`, one token or several

    @property
    def input_ids(self) -> list[int]:
        return self.context + self.opening + self.thought + self.closing


class ThoughtFormat:
    """
    Turns prompts and traces into tokens.

    A chat template writes the problem as a user's message, with thinking enabled; without one the prompt is the
    problem's own text. The opening marker follows, in place of one, or of an empty thought, that the template ends
    with. Markers are tokenized by themselves: one token where the tokenizer knows them, else several, which a trace
    must hold exactly.

    Raises:
        ValueError: if a marker is empty or has no tokens, or both are the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, think_start: str = "<think>", think_end: str = "</think>"):
        if think_start.strip() == think_end.strip():
            raise ValueError(f"think_start and think_end must differ, both are {think_start!r}.")
        self.tokenizer = tokenizer
        self.think_start, self.think_end = think_start, think_end
        self.start_ids, self.end_ids = self._tokenize(think_start), self._tokenize(think_end)
        for name, marker, ids in (("start", think_start, self.start_ids), ("end", think_end, self.end_ids)):
            if not marker.strip() or not ids or tokenizer.unk_token_id in ids:
                raise ValueError(f"think_{name}={marker!r} has no tokens in the vocabulary of the tokenizer.")

    def prompt(self, problem: str | list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """The tokens of the context of a problem (a text, or the messages of a chat), and of the opening marker."""
        text, space = self.context_text(problem)
        # A chat template writes the special tokens itself.
        context = self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]
        return context, self.start_ids + self._tokenize(space)

    def context_text(self, problem: str | list[dict[str, Any]]) -> tuple[str, str]:
        """The text before the opening marker, and the white space after it, if a chat template writes the marker."""
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
            options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": True}
            template = without_latent_thought(self.tokenizer.get_chat_template())
            text = self.tokenizer.apply_chat_template(messages, chat_template=template, **options)
        elif isinstance(problem, str):
            text = problem
        else:
            raise ValueError("The tokenizer has no chat template for messages: pass the prompt as a text.")
        body = text.rstrip()
        if body.endswith(self.think_start):
            return body.removesuffix(self.think_start), text[len(body) :]
        opened = body.removesuffix(self.think_end).rstrip()
        if body.endswith(self.think_end) and opened.endswith(self.think_start):  # a thought that was left empty
            return opened.removesuffix(self.think_start), ""
        return text, ""

    def trace(self, row: Mapping[str, Any]) -> tuple[ThoughtTokens | None, str]:
        """
        The tokens of a finished trace, or None and the reason why it has no complete thought.

        Args:
            row: `prompt`, and the first of these that is there: `completion_ids` or `completion`, what was written
                after the prompt, up to the closing marker or longer, with or without the opening one; `reasoning`, the
                thought without markers. Traces of datagen have a `status`.
        """
        if row.get("status") in REASONS:
            return None, row["status"]
        context, opening = self.prompt(row["prompt"]) if (row["prompt"] or "").strip() else ([], [])
        if not context:
            return None, EMPTY_PROMPT
        if row.get("completion_ids") is not None:
            thought = self._thought_of_ids(list(row["completion_ids"]), opening)
        elif row.get("completion") is not None:
            thought = self._thought_of_text(row["completion"], opening)
        elif row.get("reasoning"):
            thought = self._tokenize(row["reasoning"])
        else:
            return None, NO_THOUGHT
        if thought is None:
            return None, NO_END_OF_THOUGHT
        return ThoughtTokens(context, opening, thought, self.end_ids), COMPLETE

    def _thought_of_ids(self, ids: list[int], opening: list[int]) -> list[int] | None:
        broken = [token for token in ids if not isinstance(token, int)]
        if broken:
            raise ValueError(f"completion_ids must be whole numbers, got {broken[0]!r}.")
        for marker in (opening, self.start_ids):
            if ids[: len(marker)] == marker:
                ids = ids[len(marker) :]
                break
        width = len(self.end_ids)
        ends = (i for i in range(len(ids) - width + 1) if ids[i : i + width] == self.end_ids)
        return next((ids[:end] for end in ends), None)

    def _thought_of_text(self, text: str, opening: list[int]) -> list[int] | None:
        body = text.lstrip()
        if body.startswith(self.think_start):
            # The white space a template puts after the marker is part of `opening` already.
            space = self.tokenizer.decode(opening[len(self.start_ids) :])
            text = body.removeprefix(self.think_start).removeprefix(space)
        thought, found, _ = text.partition(self.think_end)
        return self._tokenize(thought) if found else None

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def latent_thinking_prompt(
    prompt: str | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: LatentThinkingConfig,
    tokenize: bool = True,
) -> list[int] | str:
    """
    A prompt for [`LatentThinkingForCausalLM`], written as [`ThoughtFormat`] does: everything up to and including a
    latent thought, after which the model writes its answer. Prompts of a batch are padded on the left.

    Args:
        prompt: a text (a user's message, with a chat template), or the messages of a chat so far.
        tokenizer, config: of the model.
        tokenize: `False` gives the text instead, for libraries that tokenize themselves, such as TRL.

    Raises:
        ValueError: for an empty prompt, or messages without a chat template.
    """
    start, latents, end = thought_texts(tokenizer, config)
    thoughts = ThoughtFormat(tokenizer, start, end)
    if tokenize:
        context, _ = thoughts.prompt(prompt)
        if not context:
            raise ValueError("The prompt is empty: there is nothing to think about.")
        return context + config.thought_token_ids
    return thoughts.context_text(prompt)[0] + start + latents + end


def tokenize_latent_answers(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: LatentThinkingConfig,
    response: str = "{reasoning}\n#### {answer}",
    max_length: int = 512,
) -> Dataset:
    """
    Turns problems (`prompt`, `answer`) into samples for [`LatentAnswerCollator`]: `prompt_ids`, with the thought, and
    `answer_ids`, with the end of the sequence. An answer is written as `response` does, its reasoning left empty.
    Problems with more than `max_length` tokens are dropped and counted.

    Raises:
        ValueError: if nothing is left, or the tokenizer has no end-of-sequence token.
    """
    end = end_of_sequence(tokenizer)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        answer = response.format(reasoning="", answer=row["answer"]).strip()
        return {
            "prompt_ids": latent_thinking_prompt(row["prompt"], tokenizer, config),
            "answer_ids": [*tokenizer(answer, add_special_tokens=False)["input_ids"], end],
        }

    samples = dataset.map(tokenize, remove_columns=dataset.column_names, desc="Tokenizing")
    fitting = samples.filter(lambda sample: len(sample["prompt_ids"]) + len(sample["answer_ids"]) <= max_length)
    if not len(fitting):
        raise ValueError(f"Every problem has more than max_length={max_length} tokens: raise max_length.")
    if len(fitting) < len(samples):
        print(f"Dropped {len(samples) - len(fitting)} of {len(samples)} problems: over {max_length} tokens.")
    return fitting


class LatentAnswerCollator:
    """
    Pads prompts on the left and answers on the right, so that all thoughts end in one column: the model then computes
    each position once, and with a frozen backbone keeps for the backward pass only what comes after the prompts.

    A batch has `input_ids` and `attention_mask` `[B, L]`, `logits_to_keep`, the number `A` of last positions that
    have labels, and these `labels` `[B, A]`. The mask hides the padding: any `pad_token_id` will do.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        def pad(rows: list[torch.Tensor], side: str, value: int) -> torch.Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

        prompts = [torch.tensor(sample["prompt_ids"]) for sample in samples]
        answers = [torch.tensor(sample["answer_ids"]) for sample in samples]
        sides = ((prompts, "left"), (answers, "right"))
        # The prompt's last token predicts the answer's first, and has no label itself.
        labels = pad([functional.pad(answer, (1, 0), value=-100) for answer in answers], "right", -100)
        return {
            "input_ids": torch.cat([pad(rows, side, self.pad_token_id) for rows, side in sides], dim=1),
            "attention_mask": torch.cat([pad([*map(torch.ones_like, rows)], side, 0) for rows, side in sides], dim=1),
            "labels": labels,
            "logits_to_keep": labels.shape[1],
        }
