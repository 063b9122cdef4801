"""Chunks of consecutive real tokens, counted from each row's first one, so that padding anywhere changes nothing."""

import copy

import torch


class ChunkLayout:
    """
    Which token belongs to which chunk.

    Args:
        batch_size, length: `B` and `L`.
        chunk_size: `C`, tokens in a chunk; the last chunk of a row may have fewer.
        attention_mask: `[B, L]`, 0 for padding; or None.
        device: where the indices live.

    Attributes:
        num_chunks: `N = ceil(L / C)`.
        is_real: BoolTensor `[B, L]`.
        chunk_of_token: LongTensor `[B, L]`, -1 for padding.
        positions: LongTensor `[B, N, C]`, the column of each chunk's tokens; `L` where the chunk has no token.
    """

    def __init__(
        self,
        batch_size: int,
        length: int,
        chunk_size: int,
        attention_mask: torch.Tensor | None = None,
        device: torch.device | None = None,
    ):
        self.num_chunks = (length + chunk_size - 1) // chunk_size  # (-(-a // b) is another number in onnx)
        slots = torch.arange(self.num_chunks * chunk_size, device=device).expand(batch_size, -1)
        if attention_mask is None:
            self.is_real = torch.ones(batch_size, length, dtype=torch.bool, device=device)
            rank = slots[:, :length]
            positions = slots.clamp(max=length)
        else:
            self.is_real = attention_mask.bool()
            rank = self.is_real.long().cumsum(-1) - 1
            columns = torch.arange(length, device=device).expand(batch_size, -1)
            # Row by row: slot `rank` holds column `l`. Padding writes into one slot more, which is cut off.
            positions = torch.full((batch_size, slots.shape[1] + 1), length, device=device)
            target = torch.where(self.is_real, rank, slots.shape[1])
            positions = positions.scatter(1, target, torch.where(self.is_real, columns, length))[:, :-1]
        self.chunk_of_token = torch.where(self.is_real, rank // chunk_size, -1)
        self.positions = positions.reshape(batch_size, self.num_chunks, chunk_size)

    def of_rows(self, index: torch.Tensor) -> "ChunkLayout":
        """The layout of the rows in `index` `[b]` alone."""
        rows = copy.copy(self)
        for name in ("is_real", "chunk_of_token", "positions"):
            setattr(rows, name, getattr(self, name)[index])
        return rows

    def mean_per_chunk(self, values: torch.Tensor, where: torch.Tensor, empty: float) -> torch.Tensor:
        """
        Mean of `values` `[B, L]` over each chunk's tokens in `where` (BoolTensor `[B, L]`), as `[B, N]` in float32;
        `empty` for a chunk with none.
        """
        where = where & self.is_real
        chunk = self.chunk_of_token.clamp(min=0)
        zeros = torch.zeros(values.shape[0], self.num_chunks, device=values.device)
        total = zeros.scatter_add(1, chunk, torch.where(where, values.float(), 0.0))
        count = zeros.scatter_add(1, chunk, where.float())
        return torch.where(count > 0, total / count.clamp(min=1), empty)

    def any_per_chunk(self, where: torch.Tensor) -> torch.Tensor:
        """BoolTensor `[B, N]`: which chunks have a real token in `where` `[B, L]`."""
        return self.mean_per_chunk(where, where, 0.0) > 0

    def to_tokens(self, per_chunk: torch.Tensor) -> torch.Tensor:
        """Each token's value `[B, L]` of a chunk-wise `[B, N]`; 0 or False for padding."""
        per_token = per_chunk.gather(1, self.chunk_of_token.clamp(min=0))
        if per_token.dtype == torch.bool:  # (onnxruntime has no `where` for these)
            return per_token & self.is_real
        return torch.where(self.is_real, per_token, torch.zeros_like(per_token))

    def gather(self, hidden_states: torch.Tensor, active: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The `A` chunks in `active` (LongTensors `[A]`: rows and numbers) of `hidden_states` `[B, L, D]`:
        `[A, C, D]`, zeros where a chunk has no token."""
        row, length = active[0], hidden_states.shape[1]
        columns = self.positions[active]  # [A, C]
        chunks = hidden_states[row[:, None], columns.clamp(max=length - 1)]
        return chunks.masked_fill((columns == length)[..., None], 0.0)

    def scatter(
        self, hidden_states: torch.Tensor, chunks: torch.Tensor, active: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """A copy of `hidden_states` `[B, L, D]` with `chunks` `[A, C, D]` in place of the active ones. Positions a
        chunk lacks are not written."""
        batch, length, size = hidden_states.shape
        row, columns = active[0], self.positions[active]
        # Missing positions go to one spare row at the end.
        target = torch.where(columns < length, row[:, None] * length + columns, batch * length)
        flat = torch.cat([hidden_states.reshape(-1, size), hidden_states.new_zeros(1, size)])
        flat = flat.index_put((target.flatten(),), chunks.flatten(0, 1).to(flat.dtype))
        return flat[:-1].view_as(hidden_states)
