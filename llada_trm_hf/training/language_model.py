"""Last-layer hidden states of a frozen language model, and its LM head's predictions from changed ones."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.backbone_wrapper import encode


@torch.no_grad()
def last_layer_states(
    language_model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """The hidden states `[B, L, D]` that the LM head reads; the head is not run, other layers' states are not kept."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "use_cache" in inspect.signature(language_model.forward).parameters:
        inputs["use_cache"] = False
    return encode(language_model, inputs).last_hidden_state.to(input_ids.device)


def head_width(head: nn.Linear) -> int:
    """The size of the hidden states that an LM head reads."""
    return head.weight.shape[1]


def top_tokens(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """The most likely token after each of the hidden states `[N, D]`: LongTensor `[N]`."""
    return _logits(head, states).argmax(-1)


def compare_next_tokens(
    head: nn.Linear, before: torch.Tensor, after: torch.Tensor, chunk_size: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How an LM head's predictions change with the hidden states.

    Args:
        before, after: `[N, D]`.
        chunk_size: states at a time, since a row of logits is as long as the vocabulary.

    Returns:
        Whether the top token is the same, and KL(before || after) in nats, both float32 `[N]`, from the head's raw
        logits (before a cap, if the model has one).
    """
    same, divergence = [], []
    for old, new in zip(before.split(chunk_size), after.split(chunk_size)):
        old_log, new_log = (_logits(head, states).log_softmax(-1) for states in (old, new))
        same.append((old_log.argmax(-1) == new_log.argmax(-1)).float())
        divergence.append((old_log.exp() * (old_log - new_log)).sum(-1))
    return torch.cat(same), torch.cat(divergence)


def _logits(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return head(states.to(head.weight.device, head.weight.dtype)).float().to(states.device)  # [N, V]
