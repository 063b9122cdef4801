"""The choices of a denoising step: the token at each position, its confidence, and which positions to commit."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from .configuration_masked_diffusion import MaskedDiffusionGenerationConfig


def num_transfer_tokens(num_masked: torch.Tensor, num_steps: int) -> torch.Tensor:
    """
    The number of tokens each step transfers: `num_masked` `[B]` split evenly over `num_steps`, the first steps taking
    the remainder. Returns `[B, num_steps]` (the schedule of the official sampler).
    """
    steps = torch.arange(num_steps, device=num_masked.device)
    return num_masked[:, None] // num_steps + (steps < num_masked[:, None] % num_steps)


@contextlib.contextmanager
def without_token(logits: torch.Tensor, token_id: int) -> Iterator[None]:
    """Within it, `logits` `[..., V]` rule out `token_id`; in place, for the tensor may be large."""
    column = logits[..., token_id].clone()
    logits[..., token_id] = -torch.inf
    yield
    logits[..., token_id] = column


def sample_tokens(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Chooses a token at each position by the Gumbel-max trick.

    Args:
        logits: `[..., V]`.
        temperature: 0 takes the largest logit.
        top_k, top_p: applied to the distribution at that temperature.
        uniform: random numbers of the logits' shape, drawn by default.

    Returns:
        LongTensor `[...]`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = sampling_scores(logits, temperature, top_k, top_p)
    # -log(uniform) is exponential; drawn directly it keeps float32's full precision near 0, where the maximum decides.
    noise = torch.empty_like(scores).exponential_() if uniform is None else -uniform.log()
    return (scores - noise.log()).argmax(-1)


def sampling_scores(
    logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """What `sample_tokens` chooses by, `[..., V]`: tokens follow its softmax, or at 0 are its maximum."""
    if temperature == 0:
        return logits
    scores = logits.flatten(0, -2) / temperature
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.view_as(logits)


def token_confidence(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    remasking: str,
    defer_tokens: list[int] | None = None,
    refiner_confidence: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    How sure the model is of `tokens` `[B, P]`, from its clean `logits` `[B, P, V]` (before temperature, top-k and
    top-p): the larger, the sooner a token is committed. Tokens in `defer_tokens` come last. For `"refiner"` it is
    `refiner_confidence` `[B, P]`.
    """
    if remasking == "random":
        return torch.rand(tokens.shape, device=tokens.device)
    if defer_tokens and remasking != "refiner":
        logits = logits.index_fill(-1, _on_device(tuple(defer_tokens), logits.device), -torch.inf)
    if remasking == "margin":
        best = logits.softmax(-1).topk(2, dim=-1).values
        confidence = best[..., 0] - best[..., 1]
    elif remasking == "entropy":
        log_probabilities = logits.log_softmax(-1)
        confidence = torch.special.entr(log_probabilities.exp()).sum(-1).neg()
    elif remasking == "refiner":
        assert refiner_confidence is not None
        confidence = refiner_confidence
    else:
        return (logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)).exp()
    if defer_tokens:
        deferred = torch.isin(tokens, _on_device(tuple(defer_tokens), tokens.device))
        confidence = confidence.masked_fill(deferred, torch.finfo(confidence.dtype).min)
    return confidence


def choose_positions(
    confidence: torch.Tensor,
    undecided: torch.Tensor,
    num_tokens: torch.Tensor,
    config: MaskedDiffusionGenerationConfig,
    tie_breaker: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Which positions to commit: in each row the `num_tokens` `[B]` most confident undecided ones, or, with a confidence
    threshold or factor, those that reach it and always the best.

    Args:
        confidence, undecided: `[B, P]`, as is the result.
        tie_breaker: `[B, P]`, the larger the sooner where confidences are equal.
    """
    confidence = confidence.masked_fill(~undecided, -torch.inf)
    order = None if tie_breaker is None else tie_breaker.argsort(dim=-1, descending=True, stable=True)
    by_confidence = confidence if order is None else confidence.gather(-1, order)
    ranked = by_confidence.argsort(dim=-1, descending=True, stable=True)
    order = ranked if order is None else order.gather(-1, ranked)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    if config.confidence_threshold is not None:
        chosen = (rank == 0) | (confidence >= config.confidence_threshold)
    elif config.confidence_factor is not None:
        # Confidence falls and rank rises, so the condition holds for a row's first n positions and no others.
        chosen = (rank == 0) | ((rank + 2) * (1 - confidence) < config.confidence_factor)
    else:
        chosen = rank < num_tokens[:, None]
    return undecided & chosen


def process_logits(
    logits: torch.Tensor,
    canvas: torch.Tensor,
    config: MaskedDiffusionGenerationConfig,
    logits_processor: LogitsProcessorList | None,
) -> torch.Tensor:
    """Suppresses tokens and applies the caller's processors, each position as a row of its own, to `[B, P, V]`."""
    if config.suppress_tokens:
        logits = logits.index_fill(-1, _on_device(tuple(config.suppress_tokens), logits.device), -torch.inf)
    if logits_processor:
        rows = canvas.repeat_interleave(logits.shape[1], dim=0)
        logits = logits_processor(rows, logits.flatten(0, 1)).view_as(logits)
    return logits


@functools.lru_cache(maxsize=32)
def _on_device(token_ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Copied once, not in every step."""
    return torch.tensor(token_ids, device=device)
