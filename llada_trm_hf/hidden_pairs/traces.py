"""Stage 1 of hidden pairs: a causal language model writes its thoughts, and its states are captured on the way."""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..data.masking import stateless_uniform
from ..data.thoughts import COMPLETE, ENDED_EARLY, NO_END_OF_THOUGHT


@dataclass(frozen=True)
class TraceSettings:
    """
    How traces are written.

    Attributes:
        max_new_tokens: of thought and closing marker together.
        temperature: 0 takes the most probable token. Otherwise tokens are sampled with random numbers that depend
            only on `seed`, the number of the problem and the position, not on batch or process.
        top_k, top_p: candidates a token is sampled from; None for all.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**63, "an integer from 0"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}.")
        if not self.temperature and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above 0: without one, nothing is sampled.")


@dataclass
class WrittenBatch:
    """What the model wrote for a batch of prompts."""

    completions: list[list[int]]  # with the closing marker, but without the end-of-sequence token
    statuses: list[str]  # `complete`, `no_end_of_thought` or `ended_early`
    hidden_pre: torch.Tensor | None  # [sum of the contexts, D], row after row, on the CPU; None without `keep_states`
    hidden_post: torch.Tensor | None  # [B, D], on the CPU, zeros where there is no complete thought


@torch.no_grad()
def write_traces(
    model: PreTrainedModel,
    prompts: list[tuple[list[int], list[int]]],
    numbers: list[int],
    end_ids: list[int],
    eos_ids: list[int],
    pad_id: int,
    settings: TraceSettings,
    keep_states: bool,
) -> WrittenBatch:
    """
    Generates the thoughts of a batch, left-padded, with `model.generate`. A row stops when its closing marker is
    complete *and the model has read it*, so that its state exists.

    Args:
        model: a causal language model, with a bare `generation_config`.
        prompts: context and opening marker of each problem.
        numbers: the number of each problem, for sampling.
        end_ids, eos_ids: the closing marker, and the tokens that end the text.
    """
    device, longest = model.device, max(len(context) + len(opening) for context, opening in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id)
    is_real, is_context = (torch.zeros(len(prompts), longest, dtype=torch.bool) for _ in range(2))
    for row, (context, opening) in enumerate(prompts):
        start = longest - len(context) - len(opening)
        input_ids[row, start:] = torch.tensor(context + opening)
        is_real[row, start:] = True
        is_context[row, start : start + len(context)] = True

    ends = _ThoughtEnds(end_ids, eos_ids, len(prompts), longest, settings.max_new_tokens, device)
    states = _CapturedStates(is_context.to(device), ends) if keep_states else None
    arguments: dict[str, Any] = {}
    if states is not None and "logits_to_keep" in signature(model.forward).parameters:
        arguments["logits_to_keep"] = 0  # every position of the prompt reaches the hook, which passes on only the last
    hook = states and model.get_output_embeddings().register_forward_pre_hook(states)
    limit = settings.max_new_tokens + 1  # the state of the last token exists when it has been read
    try:
        sequences = model.generate(
            input_ids.to(device),
            attention_mask=is_real.long().to(device),
            generation_config=GenerationConfig(max_new_tokens=limit, do_sample=False, pad_token_id=pad_id),
            logits_processor=_sampling(settings, numbers, longest, device),
            stopping_criteria=StoppingCriteriaList([ends]),
            **arguments,
        )
    finally:
        if hook:
            hook.remove()

    written = sequences[:, longest:].tolist()
    completions, statuses = [], []
    for tokens, closed, ended in zip(written, ends.closed_at.tolist(), ends.ended_at.tolist()):
        length = closed if closed else ended - 1 if ended else settings.max_new_tokens
        completions.append(tokens[:length])
        statuses.append(COMPLETE if closed else ENDED_EARLY if ended else NO_END_OF_THOUGHT)
    if states is None or states.hidden_pre is None or states.hidden_post is None:
        return WrittenBatch(completions, statuses, None, None)
    return WrittenBatch(completions, statuses, states.hidden_pre.cpu(), states.hidden_post.cpu())


class _ThoughtEnds(StoppingCriteria):
    """
    Finds the closing marker, a sequence of tokens, in what each row writes. The model still has to read the marker's
    last token, so its row is done one step later; a row that ends its text without it is done at once.
    """

    def __init__(
        self, end_ids: list[int], eos_ids: list[int], rows: int, prompt_length: int, limit: int, device: torch.device
    ):
        self.marker = torch.tensor(end_ids, device=device)
        # A criterion with an attribute of this name makes `generate` pad finished rows.
        self.eos_token_id = torch.tensor(eos_ids, dtype=torch.long, device=device)
        self.prompt_length, self.limit = prompt_length, limit
        # The number of tokens written when the marker was complete, or the text ended without it; 0 until then.
        self.closed_at, self.ended_at = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.closes_now = torch.zeros(rows, dtype=torch.bool, device=device)  # by the newest token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        written, width = input_ids.shape[1] - self.prompt_length, len(self.marker)
        done = (self.closed_at > 0) | (self.ended_at > 0)
        if width <= written <= self.limit:
            self.closes_now = (input_ids[:, -width:] == self.marker).all(1) & ~done
        else:
            self.closes_now = torch.zeros_like(done)
        ends_now = torch.isin(input_ids[:, -1], self.eos_token_id) & ~self.closes_now & ~done
        self.closed_at = self.closed_at.masked_fill(self.closes_now, written)
        self.ended_at = self.ended_at.masked_fill(ends_now, written)
        return done | ends_now


class _CapturedStates:
    """A forward pre-hook of the LM head: captures the needed states, passes on those the next token needs."""

    def __init__(self, is_context: torch.Tensor, ends: _ThoughtEnds):
        self.is_context, self.ends = is_context, ends
        self.hidden_pre: torch.Tensor | None = None
        self.hidden_post: torch.Tensor | None = None

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (hidden_states,) = arguments
        newest = hidden_states[:, -1]
        if self.hidden_pre is None or self.hidden_post is None:  # the prompt's forward pass
            self.hidden_pre = hidden_states[self.is_context]
            self.hidden_post = torch.zeros_like(newest)
        else:
            self.hidden_post = torch.where(self.ends.closes_now[:, None], newest, self.hidden_post)
        return (newest[:, None],)


class _SeededSampling(LogitsProcessor):
    """Leaves each row one token, chosen by the uniform random number of its problem and position."""

    def __init__(self, uniform: torch.Tensor, prompt_length: int):
        self.uniform, self.prompt_length = uniform, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores.softmax(-1).cumsum(-1)
        position = input_ids.shape[1] - self.prompt_length
        token = torch.searchsorted(cumulative, self.uniform[:, position, None] * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token.clamp(max=scores.shape[1] - 1), 0.0)


def _sampling(
    settings: TraceSettings, numbers: list[int], prompt_length: int, device: torch.device
) -> LogitsProcessorList:
    """Empty for greedy decoding."""
    if not settings.temperature:
        return LogitsProcessorList()
    processors: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_k is not None:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    uniform = stateless_uniform(settings.seed, 0, np.array(numbers), settings.max_new_tokens + 1)
    # Below 1 in float32 too: a token after the last with any probability is never reached.
    uniform32 = torch.from_numpy(uniform.clip(max=1 - 2**-22).astype(np.float32)).to(device)
    return LogitsProcessorList([*processors, _SeededSampling(uniform32, prompt_length)])
