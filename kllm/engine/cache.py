"""The KV cache of a step: stores the new keys and values and attends to all of them.

A step is a flat row of tokens, cut into segments: some tokens of one request each. Single tokens (the
answers under way) of one pool attend together, one masked SDPA a pool; longer segments (prefill chunks,
proposed tokens) attend alone. Protocol: `begin(segments)`, then the model calls `attend` once a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kllm.engine.kvformat import KVFormat, Plain
from kllm.engine.rows import Pool, Row

_ALIGN = 64  # single tokens attend to a multiple of this many keys, so that shapes repeat


@dataclass(frozen=True)
class Segment:
    """`count` new tokens of `row` at positions start..start+count-1."""

    row: Row
    start: int
    count: int


def in_order(segment: Segment) -> tuple[bool, int, int]:
    """Sort key: the order in which a step's segments must come."""
    return segment.count > 1, segment.row.pool.capacity, segment.row.index


@dataclass
class _Singles:
    """One new token for some rows of a pool; tokens a..b-1 of the step."""

    pool: Pool
    a: int
    b: int
    rows: Tensor
    positions: Tensor
    at: int
    """The first of `positions`."""
    keys: int
    mask: Tensor | None
    """bool [last - first, 1, 1, keys]; None when every row sees all its keys."""
    first: int
    last: int
    """Rows first..last-1 attend: those that have tokens and the ones between them."""


@dataclass
class _Chunk:
    """Several new tokens of one row; tokens a..b-1 of the step."""

    row: Row
    a: int
    b: int
    start: int
    mask: Tensor | None
    """bool [count, start + count]; None for a chunk that starts the row (plain causal)."""


class KVCache:
    """Attention over rows.

    Args:
        fmt: how keys and values are kept.
        device: where the rows live.
    """

    def __init__(self, fmt: KVFormat, device: torch.device | str = "cpu") -> None:
        self.fmt, self.device = fmt, torch.device(device)
        self._plain = isinstance(fmt, Plain)
        self._coarse = self._plain and fmt.dtypes[0].itemsize < 4
        self._rotation = None if fmt.rotation is None else fmt.rotation.to(self.device)
        self._groups: list[_Singles | _Chunk] = []

    def begin(self, segments: Sequence[Segment]) -> None:
        """Announces a step; `segments`, sorted by `in_order`, stand for its tokens one after another."""
        self._groups = []
        at = first = 0
        while first < len(segments) and segments[first].count == 1:
            last = first
            pool = segments[first].row.pool
            while last < len(segments) and segments[last].count == 1 and segments[last].row.pool is pool:
                last += 1
            self._groups.append(self._singles(pool, segments[first:last], at))
            at += last - first
            first = last
        for segment in segments[first:]:
            self._groups.append(self._chunk(segment, at))
            at += segment.count

    def _singles(self, pool: Pool, segments: Sequence[Segment], at: int) -> _Singles:
        rows = [s.row.index for s in segments]
        starts = [s.start for s in segments]
        longest, mask = max(starts) + 1, None
        first, last = rows[0], rows[-1] + 1
        gapless = last - first == len(rows)
        keys = longest
        positions = torch.tensor(starts, device=self.device)
        index = torch.tensor(rows, device=self.device)
        # in 16 bits rounding depends on the number of keys too much: always the same, whatever the company
        if not gapless or min(starts) + 1 != longest or self._coarse:
            keys = min(-(-longest // _ALIGN) * _ALIGN, pool.capacity)
            ends = positions
            if not gapless:  # the rows between have no token in this step: their results are dropped
                ends = torch.zeros(last - first, dtype=torch.int64, device=self.device)
                ends.index_copy_(0, index - first, positions)
            mask = (torch.arange(keys, device=self.device) <= ends[:, None])[:, None, None]
        return _Singles(pool, at, at + len(rows), index, positions, starts[0], keys, mask, first, last)

    def _chunk(self, segment: Segment, at: int) -> _Chunk:
        mask = None
        if segment.start:
            ends = torch.arange(segment.start, segment.start + segment.count, device=self.device)
            mask = torch.arange(segment.start + segment.count, device=self.device) <= ends[:, None]
        return _Chunk(segment.row, at, at + segment.count, segment.start, mask)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k, v [N, kv_heads, D] of the step's tokens and attends.

        Args:
            layer: number of the layer.
            q: [N, heads, D].

        Returns:
            [N, heads * D].
        """
        if not self._groups:
            raise RuntimeError("announce a step with begin() before running the model")
        if self._rotation is None:
            return self._attend(layer, q, k, v)
        turn = self._rotation
        return (self._attend(layer, q @ turn, k @ turn, v @ turn).view_as(q) @ turn).flatten(1)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for group in self._groups:
            part = slice(group.a, group.b)
            new = q[part], k[part], v[part]
            if isinstance(group, _Singles):
                outs.append(self._attend_singles(group, layer, *new))
            else:
                outs.append(self._attend_chunk(group, layer, *new))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_singles(self, group: _Singles, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = group.pool.keys[layer], group.pool.values[layer]
        n, heads, dim = q.shape
        self._store(keys, group, k)
        self._store(values, group, v)
        rows, seen = slice(group.first, group.last), slice(0, group.keys)
        all_k = self._decoded([t[rows, :, seen] for t in keys])
        all_v = self._decoded([t[rows, :, seen] for t in values])
        slots = group.last - group.first
        if slots != n:
            q = q.new_zeros(slots, heads, dim).index_copy_(0, group.rows - group.first, q)
        # the heads of a group share keys: they are the queries of one attention, nothing is repeated
        grouped = q.view(slots, all_k.shape[1], -1, dim)
        out = F.scaled_dot_product_attention(grouped, all_k, all_v, attn_mask=group.mask)
        out = out.reshape(slots, heads * dim)
        return out if slots == n else out[group.rows - group.first]

    def _attend_chunk(self, group: _Chunk, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row, start, stop = group.row, group.start, group.start + len(q)
        index = row.index
        for buffers, new in ((row.pool.keys[layer], k), (row.pool.values[layer], v)):
            for buffer, part in zip(buffers, self.fmt.encode(new), strict=True):
                buffer[index, :, start:stop] = part.transpose(0, 1)
        if start == 0 and self._plain:
            all_k, all_v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        else:
            all_k = self._decoded([t[index : index + 1, :, :stop] for t in row.pool.keys[layer]])
            all_v = self._decoded([t[index : index + 1, :, :stop] for t in row.pool.values[layer]])
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], all_k, all_v, attn_mask=group.mask,
            is_causal=group.mask is None, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[0].transpose(0, 1).reshape(len(q), -1)

    def _store(self, buffers: list[Tensor], group: _Singles, new: Tensor) -> None:
        for buffer, part in zip(buffers, self.fmt.encode(new), strict=True):
            if len(new) == 1:  # an indexed write costs three times as much as a slice
                buffer[group.first, :, group.at] = part[0]
            else:
                buffer[group.rows, :, group.positions] = part

    def _decoded(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if self._plain else self.fmt.decode(parts)
