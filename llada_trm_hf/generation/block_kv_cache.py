"""The KV cache of block-wise diffusion decoding (Fast-dLLM, arXiv 2505.22618)."""

import torch
from transformers.cache_utils import Cache


class BlockKVCache:
    """
    Keys and values of a whole canvas. It does not grow: a pass over some columns renews those and reads all.

    A pass with `columns = None` covers the canvas `[B, L]` and fills the cache; afterwards `columns` names those that
    the next passes compute. What lies outside keeps the keys and values of the filling pass. That is exact for the
    first layer; above it is an approximation, since there every key depends on the whole canvas.

    Args:
        num_layers: layers of the model.

    Attributes:
        columns: LongTensor `[W]`, the columns of the canvas that the next pass computes, without gaps; None for all.
        renewed: BoolTensor `[B, W]` or None, where a row's cache takes what the pass computes; None for everywhere.
    """

    def __init__(self, num_layers: int):
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers
        self.hidden_states: torch.Tensor | None = None
        self.columns: torch.Tensor | None = None
        self.renewed: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a layer's `[B, kv_heads, W, head_dim]` for `columns`, and returns its `[B, kv_heads, L, head_dim]`."""
        self.keys[layer_idx] = self._renew(self.keys[layer_idx], key_states, dim=2)
        self.values[layer_idx] = self._renew(self.values[layer_idx], value_states, dim=2)
        return self.keys[layer_idx], self.values[layer_idx]  # type: ignore[return-value]

    def update_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same for the last hidden states `[B, W, D]`, which a refiner wants of whole chunks: `[B, L, D]`."""
        self.hidden_states = self._renew(self.hidden_states, hidden_states, dim=1)
        return self.hidden_states

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps the rows `[b]` of the batch."""
        for states in (self.keys, self.values):
            states[:] = [None if state is None else state[rows] for state in states]
        self.hidden_states = None if self.hidden_states is None else self.hidden_states[rows]
        self.renewed = None if self.renewed is None else self.renewed[rows]

    def _renew(self, cached: torch.Tensor | None, states: torch.Tensor, dim: int) -> torch.Tensor:
        if self.columns is None or cached is None:
            return states
        if self.renewed is not None:
            renewed = self.renewed[:, None, :, None] if dim == 2 else self.renewed[..., None]
            states = torch.where(renewed, states, cached.index_select(dim, self.columns))
        return cached.index_copy_(dim, self.columns, states)


def columns_of_tokens(hidden_states: torch.Tensor, past_key_values: Cache | BlockKVCache | None) -> torch.Tensor:
    """Where in the sequence the tokens of `hidden_states` `[B, L, D]` stand: `[L]`."""
    if isinstance(past_key_values, Cache):
        start = past_key_values.get_seq_length()
    elif past_key_values is not None and past_key_values.columns is not None:
        return past_key_values.columns
    else:
        start = 0
    return torch.arange(hidden_states.shape[1], device=hidden_states.device) + start


def refuse_prefix_cache(past_key_values: Cache | BlockKVCache | None) -> None:
    """Raises ValueError for a transformers cache, such as PEFT's prefix tuning passes: `generate` has its own."""
    if isinstance(past_key_values, Cache):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}, as PEFT's prefix tuning passes it, and masked "
            f"diffusion would not generate with it. Prompt learning does not work here: use LoRA, IA3 or another "
            f"adapter inside the layers."
        )
