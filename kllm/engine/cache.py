"""The slot KV cache: one row of keys and values per running request, rows 0..n-1 without gaps.

Rows, not pages: on a CPU gathering pages would copy the whole cache every step, which is as much memory
traffic as attention itself. Live rows stay packed at the front (a finished row is overwritten by the last
one), so a step reads plain slices. Buffers [rows, kv_heads, length, head_dim], one pair per layer, double
in rows or in length as they are needed.

Protocol with the model: the engine announces a step (`prefill` or `decode`), the model calls
`update(layer, k, v)` once per layer and attends to what comes back under `mask`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGN = 64  # decode attends to a multiple of this many keys, so that shapes repeat
_MIN_LENGTH = 256


class KVCache:
    """Keys and values of up to `max_rows` requests of up to `max_length` tokens.

    `mask` is what attention must use in the announced step: None for plain causal attention over the keys
    that `update` returns (a prefill, or one query that sees all of them), else bool [B, 1, 1, keys].
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        max_rows: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.max_rows, self.max_length = max_rows, max_length
        self.dtype, self.device = dtype, torch.device(device)
        self.rows, self.length = 0, 0
        self.mask: Tensor | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._span: tuple[slice, slice] | None = None
        self._at: tuple[Tensor, Tensor] | None = None
        self._keys_seen = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(t.nbytes for t in (*self._keys, *self._values))

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for `rows` rows of `length` tokens, keeping what is stored."""
        if rows <= self.rows and length <= self.length:
            return
        if rows > self.max_rows or length > self.max_length:
            raise ValueError(f"cache of {self.max_rows} x {self.max_length} asked for {rows} x {length}")
        old_rows, old_length = self.rows, self.length
        self.rows = min(_power_of_two(max(rows, old_rows, 1)), self.max_rows)
        self.length = min(_power_of_two(max(length, old_length, _MIN_LENGTH)), self.max_length)
        shape = (self.rows, self.kv_heads, self.length, self.head_dim)
        for buffers in (self._keys, self._values):
            for layer in range(self.layers):
                # Zeros, not empty: a masked key is multiplied by 0, and 0 x NaN is NaN.
                grown = torch.zeros(shape, dtype=self.dtype, device=self.device)
                if layer < len(buffers):
                    grown[:old_rows, :, :old_length] = buffers[layer]
                    buffers[layer] = grown
                else:
                    buffers.append(grown)

    def prefill(self, first: int, rows: int, length: int) -> None:
        """Announces a first pass over new rows first..first+rows-1, all padded on the right to `length`.

        The padding's keys are stored too; they lie behind each row's end and are overwritten or masked.
        """
        self.reserve(first + rows, length)
        self._span = (slice(first, first + rows), slice(0, length))
        self._at, self.mask = None, None

    def decode(self, positions: Sequence[int]) -> None:
        """Announces one more token for rows 0..n-1, row i's at `positions[i]`."""
        longest = max(positions) + 1
        self.reserve(len(positions), longest)
        if min(positions) + 1 == longest:
            self._span = (slice(0, len(positions)), slice(longest - 1, longest))
            self._at, self.mask, self._keys_seen = None, None, longest
            return
        keys = min(-(-longest // _ALIGN) * _ALIGN, self.length)
        at = torch.tensor(positions, dtype=torch.int64, device=self.device)
        self._span = None
        self._at = (torch.arange(len(positions), device=self.device), at)
        self.mask = (torch.arange(keys, device=self.device) <= at[:, None])[:, None, None]
        self._keys_seen = keys

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [B, kv_heads, S, head_dim] of this step; returns all keys and values to attend to."""
        keys, values = self._keys[layer], self._values[layer]
        if self._at is not None:
            at, positions = self._at
            keys[at, :, positions] = k[:, :, 0]
            values[at, :, positions] = v[:, :, 0]
            return keys[: len(k), :, : self._keys_seen], values[: len(k), :, : self._keys_seen]
        if self._span is None:
            raise RuntimeError("announce a step with prefill() or decode() before running the model")
        rows, span = self._span
        keys[rows, :, span] = k
        values[rows, :, span] = v
        if span.start == 0:
            return k, v
        return keys[rows, :, : self._keys_seen], values[rows, :, : self._keys_seen]

    @torch.inference_mode()  # the buffers were made inside a step; cancelling comes from outside one
    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of row `source` over row `target`."""
        for buffer in (*self._keys, *self._values):
            buffer[target, :, :length] = buffer[source, :, :length]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
