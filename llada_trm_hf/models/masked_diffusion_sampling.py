"""The choices of a denoising step: how many tokens, which tokens, how sure, and which positions."""

import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from .configuration_masked_diffusion_generation import MaskedDiffusionGenerationConfig


def tokens_per_step(num_masked: torch.Tensor, num_steps: int) -> torch.Tensor:
    """
    How many tokens each step commits: `num_masked` `[B]` split evenly over `num_steps`, the first steps taking the
    remainder. Returns `[B, num_steps]` (the schedule of the official sampler).
    """
    steps = torch.arange(num_steps, device=num_masked.device)
    return num_masked[:, None] // num_steps + (steps < num_masked[:, None] % num_steps)


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
    scores = logits.flatten(0, -2) / temperature
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    # -log(uniform) is exponential; drawn directly it keeps float32's full precision near 0, where the maximum decides.
    noise = torch.empty_like(scores).exponential_() if uniform is None else -uniform.flatten(0, -2).log()
    return (scores - noise.log()).argmax(-1).view(logits.shape[:-1])


def token_confidence(
    logits: torch.Tensor, tokens: torch.Tensor, remasking: str, defer_tokens: list[int] | None = None
) -> torch.Tensor:
    """
    How sure the model is of `tokens` `[B, P]`, from its clean `logits` `[B, P, V]` (before temperature, top-k and
    top-p): the larger, the sooner a token is committed. Tokens in `defer_tokens` come last.
    """
    if remasking == "random":
        return torch.rand(tokens.shape, device=tokens.device)
    if defer_tokens:
        logits = logits.index_fill(-1, torch.tensor(defer_tokens, device=logits.device), -torch.inf)
    if remasking == "margin":
        best = logits.softmax(-1).topk(2, dim=-1).values
        confidence = best[..., 0] - best[..., 1]
    elif remasking == "entropy":
        log_probabilities = logits.log_softmax(-1)
        confidence = torch.special.entr(log_probabilities.exp()).sum(-1).neg()
    else:
        return (logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)).exp()
    if defer_tokens:
        deferred = torch.isin(tokens, torch.tensor(defer_tokens, device=tokens.device))
        confidence = confidence.masked_fill(deferred, torch.finfo(confidence.dtype).min)
    return confidence


def choose_positions(
    confidence: torch.Tensor, undecided: torch.Tensor, num_tokens: torch.Tensor | None, threshold: float | None
) -> torch.Tensor:
    """
    Which positions to commit: in each row the `num_tokens` `[B]` most confident undecided ones, or, with a threshold,
    all that reach it and always the best. `confidence` and `undecided` are `[B, P]`; so is the result.
    """
    confidence = confidence.masked_fill(~undecided, -torch.inf)
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    if threshold is None:
        assert num_tokens is not None
        return undecided & (rank < num_tokens[:, None])
    return undecided & ((rank == 0) | (confidence >= threshold))


def process_logits(
    logits: torch.Tensor,
    canvas: torch.Tensor,
    config: MaskedDiffusionGenerationConfig,
    logits_processor: LogitsProcessorList | None,
) -> torch.Tensor:
    """Suppresses tokens and applies the caller's processors, each position as a row of its own, to `[B, P, V]`."""
    if config.suppress_tokens:
        logits = logits.index_fill(-1, torch.tensor(config.suppress_tokens, device=logits.device), -torch.inf)
    if logits_processor:
        rows = canvas.repeat_interleave(logits.shape[1], dim=0)
        logits = logits_processor(rows, logits.flatten(0, 1)).view_as(logits)
    return logits
