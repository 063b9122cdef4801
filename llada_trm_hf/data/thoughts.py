"""Thoughts in tokens: prompt, opening marker, thought, closing marker; and latent thoughts with their answers."""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..models import LatentThinkingConfig
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
    start, latents, end = _thought_texts(tokenizer, config)
    thoughts = ThoughtFormat(tokenizer, start, end)
    if tokenize:
        context, _ = thoughts.prompt(prompt)
        if not context:
            raise ValueError("The prompt is empty: there is nothing to think about.")
        return context + config.thought_token_ids
    return thoughts.context_text(prompt)[0] + start + latents + end


def _thought_texts(tokenizer: PreTrainedTokenizerBase, config: LatentThinkingConfig) -> tuple[str, str, str]:
    """The opening marker, the latents and the closing marker of a thought."""
    start, end = (tokenizer.decode(ids) for ids in (config.think_start_token_ids, config.think_end_token_ids))
    return start, tokenizer.convert_ids_to_tokens(config.latent_token_id) * config.num_latents, end


# --- The chat template of a latent thinker ---

# The language model's own template is a block of the new one. Written where it stands, its {% generation %} tags go on
# marking the assistant's tokens; called, it gives its text, of which an open or empty thought is cut off.
_FIRST_LINE = "{#- Ends the prompt with a latent thought, unless enable_thinking is false. -#}"
_BLOCK, _END_OF_BLOCK = "{%+ block language_model +%}", "{%+ endblock language_model %}"
_THOUGHT = Template(
    """
{%- if add_generation_prompt and (enable_thinking is undefined or enable_thinking) %}
    {%- set enable_thinking, has_switch = true, $has_switch %}
    {%- set think_start, think_latents, think_end = $start, $latents, $end %}
    {%- set prompt = self.language_model() %}
    {%- set body = prompt.rstrip() %}
    {%- set opened = body.removesuffix(think_end).rstrip() %}
    {%- set is_empty_thought = body.endswith(think_end) and opened.endswith(think_start) %}
    {%- if body.endswith(think_start) %}
        {%- set prompt = body.removesuffix(think_start) %}
    {%- elif is_empty_thought and not has_switch %}
        {%- set prompt = opened.removesuffix(think_start) %}
    {%- endif %}
    {{- prompt }}
    {%- if not (is_empty_thought and has_switch) %}
        {{- think_start + think_latents + think_end }}
    {%- endif %}
{%- else -%}"""
)
_LAST_LINE = """
{%- endif -%}
"""


def latent_thinking_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: LatentThinkingConfig
) -> PreTrainedTokenizerBase:
    """
    A copy of `tokenizer` whose chat template ends prompts (`add_generation_prompt=True`) with a latent thought, as
    `latent_thinking_prompt` writes it. Saved with the model, it makes `pipeline("text-generation")` think about
    messages with transformers alone. `apply_chat_template(..., enable_thinking=False)` is the template it had. Without
    a chat template there are no messages: the tokenizer is returned as it is.

    An opening marker that the template ends with is part of the thought. So is an empty thought, unless the template
    has a switch, `enable_thinking`, of its own: then the conversation asked for it (SmolLM3's `/no_think`).

    Raises:
        ValueError: if the tokens of a prompt with a thought differ from those the model reads, because the tokenizer
            merges a marker of several tokens with what stands before it.
    """
    if not tokenizer.chat_template:
        return tokenizer
    tokenizer, given = copy.deepcopy(tokenizer), tokenizer.chat_template
    texts = _thought_texts(tokenizer, config)
    if isinstance(given, dict):
        tokenizer.chat_template = {name: _with_latent_thought(template, texts) for name, template in given.items()}
    else:
        tokenizer.chat_template = _with_latent_thought(given, texts)
    probe = [{"role": "user", "content": "What is 1 + 1?"}]
    found = tokenizer.apply_chat_template(probe, add_generation_prompt=True, return_dict=False)
    expected = latent_thinking_prompt(probe, tokenizer, config)
    if found != expected:
        ends = [
            tokenizer.convert_ids_to_tokens(ids[-len(config.thought_token_ids) - 1 :]) for ids in (found, expected)
        ]
        raise ValueError(
            f"With the thought {''.join(texts)!r} after it, a prompt of this chat template ends with the tokens "
            f"{ends[0]} instead of {ends[1]}: the tokenizer merges them. Add the markers as tokens of their own, or "
            f"end the template's generation prompt with a line break or a special token."
        )
    return tokenizer


def tokenizer_to_save(tokenizer: PreTrainedTokenizerBase, config: LatentThinkingConfig) -> PreTrainedTokenizerBase:
    """`latent_thinking_tokenizer`; where there is none, `tokenizer` itself, with a warning that says why."""
    try:
        return latent_thinking_tokenizer(tokenizer, config)
    except ValueError as error:
        warnings.warn(f"The chat template stays without a latent thought. {error}", stacklevel=2)
        return tokenizer


def latent_thinking_template_files(folder: str | os.PathLike) -> dict[str, bytes]:
    """
    The files with the chat templates of `latent_thinking_tokenizer` for the model and the tokenizer in `folder`, by
    their path in it; none without a tokenizer, a chat template or a whole model, or with `tokenizer_to_save`'s
    warning.
    """
    config_dict = PreTrainedConfig.get_config_dict(folder)[0]
    is_model = "AutoModelForCausalLM" in config_dict.get("auto_map", {"AutoModelForCausalLM": ""})
    is_thinker = config_dict.get("model_type") == LatentThinkingConfig.model_type and is_model
    if not is_thinker or not Path(folder, "tokenizer_config.json").is_file():
        return {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_to_save(tokenizer, LatentThinkingConfig.from_pretrained(folder))
    if ours is tokenizer:
        return {}
    with tempfile.TemporaryDirectory() as new_folder:
        ours.save_pretrained(new_folder)
        paths = Path(new_folder).rglob("*.jinja")
        return {path.relative_to(new_folder).as_posix(): path.read_bytes() for path in paths}


def without_latent_thought(template: str) -> str:
    """The language model's own chat template, of one of `latent_thinking_tokenizer`; another is returned as it is."""
    if not template.startswith(_FIRST_LINE):
        return template
    return template.partition(_BLOCK)[2].rpartition(_END_OF_BLOCK)[0]


def _with_latent_thought(template: str, thought: tuple[str, str, str]) -> str:
    # Jinja drops a template's last line break, but none in the middle.
    template = without_latent_thought(template).removesuffix("\n").removesuffix("\r")
    literals = {name: json.dumps(text, ensure_ascii=False) for name, text in zip(("start", "latents", "end"), thought)}
    has_switch = "true" if "enable_thinking" in template else "false"
    head = _FIRST_LINE + _THOUGHT.substitute(literals, has_switch=has_switch)
    return head + _BLOCK + template + _END_OF_BLOCK + _LAST_LINE


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
