"""Stage 2 of hidden pairs: one forward pass over finished traces, of which only the needed states stay."""

import torch
from transformers import PreTrainedModel

from ..models.backbones import encode
from .thoughts import ThoughtTokens


@torch.no_grad()
def extract_states(
    model: PreTrainedModel, traces: list[ThoughtTokens], pad_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The last layer's states of a batch of traces, as the LM head would read them; the head itself is not evaluated,
    and neither the states of other layers nor keys and values are kept.

    Traces are padded on the right, where no earlier token of a causal model sees it, so positions count from 0.

    Args:
        model: a causal language model.
        traces: a batch.
        pad_id: for padding, never seen.

    Returns:
        `hidden_pre` `[sum of the contexts, D]`, row after row, and `hidden_post` `[B, D]`, on the CPU.
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
