"""Predictions at chosen tokens without holding their logits: for a large vocabulary these are most of the memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# With a vocabulary of 126k, float32 logits of this many tokens are 258 MB.
TOKENS_AT_ONCE = 512


class TokenScores(NamedTuple):
    """
    What a language model says of `M` tokens.

    Attributes:
        losses: FloatTensor `[M]`, the cross-entropies of the right tokens in float32; 0 where there is none.
        best: LongTensor `[M]`, the best guesses.
        probability: FloatTensor `[M]`, their probabilities, without gradient.
    """

    losses: torch.Tensor
    best: torch.Tensor
    probability: torch.Tensor


def score_tokens(
    hidden_states: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor
) -> TokenScores:
    """
    Scores `tokens` LongTensor `[M]` (-100 for "no right token here") by `lm_head` of `hidden_states` `[M, D]`.

    More than `TOKENS_AT_ONCE` tokens are taken in turn, and their logits computed once more for the gradient instead
    of being kept: the peak does not grow with the number of tokens.
    """
    if len(tokens) <= TOKENS_AT_ONCE:
        return _score(hidden_states, lm_head, tokens)
    pieces = zip(hidden_states.split(TOKENS_AT_ONCE), tokens.split(TOKENS_AT_ONCE))
    scores = [checkpoint(_score, states, lm_head, some, use_reentrant=False) for states, some in pieces]
    return TokenScores(*map(torch.cat, zip(*scores)))


def _score(
    hidden_states: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor
) -> TokenScores:
    logits = lm_head(hidden_states).float()
    losses = nn.functional.cross_entropy(logits, tokens, reduction="none")
    with torch.no_grad():
        largest, best = logits.max(-1)
        return TokenScores(losses, best, (largest - logits.logsumexp(-1)).exp())
