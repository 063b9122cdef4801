"""
Block-wise decoding: the canvas of mask tokens; the block that is being decided, with what each denoising step
computes and commits; and what ends a row.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import MaxTimeCriteria, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from .block_kv_cache import BlockKVCache
from .commit_rules import (
    choose_positions,
    num_transfer_tokens,
    sample_tokens,
    sampling_scores,
    token_confidence,
    without_token,
)
from .configuration_masked_diffusion import MaskedDiffusionGenerationConfig


class MaskedCanvas:
    """
    Prompts followed by mask tokens, and what is known of them so far.

    Args:
        input_ids, attention_mask: the prompts `[B, L_prompt]`; the mask may be None.
        num_new_tokens: masks to append.
        config: settings, with the special tokens filled in.

    Attributes:
        tokens: LongTensor `[B, L]`.
        attention_mask: LongTensor `[B, L]`, None without padding.
        is_masked: BoolTensor `[B, L]`, what is not decided; of the rows that are.
        was_masked: BoolTensor `[B, L]`, what was not decided at the start.
        num_decided: LongTensor `[B]`, tokens transferred from mask to canvas, less those masked again.
        is_finished: BoolTensor `[B]`, the rows that have ended.
        ends: LongTensor `[B]`, the columns before a row's closing padding.
        rows: LongTensor `[b]`, the rows that take part: those not finished, or all where shapes stay static.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_new_tokens: int,
        config: MaskedDiffusionGenerationConfig,
    ):
        self.config = config
        self.prompt_length = input_ids.shape[1]
        self.tokens = torch.nn.functional.pad(input_ids.long(), (0, num_new_tokens), value=config.mask_token_id)
        self.is_masked = self.tokens.eq(config.mask_token_id)
        self.attention_mask = None
        if attention_mask is not None and not attention_mask.all():
            self.attention_mask = torch.nn.functional.pad(attention_mask, (0, num_new_tokens), value=1)
            self.is_masked &= self.attention_mask.bool()
        self.was_masked = self.is_masked.clone()
        self.num_decided = torch.zeros(len(self.tokens), dtype=torch.long, device=self.tokens.device)
        self.is_finished = torch.zeros(len(self.tokens), dtype=torch.bool, device=self.tokens.device)
        self.ends = torch.full_like(self.num_decided, self.tokens.shape[1])
        self.rows = torch.arange(len(self.tokens), device=self.tokens.device)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Yields each block's columns and its number of steps. The first block also covers masks in the prompt."""
        num_new_tokens = self.tokens.shape[1] - self.prompt_length
        block_length = self.config.block_length or max(num_new_tokens, 1)
        ends = [min(end, num_new_tokens) for end in range(block_length, num_new_tokens + block_length, block_length)]
        ends = ends or [0]
        steps = None if self.config.commits_by_confidence else self.config.num_diffusion_steps
        if steps is not None and steps < len(ends):
            raise ValueError(
                f"num_diffusion_steps={steps} is fewer than the {len(ends)} blocks of block_length={block_length}: "
                f"give every block at least one step."
            )
        in_prompt = self.was_masked[:, : self.prompt_length].any(0)
        start = int(in_prompt.int().argmax()) if in_prompt.any() else self.prompt_length
        for i, end in enumerate(ends):
            window = slice(start, self.prompt_length + end)
            num_masked = int(self.is_masked[:, window].sum(-1).max())
            num_steps = num_masked if steps is None else steps // len(ends) + (i < steps % len(ends))
            if num_masked and num_steps:
                yield window, num_steps
            start = window.stop

    def commit(self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, where: torch.Tensor) -> None:
        """Transfers `tokens` `[b, P]` to `positions` `[b, P]` of `rows` `[b]`, where `where` `[b, P]` says so."""
        self.num_decided[rows] += where.sum(-1)
        rows = rows[:, None]
        self.tokens[rows, positions] = torch.where(where, tokens, self.tokens[rows, positions])
        self.is_masked[rows, positions] &= ~where

    def remask(self, rows: torch.Tensor, positions: torch.Tensor, where: torch.Tensor) -> None:
        """Masks `positions` `[b, P]` of `rows` `[b]` again, where `where` `[b, P]` says so."""
        self.num_decided[rows] -= where.sum(-1)
        rows = rows[:, None]
        self.tokens[rows, positions] = self.tokens[rows, positions].masked_fill(where, self.config.mask_token_id)
        self.is_masked[rows, positions] |= where

    def finish(self, finished: torch.Tensor, ends: torch.Tensor) -> None:
        """
        Ends the rows where `finished` `[b]` is true: their columns from `ends` `[b]` on become padding. They leave
        `rows`, unless shapes are to stay static.
        """
        rows = self.rows[finished]
        self.ends[rows] = torch.minimum(self.ends[rows], ends[finished])
        after = torch.arange(self.tokens.shape[1], device=rows.device) >= self.ends[rows, None]
        self.tokens[rows] = self.tokens[rows].masked_fill(after, self._padding())
        self.is_masked[rows] = False
        self.is_finished[rows] = True
        if not self.config.compile:
            self.rows = self.rows[~finished]

    def _padding(self) -> int:
        for token in (self.config.pad_token_id, self.config.eos_token_id, self.config.mask_token_id):
            if token is not None:
                return token[0] if isinstance(token, list) else token
        raise AssertionError("a canvas has a mask token")


