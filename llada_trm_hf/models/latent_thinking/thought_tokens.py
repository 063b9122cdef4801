"""Latent thoughts in token space: the ids that make one, and where the thoughts of a batch stand."""

import re
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .configuration_latent_thinking import LatentThinkingConfig

LATENT_TOKEN = "<|latent|>"
# Tokens that a tokenizer reserves for later uses have this in their name.
_SPARE = re.compile(r"reserved|unused", re.IGNORECASE)


def thought_token_ids(
    tokenizer: PreTrainedTokenizerBase, think_start: str = "<think>", think_end: str = "</think>"
) -> dict[str, list[int] | int]:
    """
    The token ids of [`LatentThinkingConfig`]: `think_start_token_ids`, `think_end_token_ids`, each as many tokens as
    the tokenizer needs, and `latent_token_id`. The latter is the token `<|latent|>` if there is one, else the first
    one reserved for such uses, else the mask token.

    Raises:
        ValueError: for a tokenizer that cannot write a marker, or has no token to spare.
    """
    ids: dict[str, list[int] | int] = {}
    for name, marker in (("think_start_token_ids", think_start), ("think_end_token_ids", think_end)):
        tokens = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if not tokens or tokenizer.unk_token_id in tokens:
            raise ValueError(f"{marker!r} has no tokens in the vocabulary of the tokenizer.")
        ids[name] = tokens
    vocabulary = tokenizer.get_vocab()
    spare = sorted((token_id, token) for token, token_id in vocabulary.items() if _SPARE.search(token))
    added = [token for token_id, token in spare if token in tokenizer.get_added_vocab()]
    mask = [tokenizer.mask_token] if tokenizer.mask_token_id is not None else []
    taken = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token}
    candidates = [t for t in (LATENT_TOKEN, *added, *mask) if t in vocabulary and t not in taken]
    if not candidates:
        raise ValueError(
            f"The tokenizer has no token to spare for latents: add one, tokenizer.add_special_tokens("
            f"{{'additional_special_tokens': ['{LATENT_TOKEN}']}}), and make room for it where the backbone has none, "
            f"backbone.resize_token_embeddings(len(tokenizer)); or pass latent_token_id."
        )
    ids["latent_token_id"] = vocabulary[candidates[0]]
    return ids


class ThoughtLayout(NamedTuple):
    """
    Where the thoughts of a batch of token rows stand.

    Attributes:
        is_start: BoolTensor `[B, L]`, where a thought's first latent stands.
        is_real: BoolTensor `[B, L]`, False at padding.
        columns: ascending, those in which a thought of any row starts; known on the host.
        num_thoughts: of the row with most; known on the host.
    """

    is_start: torch.Tensor
    is_real: torch.Tensor
    columns: list[int]
    num_thoughts: int

    def starting_at(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows LongTensor `[R]` with a thought in `column`, and its number in its row, `[R]`."""
        rows = self.is_start[:, column].nonzero().squeeze(-1)
        return rows, self.is_start[rows, :column].sum(-1)

    def numbered(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows LongTensor `[R]` that have a thought number `number`, and the columns, `[R]`, it starts in."""
        rows, columns = (self.is_start & (self.is_start.cumsum(-1) == number + 1)).nonzero(as_tuple=True)
        return rows, columns


def find_thoughts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: LatentThinkingConfig
) -> ThoughtLayout:
    """
    The thoughts in `input_ids` `[B, L]`. Asks the device once.

    Raises:
        ValueError: for a thought with another number of latents than `config.num_latents`, without its opening marker,
            or without a prompt before it.
    """
    is_real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    is_latent = (input_ids == config.latent_token_id) & is_real
    is_start = is_latent & ~torch.nn.functional.pad(is_latent, (1, 0))[:, :-1]
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    start = torch.where(is_start, columns, -1).cummax(-1).values  # [B, L], of the last thought up to here
    too_long = is_latent & (columns - start >= config.num_latents)
    too_short = is_latent.sum(-1) < config.num_latents * is_start.sum(-1)

    marker = torch.tensor(config.think_start_token_ids, device=input_ids.device)
    width = len(marker)
    opened = torch.zeros_like(is_start)
    if input_ids.shape[1] > width:
        # Whether the `width` tokens before a column are the marker.
        opened[:, width:] = (input_ids.unfold(1, width, 1)[:, :-1] == marker).all(-1)
    has_context = is_real.cumsum(-1) > width + 1
    checks = [
        too_long.any() | too_short.any(),
        (is_start & ~opened).any(),
        (is_start & ~has_context).any(),
        is_start.sum(-1).max(),
    ]
    answers = torch.cat([torch.stack([check.long() for check in checks]), is_start.any(0).long()]).tolist()
    miscounted, unopened, unprompted, num_thoughts = answers[:4]
    if miscounted:
        raise ValueError(
            f"A thought must have num_latents={config.num_latents} latent tokens (id {config.latent_token_id}) in a "
            f"row; the input has one with more or fewer. latent_thinking_prompt writes them."
        )
    if unopened:
        raise ValueError(
            f"Latent tokens must follow the opening marker, the tokens {config.think_start_token_ids}; they do not. "
            f"If the prompt was tokenized as text, the tokenizer merged the marker with what stands around it."
        )
    if unprompted:
        raise ValueError("A thought needs a prompt before its opening marker: there is nothing to think about.")
    return ThoughtLayout(is_start, is_real, [c for c, any_start in enumerate(answers[4:]) if any_start], num_thoughts)
