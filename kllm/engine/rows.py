"""Rows of keys and values, one per running request, in pools of equal capacity.

Rows, not pages: on a CPU gathering pages would copy the whole cache every step, which is as much memory
traffic as attention itself. A row's capacity is a power of two of tokens (a row that outgrows its pool
moves to the next one), and the live rows of a pool stay packed at its front, so a step reads plain
slices. Buffers are [layers, 2, rows, kv_heads, capacity, width], one per part of the KV format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kllm.engine.kvformat import KVFormat

PAGE = 16
"""Tokens that memory is counted in, and that prefixes are kept in."""
_SMALLEST = 64


class Row:
    """A place for the keys and values of one request; `pool` and `index` change when it moves."""

    def __init__(self, pool: Pool, index: int) -> None:
        self.pool, self.index = pool, index

    def parts(self, start: int, stop: int) -> list[Tensor]:
        """Views of tokens start..stop-1: [layers, 2, kv_heads, stop - start, width] per part."""
        return [buffer[:, :, self.index, :, start:stop] for buffer in self.pool.buffers]


class Pool:
    """Rows of one capacity. Physical rows come and go with `resize`; `rows` are the live ones, in order."""

    def __init__(
        self, capacity: int, layers: int, kv_heads: int, fmt: KVFormat, device: torch.device
    ) -> None:
        self.capacity, self.device = capacity, device
        self._layers, self._kv_heads, self._fmt = layers, kv_heads, fmt
        self.rows: list[Row] = []
        self.buffers: list[Tensor] = []
        self.keys: list[list[Tensor]] = []
        self.values: list[list[Tensor]] = []
        self.resize(0)

    @property
    def physical(self) -> int:
        """Rows that memory is held for."""
        return self.buffers[0].shape[2]

    @property
    def row_bytes(self) -> int:
        per_token = sum(w * d.itemsize for w, d in zip(self._fmt.widths, self._fmt.dtypes, strict=True))
        return 2 * self._layers * self._kv_heads * self.capacity * per_token

    def resize(self, physical: int) -> None:
        """Holds memory for exactly `physical` rows (at least the live ones), keeping what is stored."""
        live = len(self.rows)
        fresh = []
        for part, (width, dtype) in enumerate(zip(self._fmt.widths, self._fmt.dtypes, strict=True)):
            shape = (self._layers, 2, physical, self._kv_heads, self.capacity, width)
            # Zeros, not empty: a masked key is multiplied by 0, and 0 x NaN is NaN.
            buffer = torch.zeros(shape, dtype=dtype, device=self.device)
            if live:
                buffer[:, :, :live] = self.buffers[part][:, :, :live]
            fresh.append(buffer)
        self.buffers = fresh
        self.keys = [[b[layer, 0] for b in fresh] for layer in range(self._layers)]
        self.values = [[b[layer, 1] for b in fresh] for layer in range(self._layers)]

    def take(self) -> Row:
        """A free row; there must be one."""
        row = Row(self, len(self.rows))
        self.rows.append(row)
        return row

    def give_back(self, row: Row, lengths: dict[Row, int]) -> None:
        """Frees `row`; the last live row moves into the hole. `lengths`: tokens stored in each row."""
        last = self.rows.pop()
        if last is row:
            return
        for part in self.buffers:
            n = lengths.get(last, self.capacity)
            part[:, :, row.index, :, :n] = part[:, :, last.index, :, :n]
        self.rows[row.index] = last
        last.index = row.index


class Rows:
    """All pools, within a budget of bytes.

    Args:
        layers, kv_heads: of the model.
        fmt: how vectors are kept.
        max_length: most tokens of a row.
        budget: bytes that rows and cached pages may hold together; `reclaim` is asked for the rest.
    """

    def __init__(
        self, layers: int, kv_heads: int, fmt: KVFormat, *, max_length: int, budget: int, device: torch.device
    ) -> None:
        self.layers, self.kv_heads, self.fmt = layers, kv_heads, fmt
        self.max_length, self.budget, self.device = max_length, budget, device
        self.pools: dict[int, Pool] = {}
        self.lengths: dict[Row, int] = {}
        """Tokens stored in each live row."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        per_head = sum(w * d.itemsize for w, d in zip(self.fmt.widths, self.fmt.dtypes, strict=True))
        return 2 * self.layers * self.kv_heads * per_head

    @property
    def held_bytes(self) -> int:
        """Bytes of the pools' buffers."""
        return sum(pool.physical * pool.row_bytes for pool in self.pools.values())

    @property
    def live_pages(self) -> int:
        """Pages that live rows hold."""
        return sum(-(-len(p.rows) * p.capacity // PAGE) for p in self.pools.values())

    def capacity_for(self, tokens: int) -> int:
        """Capacity of the row that holds `tokens`."""
        return min(max(_SMALLEST, 1 << (tokens - 1).bit_length()), self.max_length)

    @property
    def longest(self) -> int:
        """Most tokens that a row could ever hold, alone in memory."""
        if self.max_length * self.token_bytes <= self.budget:
            return self.max_length
        tokens = self.budget // self.token_bytes
        return 1 << (tokens.bit_length() - 1) if tokens >= _SMALLEST else 0

    @torch.inference_mode()
    def allocate(self, tokens: int, cached_bytes: int) -> tuple[Row | None, int]:
        """A row for `tokens` tokens, or None; and the bytes of cached pages that must go for it first.

        With (None, n > 0) the caller frees n bytes of pages and asks again; (None, 0) is: no room.
        """
        pool = self._pool(self.capacity_for(tokens))
        if len(pool.rows) == pool.physical:
            room = self.budget - cached_bytes - self.held_bytes
            if room < pool.row_bytes:
                self.trim(pool)
                room = self.budget - cached_bytes - self.held_bytes
            # doubling, but not when it would take the memory that cached prefixes live in
            step = pool.physical if 4 * self.held_bytes < self.budget else pool.physical // 4
            more = min(max(1, step), max(room, 0) // pool.row_bytes)
            if more == 0:
                short = pool.row_bytes - room
                return None, short if short <= cached_bytes else 0
            pool.resize(pool.physical + more)
        row = pool.take()
        self.lengths[row] = 0
        return row, 0

    @torch.inference_mode()
    def copy(self, source: Row, target: Row) -> None:
        """Copies what `source` stores to `target`."""
        n = self.lengths[source]
        for into, part in zip(target.parts(0, n), source.parts(0, n), strict=True):
            into.copy_(part)
        self.lengths[target] = n

    @torch.inference_mode()  # the buffers were made inside a step; cancelling comes from outside one
    def free(self, row: Row, *, wipe: bool = False) -> None:
        """Gives a row back; `wipe` leaves nothing of what it stored (a masked NaN would spread: 0 x NaN)."""
        if wipe:
            for part in row.parts(0, row.pool.capacity):
                part.zero_()
        row.pool.give_back(row, self.lengths)
        del self.lengths[row]

    def _pool(self, capacity: int) -> Pool:
        if capacity not in self.pools:
            self.pools[capacity] = Pool(capacity, self.layers, self.kv_heads, self.fmt, self.device)
        return self.pools[capacity]

    @torch.inference_mode()
    def trim(self, keep: Pool | None = None) -> None:
        """Lets go of rows that nobody uses, but for those of `keep`."""
        for pool in self.pools.values():
            if pool is not keep and pool.physical > len(pool.rows):
                pool.resize(len(pool.rows))