@dataclass
class DenoisingInputs:
    """
    One denoising step of the rows that are still being decided.

    Attributes:
        tokens: LongTensor `[B, L]`, the canvas.
        attention_mask: LongTensor `[B, L]` or None.
        undecided: BoolTensor `[B, L]`, the masks that may be decided in this step.
        positions: LongTensor `[B, P]`, the columns whose logits are wanted.
        prompt_tokens: BoolTensor `[B, L]`, positions that were no masks at the start; hidden for guidance.
        cache: says which columns of the canvas to compute; None for all.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    undecided: torch.Tensor
    positions: torch.Tensor
    prompt_tokens: torch.Tensor
    cache: BlockKVCache | None

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the model's `forward`: the columns of the canvas that the cache does not answer for."""
        inputs: dict[str, Any] = {"input_ids": self.tokens, "attention_mask": self.attention_mask}
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
            if self.cache.columns is not None:
                inputs["input_ids"] = self.tokens[:, self.cache.columns]
        if self.attention_mask is not None:
            inputs["is_padded"] = True  # known, so that no layer has to ask the device
        return inputs


class Decisions(NamedTuple):
    """
    What a step decided at its positions: the best guesses, LongTensor `[b, P]`; those committed, BoolTensor `[b, P]`;
    and, for `output_scores`, what they were chosen by, `[b, P, V]`.
    """

    tokens: torch.Tensor
    committed: torch.Tensor
    scores: torch.Tensor | None


