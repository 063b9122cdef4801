"""Model, tokenizer and problems come together: the work of a datagen run, a shard at a time."""

import os
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ..models import DimensionCompressor, MaskedDiffusionGenerationMixin
from .datagen_settings import DatagenSettings
from .shard_folder import ShardFolder, ShardProblem
from .state_extraction import extract_states
from .thoughts import COMPLETE, EMPTY_PROMPT, NOT_FINITE, TOO_LONG, ThoughtFormat
from .trace_generation import write_traces


class ShardMaker:
    """Model, tokenizer and everything else it takes to make a shard."""

    def __init__(
        self, what: DatagenSettings, folder: ShardFolder, rows: Dataset, compressor: DimensionCompressor | None
    ):
        self.what, self.folder, self.rows = what, folder, rows
        self.tokenizer = AutoTokenizer.from_pretrained(what.model)
        self.thoughts = ThoughtFormat(self.tokenizer, what.think_start, what.think_end)
        self.model, self.eos_ids = load_language_model(what.model, what.dtype, _own_device(what.device))
        if self.tokenizer.eos_token_id is not None:
            self.eos_ids = sorted({*self.eos_ids, self.tokenizer.eos_token_id})
        pad_id = self.tokenizer.pad_token_id
        self.pad_id = pad_id if pad_id is not None else self.eos_ids[0] if self.eos_ids else 0
        self.longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.width, self.dtype = self.model.get_output_embeddings().weight.shape[-1], self.model.dtype
        self.compressor = compressor.to(self.model.device) if compressor is not None else None
        if self.compressor is not None:
            if self.compressor.config.hidden_size != self.width:
                raise ValueError(
                    f"The states of {what.model} are {self.width} wide, the compressor {what.compressor} takes "
                    f"hidden_size={self.compressor.config.hidden_size}."
                )
            self.width, self.dtype = self.compressor.config.compressed_size, self.compressor.dtype

    def make(self, number: int, advance: Callable[[int], object]) -> None:
        """Makes shard `number`; `advance` is told of every problem that is through."""
        if self.what.stage == "states":
            problems = self._take_states(number, advance)
        else:
            problems, traces = self._write_thoughts(number, advance)
            self.folder.write_traces(number, traces)
        if self.what.stage != "traces":
            self.folder.write_pairs(number, problems, self.width, self.dtype)

    def _write_thoughts(
        self, number: int, advance: Callable[[int], object]
    ) -> tuple[list[ShardProblem], list[dict[str, Any]]]:
        indices = self.folder.problems_of(number)
        rows = self.rows[indices.start : indices.stop]
        problems = [ShardProblem(*row) for row in zip(rows["id"], map(_text, rows["prompt"]))]
        prompts: dict[int, tuple[list[int], list[int]]] = {}
        for i, problem in enumerate(problems):
            context, opening = self.thoughts.prompt(problem.prompt) if problem.prompt.strip() else ([], [])
            problem.prompt_tokens = len(context)
            if not context:
                problem.status = EMPTY_PROMPT
            elif self._is_too_long(len(context) + len(opening) + self.what.traces.max_new_tokens):
                problem.status = TOO_LONG
            else:
                prompts[i] = (context, opening)
        advance(len(problems) - len(prompts))

        completions: list[list[int]] = [[] for _ in problems]
        for batch in _batches({i: len(c) + len(o) for i, (c, o) in prompts.items()}, self.what.batch_size):
            written = write_traces(
                self.model,
                [prompts[i] for i in batch],
                [indices[i] for i in batch],
                self.thoughts.end_ids,
                self.eos_ids,
                self.pad_id,
                self.what.traces,
                keep_states=self.what.stage == "all",
            )
            for i, status, tokens in zip(batch, written.statuses, written.completions):
                completions[i], problems[i].status = tokens, status
                closing = len(self.thoughts.end_ids) if status == COMPLETE else 0
                problems[i].thought_tokens = len(tokens) - closing
            if written.hidden_pre is not None and written.hidden_post is not None:
                self._keep([problems[i] for i in batch], written.hidden_pre, written.hidden_post)
            advance(len(batch))
        traces = [
            {
                "id": problem.id,
                # What the states came to is not the trace's business.
                "status": COMPLETE if problem.status == NOT_FINITE else problem.status,
                "prompt": problem.prompt,
                "completion": self.tokenizer.decode(tokens),
                "completion_ids": tokens,
            }
            for problem, tokens in zip(problems, completions)
        ]
        return problems, traces

    def _take_states(self, number: int, advance: Callable[[int], object]) -> list[ShardProblem]:
        indices = self.folder.problems_of(number)
        reads_traces = self.folder.reads_traces
        rows = self.folder.read_traces(number) if reads_traces else self.rows.select(indices).to_list()
        problems = [ShardProblem(row["id"], _text(row["prompt"])) for row in rows]
        traces = {}
        for i, (row, problem) in enumerate(zip(rows, problems)):
            trace, problem.status = self.thoughts.trace(row)
            if trace is None:
                problem.prompt_tokens = len(self.thoughts.prompt(problem.prompt)[0]) if problem.prompt.strip() else 0
                problem.thought_tokens = len(row.get("completion_ids") or [])
                continue
            problem.prompt_tokens, problem.thought_tokens = len(trace.context), len(trace.thought)
            vocabulary = self.model.get_input_embeddings().num_embeddings
            foreign = [token for token in trace.input_ids if not 0 <= token < vocabulary]
            if foreign:
                raise ValueError(
                    f"The trace {problem.id} holds token {foreign[0]}, the vocabulary of {self.what.model} has "
                    f"{vocabulary}: was it written with another tokenizer?"
                )
            if self._is_too_long(len(trace.input_ids)):
                problem.status = TOO_LONG
            else:
                traces[i] = trace
        advance(len(problems) - len(traces))
        for batch in _batches({i: len(trace.input_ids) for i, trace in traces.items()}, self.what.batch_size):
            pre, post = extract_states(self.model, [traces[i] for i in batch], self.pad_id)
            self._keep([problems[i] for i in batch], pre, post)
            advance(len(batch))
        return problems

    @torch.no_grad()
    def _keep(self, problems: list[ShardProblem], hidden_pre: torch.Tensor, hidden_post: torch.Tensor) -> None:
        """Gives each problem with a complete thought its states, compressed if wanted."""
        finite = (hidden_pre.isfinite().all(1), hidden_post.isfinite().all(1))
        if self.compressor is not None:
            device = self.compressor.device
            hidden_pre, hidden_post = (
                self.compressor.compress(states.to(device)).cpu() for states in (hidden_pre, hidden_post)
            )
        lengths = [problem.prompt_tokens for problem in problems]
        contexts, ends, are_finite = hidden_pre.split(lengths), hidden_post.unbind(), finite[0].split(lengths)
        for problem, context, end, pre_finite, post_finite in zip(problems, contexts, ends, are_finite, finite[1]):
            if problem.status == COMPLETE:
                if pre_finite.all() and post_finite:
                    problem.states = (context, end)
                else:
                    problem.status = NOT_FINITE

    def _is_too_long(self, length: int) -> bool:
        return self.longest is not None and length > self.longest


def load_language_model(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, list[int]]:
    """
    A causal language model that generates as it is told and not as its `generation_config.json` says (no repetition
    penalty, no sampling), and the tokens that end its text.

    Raises:
        ValueError: for another kind of model.
    """
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if (
        isinstance(model, MaskedDiffusionGenerationMixin)
        or model.get_output_embeddings() is None
        or not model.can_generate()
    ):
        raise ValueError(f"{name} is a {type(model).__name__}; hidden pairs need a causal language model.")
    eos = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()
    return model.to(device).eval(), [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _batches(lengths: dict[int, int], batch_size: int) -> list[list[int]]:
    """The keys, those of similar length together."""
    order = sorted(lengths, key=lambda key: lengths[key])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _text(prompt: str | None) -> str:
    return prompt or ""


def _own_device(device: str) -> str:
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
