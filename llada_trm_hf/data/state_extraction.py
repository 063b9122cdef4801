"""Stage 2 of hidden pairs: one forward pass over finished traces, of which only the needed states stay."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..models.backbones import encode
from .thoughts import ThoughtTokens

# Enough to keep a device busy. What a layer needs for its work grows with it, and with nothing else.
TOKENS_PER_FORWARD = 512


@torch.no_grad()
def extract_states(
    model: PreTrainedModel,
    traces: list[ThoughtTokens],
    pad_id: int = 0,
    tokens_per_forward: int = TOKENS_PER_FORWARD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The last layer's states of traces, as the LM head would read them. The head itself is not evaluated; neither the
    states of other layers nor keys and values are kept.

    Args:
        model: a causal language model.
        traces: best of similar length.
        pad_id: for padding, never seen.
        tokens_per_forward: traces that go through the model together have at most this many tokens, padding
            included, unless a single one is longer.

    Returns:
        `hidden_pre` `[sum of the contexts, D]`, row after row, and `hidden_post` `[B, D]`, on the CPU.
    """
    pre, post = zip(*(_states_of(model, group, pad_id) for group in _groups(traces, tokens_per_forward)))
    return torch.cat(pre), torch.cat(post)


def _groups(traces: list[ThoughtTokens], tokens_per_forward: int) -> Iterator[list[ThoughtTokens]]:
    group: list[ThoughtTokens] = []
    longest = 0
    for trace in traces:
        longest = max(longest, len(trace.input_ids))
        if group and longest * (len(group) + 1) > tokens_per_forward:
            yield group
            group, longest = [], len(trace.input_ids)
        group.append(trace)
    yield group


def _states_of(model: PreTrainedModel, traces: list[ThoughtTokens], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    In one forward pass. Padded on the right, where no earlier token of a causal model sees it, so positions count
    from 0.
    """
    lengths = torch.tensor([len(trace.input_ids) for trace in traces])
    contexts = torch.tensor([len(trace.context) for trace in traces])
    columns = torch.arange(int(lengths.max()))
    is_real = columns < lengths[:, None]
    input_ids = torch.full(is_real.shape, pad_id)
    input_ids[is_real] = torch.tensor([token for trace in traces for token in trace.input_ids])

    inputs = {"input_ids": input_ids, "attention_mask": is_real.long()}
    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    states = encode(model, on_device | {"use_cache": False}).last_hidden_state  # [B, L, D]
    is_context = (columns < contexts[:, None]).to(states.device)
    rows = torch.arange(len(traces), device=states.device)
    return states[is_context].cpu(), states[rows, lengths.to(states.device) - 1].cpu()
