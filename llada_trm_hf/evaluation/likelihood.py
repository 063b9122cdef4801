"""
How likely a masked-diffusion model finds a response: the bound it is trained on (LLaDA, arXiv 2502.09992, equation 6).

    log p(response | prompt) >= E_l E_masks [ L / l * sum over the l masked tokens of log p(token | the rest) ]

with `l` uniform in 1..L and the masked positions a uniform choice of `l`. It is not the likelihood itself, and so not
comparable with that of a causal model.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import PreTrainedModel


class _Canvases(NamedTuple):
    """Of one request: its number, tokens `[m, T]`, which of them to mask, and the weight of each mask `[m]`."""

    request: int
    tokens: torch.Tensor
    masked: torch.Tensor
    weights: torch.Tensor


@torch.no_grad()
def likelihood_bounds(
    model: PreTrainedModel,
    prompts: list[list[int]],
    responses: list[list[int]],
    num_samples: int = 128,
    seed: int = 0,
    batch_size: int = 32,
) -> list[float]:
    """
    A lower bound on the log-likelihood of each response, in nats.

    Where a response has no more than `num_samples` different masks (up to 7 tokens with the default) all of them are
    taken, and the bound is exact. Otherwise it is estimated without bias from `num_samples` of them, which depend on
    `seed` and the response's length only: answers of equal length are compared under the same masks.

    Args:
        model: a masked-diffusion model or hybrid.
        prompts, responses: token ids; a prompt has one at least, and an empty response a bound of 0.
        batch_size: sequences that go through the model together.

    Raises:
        ValueError: for an empty prompt or a number below 1.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}.")
    if not all(prompts):
        raise ValueError("A prompt is empty: start it with the beginning or end of a sequence.")
    totals = torch.zeros(len(prompts), dtype=torch.float64, device=model.device)
    requests = (request for request in range(len(prompts)) if responses[request])
    batch: list[_Canvases] = []
    for request in sorted(requests, key=lambda i: -len(prompts[i]) - len(responses[i])):
        for canvases in _canvases(request, prompts[request], responses[request], num_samples, seed, batch_size):
            if sum(len(other.weights) for other in batch) + len(canvases.weights) > batch_size:
                _add_batch(model, batch, totals)
                batch = []
            batch.append(canvases)
    if batch:
        _add_batch(model, batch, totals)
    return totals.tolist()


@lru_cache(maxsize=64)
def response_masks(length: int, num_samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Masks BoolTensor `[M, L]` and their weights FloatTensor `[M]`: the bound is the sum over masks of weight times the
    sum of the log-probabilities of what is masked.
    """
    if 2**length - 1 <= num_samples:
        numbers = torch.arange(1, 2**length)
        masks = (numbers[:, None] >> torch.arange(length)) % 2 == 1
        weights = [1 / (size * math.comb(length, size)) for size in masks.sum(-1).tolist()]
        return masks, torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
    # Each size is uniform in 1..L; together they are spread evenly, which makes for less variance.
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    sizes = 1 + ((torch.arange(num_samples) + offset) / num_samples * length).long().clamp(max=length - 1)  # [M]
    ranks = torch.rand(num_samples, length, generator=generator).argsort(-1).argsort(-1)
    return ranks < sizes[:, None], length / (sizes.double() * num_samples)


def is_greedy_response(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], batch_size: int = 32
) -> list[bool]:
    """Whether each response is what the model generates greedily, a token at a time, knowing how long it is to be."""
    found = [not response for response in responses]
    for length in {len(response) for response in responses} - {0}:
        numbers = [i for i, response in enumerate(responses) if len(response) == length]
        numbers.sort(key=lambda i: len(prompts[i]))
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            input_ids = [torch.tensor([prompts[i]]) for i in batch]
            generated = model.generate(
                _pad_left(input_ids, 0).to(model.device),
                attention_mask=_pad_left([torch.ones_like(prompt) for prompt in input_ids], 0).to(model.device),
                max_new_tokens=length,
                num_diffusion_steps=length,
                block_length=length,
                temperature=0.0,
            )[:, -length:].tolist()
            for i, tokens in zip(batch, generated):
                found[i] = tokens == list(responses[i])
    return found


def _canvases(
    request: int, prompt: list[int], response: list[int], num_samples: int, seed: int, batch_size: int
) -> Iterator[_Canvases]:
    """Those of a request, `batch_size` at most at a time."""
    masks, weights = response_masks(len(response), num_samples, seed)
    masked = torch.nn.functional.pad(masks, (len(prompt), 0))
    tokens = torch.tensor([*prompt, *response]).expand(masked.shape)
    for pieces in zip(tokens.split(batch_size), masked.split(batch_size), weights.split(batch_size)):
        yield _Canvases(request, *pieces)


def _add_batch(model: PreTrainedModel, batch: list[_Canvases], totals: torch.Tensor) -> None:
    """Adds the weighted log-probabilities to the `totals` of the requests they belong to."""
    device, mask_id = model.device, model.config.mask_token_id
    tokens = _pad_left([canvases.tokens for canvases in batch], mask_id).to(device)  # [m, T]
    masked = _pad_left([canvases.masked for canvases in batch], False).to(device)
    attention_mask = _pad_left([torch.ones_like(canvases.tokens) for canvases in batch], 0).to(device)
    input_ids = tokens.masked_fill(masked, mask_id)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=masked).logits  # [M, V]
    losses = torch.nn.functional.cross_entropy(logits.float(), tokens[masked], reduction="none")
    weights = torch.cat([canvases.weights for canvases in batch]).to(device)
    requests = torch.tensor([canvases.request for canvases in batch for _ in canvases.weights], device=device)
    row = masked.nonzero()[:, 0]  # [M]
    totals.index_add_(0, requests[row], -losses.double() * weights[row])


def _pad_left(pieces: list[torch.Tensor], value: int) -> torch.Tensor:
    """Pieces `[m, T]` of different `T` under each other."""
    longest = max(piece.shape[1] for piece in pieces)
    return torch.cat([torch.nn.functional.pad(piece, (longest - piece.shape[1], 0), value=value) for piece in pieces])