class ActiveBlock:
    """
    A block of `W` columns, for the `b` rows that are not finished.

    A fixed schedule is known beforehand on the host, so its steps never wait for the device. When confidence decides,
    or committed tokens can be masked again, each step asks once what is left; a row with nothing left leaves.

    Args:
        canvas: the sequences.
        window: the block's columns.
        num_steps: steps of a fixed schedule.
        cache: to be filled by the first step; None to compute the whole canvas every time.

    Attributes:
        rows: LongTensor `[b]`, the rows still in the batch.
        active: BoolTensor `[b]`, those that the last step was for: it counts in their number of function evaluations.
    """

    def __init__(self, canvas: MaskedCanvas, window: slice, num_steps: int, cache: BlockKVCache | None):
        self.canvas, self.window, self.cache, self.config = canvas, window, cache, canvas.config
        self.rows = canvas.rows
        self.active = torch.ones_like(self.rows, dtype=torch.bool)
        undecided = self._undecided()
        self.quotas = num_transfer_tokens(undecided.sum(-1), num_steps)  # [b, num_steps]
        # How often a token of the block can still be masked again, [b, W].
        self.remask_threshold = self.config.remask_threshold or 0.0
        self.budget = undecided * self.config.remask_budget if self.remask_threshold else None
        self.is_fixed = not self.config.commits_by_confidence and self.budget is None
        if self.is_fixed:
            left = undecided.sum(-1, keepdim=True) - self.quotas.cumsum(-1) + self.quotas
            self.most_left = [*left.amax(0).tolist(), 0]  # before each step, in the row with most
        # Fast-dLLM runs the first narrow pass of a block unseen; its number of passes is reproduced.
        self.min_steps = 2 if self.config.commits_by_confidence and cache is not None else 1
        self.step = 0

    def steps(self) -> Iterator[DenoisingInputs]:
        """Yields the inputs of each denoising step until the block is decided; call `update` after each."""
        for self.step in itertools.count():
            undecided = self._undecided()
            if self.cache is not None and self.step == 1:
                self._narrow(self.cache)
            active_rows, width = self._rows_and_width(undecided)
            if not len(active_rows):
                return
            if len(active_rows) < len(self.rows):
                undecided = self._select_rows(active_rows.to(undecided.device), undecided)
            yield self._inputs(undecided, width)

    def update(
        self, inputs: DenoisingInputs, logits: torch.Tensor, refiner_confidence: torch.Tensor | None
    ) -> Decisions:
        """Commits tokens by the logits `[b, P, V]` at `inputs.positions`, and remasks those they no longer support."""
        config, rows, positions = self.config, self.rows, inputs.positions
        undecided = inputs.undecided.gather(1, positions)
        # The mask token means "not decided" and cannot be a decision; confidence still counts its probability.
        with without_token(logits, config.mask_token_id):
            restriction = (config.temperature, config.top_k, config.top_p)
            sampled = sample_tokens(logits, *restriction)
            scores = sampling_scores(logits, *restriction).clone() if config.output_scores else None
        tokens = torch.where(undecided, sampled, inputs.tokens.gather(1, positions))

        by_refiner = config.remasking == "refiner"
        confidence = token_confidence(logits, tokens, config.remasking, config.defer_tokens, refiner_confidence)
        probability = confidence
        if (by_refiner or self.budget is not None) and (config.remasking != "low_confidence" or config.defer_tokens):
            probability = token_confidence(logits, tokens, "low_confidence")
        quota = self.quotas[:, min(self.step, self.quotas.shape[1] - 1)]
        if self.budget is not None:
            quota = quota.clamp(min=1)  # what was masked again comes on top of the schedule
        commit = choose_positions(confidence, undecided, quota, config, probability if by_refiner else None)
        self.canvas.commit(rows, positions, tokens, commit)
        self.active = self._is_active(inputs)

        if self.budget is not None:
            columns = positions - self.window.start
            low = (refiner_confidence if by_refiner else probability) < self.remask_threshold  # type: ignore[operator]
            again = ~undecided & low & (self.budget.gather(1, columns) > 0) & self.active[:, None]
            self.budget = self.budget.scatter_add(1, columns, -again.long())
            self.canvas.remask(rows, positions, again)
        return Decisions(tokens, commit, scores)

    def _is_active(self, inputs: DenoisingInputs) -> torch.Tensor:
        """BoolTensor `[b]`: the rows that would run this step if they were alone."""
        return inputs.undecided.any(-1) | (~self.canvas.is_finished[self.rows] & (self.step < self.min_steps))

    def _undecided(self) -> torch.Tensor:
        return self.canvas.is_masked[self.rows][:, self.window]  # [b, W]

    def _candidates(self, undecided: torch.Tensor) -> torch.Tensor:
        """What can change: the undecided, and the decided that can be masked again."""
        return undecided if self.budget is None else undecided | (self.budget > 0)

    def _rows_and_width(self, undecided: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows of `undecided` `[b, W]` that need this step, on the host, and the most logits of a row."""
        everyone = torch.arange(len(undecided))
        if self.is_fixed:
            width = self.most_left[self.step]
            rows = everyone if width else everyone[:0]
        else:
            left, candidates = torch.stack([undecided.sum(-1), self._candidates(undecided).sum(-1)]).cpu()  # [b] each
            rows = everyone[(left > 0) | (self.step < self.min_steps)]
            width = int(candidates[rows].max()) if len(rows) else 0
        if self.config.compile:
            return everyone if len(rows) else rows, undecided.shape[1]
        return rows, max(width, 1)

    def _select_rows(self, kept: torch.Tensor, undecided: torch.Tensor) -> torch.Tensor:
        """Keeps the rows numbered `kept`, of `undecided` `[b, W]` too."""
        if self.cache is not None:
            guided = self.config.cfg_scale > 0  # the cache then holds the unconditional rows after the others
            self.cache.select_rows(torch.cat([kept, kept + len(self.rows)]) if guided else kept)
        self.rows, self.quotas = self.rows[kept], self.quotas[kept]
        self.budget = None if self.budget is None else self.budget[kept]
        return undecided[kept]

    def _narrow(self, cache: BlockKVCache) -> None:
        """From now on only the block, and with a prefix cache what follows it, is computed."""
        canvas = self.canvas
        stop = self.window.stop if self.config.kv_cache == "dual" else canvas.tokens.shape[1]
        cache.columns = torch.arange(self.window.start, stop, device=canvas.tokens.device)
        if self.window.start < canvas.prompt_length and len(self.rows) > 1:
            # With masks in some prompts the rows' blocks begin in different columns.
            renewed = cache.columns >= canvas.was_masked[self.rows].int().argmax(-1, keepdim=True)
            cache.renewed = renewed.repeat(2, 1) if self.config.cfg_scale > 0 else renewed

    def _inputs(self, undecided: torch.Tensor, width: int) -> DenoisingInputs:
        canvas, rows = self.canvas, self.rows
        if width == undecided.shape[1]:
            columns = torch.arange(width, device=rows.device).expand_as(undecided)
        else:
            # Those that can change, in their order; a row with fewer of them gets others too.
            columns = self._candidates(undecided).int().argsort(dim=-1, descending=True, stable=True)[:, :width]
        everywhere = torch.zeros_like(canvas.is_masked[rows])
        everywhere[:, self.window] = undecided
        return DenoisingInputs(
            tokens=canvas.tokens[rows],
            attention_mask=None if canvas.attention_mask is None else canvas.attention_mask[rows],
            undecided=everywhere,
            positions=columns + self.window.start,
            prompt_tokens=~canvas.was_masked[rows],
            cache=self.cache,
        )


class StoppingRules:
    """What ends a row once a block is decided: end tokens, stop strings, the caller's criteria, time."""

    def __init__(
        self, canvas: MaskedCanvas, criteria: StoppingCriteriaList | None, tokenizer: PreTrainedTokenizerBase | None
    ):
        config = canvas.config
        self.canvas, self.criteria = canvas, StoppingCriteriaList(criteria or [])
        if config.max_time is not None:
            if (config.block_length or canvas.tokens.shape[1]) >= canvas.tokens.shape[1] - canvas.prompt_length:
                raise ValueError("max_time is looked at after each block and there is only one: pass block_length.")
            self.criteria.append(MaxTimeCriteria(config.max_time))
        self.stop_strings: StopStringCriteria | None = None
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings needs the tokenizer: pass tokenizer=... to generate.")
            self.stop_strings = StopStringCriteria(tokenizer, config.stop_strings)
            # A token holds a byte or more, so no match is longer.
            self.span = max(len(string.encode()) for string in self.stop_strings.stop_strings)

    def __bool__(self) -> bool:
        return bool(self.canvas.config.stop_at_eos or self.stop_strings or self.criteria)

    def apply(self, window: slice) -> None:
        """Finishes the rows that the block at `window` has ended."""
        canvas, start = self.canvas, max(window.start, self.canvas.prompt_length)
        tokens = canvas.tokens[canvas.rows, : window.stop]
        is_last = torch.zeros_like(tokens[:, start:], dtype=torch.bool)  # [b, W]
        if canvas.config.stop_at_eos:
            is_last |= torch.isin(tokens[:, start:], torch.tensor(canvas.config.eos_token_id, device=tokens.device))
        if self.stop_strings and start < window.stop:
            is_last |= self._completes_stop_string(tokens, start)
        finished = is_last.any(-1)
        first = (is_last.cumsum(-1) == 0).sum(-1)  # W without any
        ends = (start + first + 1).clamp(max=window.stop)
        if self.criteria:
            finished |= self.criteria(tokens, None)  # type: ignore[arg-type]
        canvas.finish(finished, ends)

    def _completes_stop_string(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """BoolTensor `[b, L - start]`: whether a stop string ends with the token of `tokens` `[b, L]`."""
        assert self.stop_strings is not None
        nothing = torch.iinfo(tokens.dtype).max  # no token
        if self.canvas.attention_mask is not None:  # padding comes before all else, where it separates nothing
            real = self.canvas.attention_mask[self.canvas.rows, : tokens.shape[1]].bool()
            order = real.int().argsort(dim=-1, stable=True)
            tokens = tokens.masked_fill(~real, nothing).gather(1, order)
        windows = torch.nn.functional.pad(tokens, (self.span - 1, 0), value=nothing).unfold(1, self.span, 1)
        windows = windows[:, start:]  # [b, L - start, span], each up to its token
        return self.stop_strings(windows.flatten(0, 1), None).view(windows.shape[:2])  # type: ignore[arg-type]
