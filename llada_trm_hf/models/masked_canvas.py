"""The sequences that masked-diffusion generation is deciding."""

from collections.abc import Iterator

import torch

from .configuration_masked_diffusion_generation import MaskedDiffusionGenerationConfig


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
        num_decided: LongTensor `[B]`, decisions taken, less those taken back.
        is_finished: BoolTensor `[B]`, the rows that have ended.
        rows: LongTensor `[b]`, the rows that take part: those not finished, or all where shapes are to stay static.
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
        """Decides on `tokens` `[b, P]` at `positions` `[b, P]` of `rows` `[b]`, where `where` `[b, P]` says so."""
        self.num_decided[rows] += where.sum(-1)
        rows = rows[:, None]
        self.tokens[rows, positions] = torch.where(where, tokens, self.tokens[rows, positions])
        self.is_masked[rows, positions] &= ~where

    def mask_again(self, rows: torch.Tensor, positions: torch.Tensor, where: torch.Tensor) -> None:
        """Takes back what stands at `positions` `[b, P]` of `rows` `[b]`, where `where` `[b, P]` says so."""
        self.num_decided[rows] -= where.sum(-1)
        rows = rows[:, None]
        self.tokens[rows, positions] = self.tokens[rows, positions].masked_fill(where, self.config.mask_token_id)
        self.is_masked[rows, positions] |= where

    def finish(self, finished: torch.Tensor, end: int) -> None:
        """
        Ends the rows where `finished` `[b]` is true: what follows their first end-of-sequence token, and the columns
        from `end` on, becomes padding. They leave `rows`, unless shapes are to stay static.
        """
        rows, tokens = self.rows[finished], self.tokens[self.rows[finished]]
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        after = (columns >= end).expand_as(tokens)
        if self.config.stop_at_eos:
            eos = torch.isin(tokens, torch.tensor(self.config.eos_token_id, device=tokens.device))
            eos &= (columns >= self.prompt_length) & (columns < end)
            after = after | ((eos.cumsum(-1) - eos.int()) > 0)
        self.tokens[rows] = tokens.masked_fill(after, self._padding())
        self.is_masked[rows] = False
        self.is_finished[rows] = True
        if not self.config.compile:
            self.rows = self.rows[~finished]

    def _padding(self) -> int:
        for token in (self.config.pad_token_id, self.config.eos_token_id, self.config.mask_token_id):
            if token is not None:
                return token[0] if isinstance(token, list) else token
        raise AssertionError("a canvas has a mask token")
