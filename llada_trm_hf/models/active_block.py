"""The block of the canvas that generation is deciding: what each step computes, and what it commits."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .block_kv_cache import BlockKVCache
from .masked_canvas import MaskedCanvas
from .masked_diffusion_sampling import (
    choose_positions,
    sample_tokens,
    token_confidence,
    tokens_per_step,
    without_token,
)


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


class ActiveBlock:
    """
    A block of `W` columns, for the `b` rows that are not finished.

    A fixed schedule is known beforehand, on the host too, so its steps need not ask the device anything. When
    confidence decides, or committed tokens can be masked again, each step asks once what is left; a row with nothing
    left then leaves the batch.

    Args:
        canvas: the sequences.
        window: the block's columns.
        num_steps: steps of a fixed schedule.
        cache: to be filled by the first step; None to compute the whole canvas every time.

    Attributes:
        rows: LongTensor `[b]`, the rows still in the batch.
        took_part: BoolTensor `[b]`, those that the last step was for.
    """

    def __init__(self, canvas: MaskedCanvas, window: slice, num_steps: int, cache: BlockKVCache | None):
        self.canvas, self.window, self.cache, self.config = canvas, window, cache, canvas.config
        self.rows = canvas.rows
        self.took_part = torch.ones_like(self.rows, dtype=torch.bool)
        undecided = self._undecided()
        self.quotas = tokens_per_step(undecided.sum(-1), num_steps)  # [b, num_steps]
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
        """What to denoise, step by step, until the block is decided. `update` is to follow each."""
        for self.step in itertools.count():
            undecided = self._undecided()
            if self.cache is not None and self.step == 1:
                self._narrow(self.cache)
            going_on, width = self._look(undecided)
            if not len(going_on):
                return
            if len(going_on) < len(self.rows):
                undecided = self._select_rows(going_on.to(undecided.device), undecided)
            yield self._inputs(undecided, width)

    def update(
        self, inputs: DenoisingInputs, logits: torch.Tensor, refiner_confidence: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Commits what the logits `[b, P, V]` at `inputs.positions` say, and masks again what they no longer support.
        Returns the best guesses LongTensor `[b, P]`.
        """
        config, rows, positions = self.config, self.rows, inputs.positions
        undecided = inputs.undecided.gather(1, positions)
        # The mask token means "not decided" and cannot be a decision; confidence still counts its probability.
        with without_token(logits, config.mask_token_id):
            sampled = sample_tokens(logits, config.temperature, config.top_k, config.top_p)
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
        self.took_part = self._takes_part(inputs)

        if self.budget is not None:
            columns = positions - self.window.start
            low = (refiner_confidence if by_refiner else probability) < self.remask_threshold  # type: ignore[operator]
            again = ~undecided & low & (self.budget.gather(1, columns) > 0) & self.took_part[:, None]
            self.budget = self.budget.scatter_add(1, columns, -again.long())
            self.canvas.mask_again(rows, positions, again)
        return tokens

    def _takes_part(self, inputs: DenoisingInputs) -> torch.Tensor:
        """BoolTensor `[b]`: the rows that would run this step if they were alone."""
        return inputs.undecided.any(-1) | (~self.canvas.is_finished[self.rows] & (self.step < self.min_steps))

    def _undecided(self) -> torch.Tensor:
        return self.canvas.is_masked[self.rows][:, self.window]  # [b, W]

    def _candidates(self, undecided: torch.Tensor) -> torch.Tensor:
        """What can change: the undecided, and the decided that can be masked again."""
        return undecided if self.budget is None else undecided | (self.budget > 0)

    def _look(self, undecided: torch.Tensor) -> tuple[torch.Tensor, int]:
        """
        Which of the rows of `undecided` `[b, W]` go on, by their numbers, as a LongTensor on the host; and at how many
        positions of a row the step has to look.
        """
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
