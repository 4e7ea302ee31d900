"""Causal attention over packed documents, one function with a backend per device.

A row holds many documents; none may see another. On CUDA in 16-bit the varlen kernel takes the
document borders as they are. Elsewhere documents of similar length are gathered into one padded
batch and given to SDPA: pads stand after every real token, so the plain causal mask is exact and no
block mask is ever built (which costs 3-5x on a CPU).

Documents may share a beginning (the prompt of two answers): it lies in the row once, every linear
layer sees it once, and only its keys and values are gathered again for each of its continuations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """x.index_select(0, index) whose backward is a gather too (index's inverse), never a scatter-add.

    `inverse` [len(x)] says which output row carries row i's gradient; `keep` zeroes padded rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, keep)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inverse, keep = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return (grad if keep is None else grad * keep[:, None]), None, None, None


class _GatherRepeated(torch.autograd.Function):
    """x.index_select(0, order) where rows stand in `order` more than once.

    `uses` is a list of (rows, slots): the first pair names a slot for every row of x, each further
    pair another slot for some rows, none twice in one pair. So the backward adds without a
    scatter-add, in a fixed order on every device.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, uses: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.uses = uses
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].index_select(0, ctx.uses[0][1])
        for rows, slots in ctx.uses[1:]:
            grad[rows] += grads[0].index_select(0, slots)
        return grad, None, None


@dataclass
class _Bucket:
    """`count` documents padded to `length`, with `keys_length` keys each.

    `mask` bool [count, 1, length, keys_length] says which keys a query sees; None: its own causal past.
    """

    count: int
    length: int
    keys_length: int
    mask: Tensor | None = None


class PackedLayout:
    """Where documents lie in a flat row of T tokens; made once a batch, used by every layer.

    Args:
        cu_seqlens: int [documents + 1] on the CPU, document borders, cu_seqlens[-1] == T; none is empty.
        device: where q, k, v live.
        parents: int [documents] or None: the document that comes before this one as its beginning
            (seen as a whole, and itself without a parent), or -1.
    """

    def __init__(
        self, cu_seqlens: Tensor, device: torch.device | str = "cpu", parents: Tensor | None = None
    ) -> None:
        borders = cu_seqlens.cpu().numpy().astype(np.int64)
        self._starts, self._lengths = borders[:-1], np.diff(borders)
        self.tokens = int(borders[-1])
        self.max_length = int(self._lengths.max())
        self.device = device
        self.cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int32)
        self._parents = np.full(len(self._lengths), -1)
        if parents is not None:
            self._parents = parents.cpu().numpy().astype(np.int64)
            if (self._parents[self._parents[self._parents >= 0]] >= 0).any():
                raise ValueError("a shared beginning has a beginning itself")
        self.shared = bool((self._parents >= 0).any())
        self.uniform = not self.shared and bool((self._lengths == self._lengths[0]).all())
        self.buckets: list[_Bucket] = []
        if self.uniform:
            length = int(self._lengths[0])
            self.buckets.append(_Bucket(len(self._lengths), length, length))
        else:
            self._fill_buckets()

    def _fill_buckets(self) -> None:
        """Groups documents of similar length and finds where each token goes in the padded groups."""
        starts, lengths = self._starts, self._lengths
        before = np.where(self._parents >= 0, lengths[self._parents], 0)
        padded = np.array([_bucket_length(n) for n in lengths])
        # 0 keys: a document without a shared beginning, whose keys are its own tokens
        keys = np.array([_bucket_length(n + b) if b else 0 for n, b in zip(lengths, before, strict=True)])
        gather, gather_keys, slots, key_slots = [], [], np.empty(self.tokens, dtype=np.int64), []
        position = key_position = 0
        for length, wide in sorted(set(zip(padded.tolist(), keys.tolist(), strict=True))):
            docs = np.flatnonzero((padded == length) & (keys == wide))
            index, real = _padded_rows(starts[docs], lengths[docs])
            slots[index[real]] = position + np.flatnonzero(real.ravel())
            gather.append(index.ravel())
            bucket = _Bucket(index.shape[0], index.shape[1], index.shape[1])
            position += index.size
            if wide:
                parents = self._parents[docs]
                index, real = _padded_rows(starts[docs], lengths[docs], starts[parents], lengths[parents])
                bucket.keys_length = index.shape[1]
                bucket.mask = _causal_after(lengths[parents], bucket.length, bucket.keys_length, self.device)
            self.buckets.append(bucket)
            if self.shared:
                gather_keys.append(index.ravel())
                key_slots.append(key_position + np.flatnonzero(real.ravel()))
                key_position += index.size
        order = np.concatenate(gather)
        keep = np.zeros(len(order), dtype=np.float32)
        keep[slots] = 1.0
        self.order = torch.from_numpy(order).to(self.device)
        self.slots = torch.from_numpy(slots).to(self.device)
        self.keep = torch.from_numpy(keep).to(self.device)
        if self.shared:
            self.padded_keys = _Keys(np.concatenate(gather_keys), np.concatenate(key_slots), self.device)

    @cached_property
    def flat_keys(self) -> tuple[_Keys, Tensor, int]:
        """Keys document by document with no padding, their int32 borders, and the most of a document."""
        pieces = []
        for start, length, parent in zip(self._starts, self._lengths, self._parents, strict=True):
            own = np.arange(start, start + length)
            if parent >= 0:
                first = self._starts[parent]
                own = np.concatenate([np.arange(first, first + self._lengths[parent]), own])
            pieces.append(own)
        order = np.concatenate(pieces)
        sizes = np.array([len(p) for p in pieces])
        borders = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)).to(self.device)
        return _Keys(order, np.arange(len(order)), self.device), borders, int(sizes.max())

    def documents(self) -> Tensor:
        """int64 [T]: the number of the document that each token belongs to."""
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        ids = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(ids, lengths, output_size=self.tokens)


class _Keys:
    """The rows of k and v in the order attention reads them, shared beginnings repeated.

    Args:
        order: int64 [slots], the row in each slot.
        real: int64 [n], the slots that are no padding; every row is in at least one.
    """

    def __init__(self, order: np.ndarray, real: np.ndarray, device: torch.device | str) -> None:
        self.order = torch.from_numpy(order).to(device)
        by_row = real[np.argsort(order[real], kind="stable")]
        rows = order[by_row]
        repeat = np.arange(len(rows)) - np.searchsorted(rows, rows)  # how often the row came before
        self.uses: list[tuple[Tensor, Tensor]] = []
        for n in range(int(repeat.max()) + 1):
            use = repeat == n
            pair = torch.from_numpy(rows[use]), torch.from_numpy(by_row[use])
            self.uses.append((pair[0].to(device), pair[1].to(device)))

    def gather(self, k: Tensor, v: Tensor) -> Tensor:
        """k, v [T, kv_heads, D] -> [slots, 2 * kv_heads * D]."""
        both = torch.cat((k.flatten(1), v.flatten(1)), dim=1)
        return _GatherRepeated.apply(both, self.order, self.uses)  # type: ignore[no-untyped-call, no-any-return]


def _padded_rows(
    starts: np.ndarray, lengths: np.ndarray, first: np.ndarray | None = None, before: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [documents, longest] of each document, its last one repeated, and which are no padding.

    `before` rows from `first` on stand in front of each document.
    """
    shift = np.zeros_like(lengths) if before is None else before
    offsets = np.arange(int((lengths + shift).max()))[None, :]
    index = starts[:, None] + np.minimum(offsets - shift[:, None], lengths[:, None] - 1)
    if first is not None:
        index = np.where(offsets < shift[:, None], first[:, None] + offsets, index)
    return index, offsets < (lengths + shift)[:, None]


def _causal_after(before: np.ndarray, length: int, keys: int, device: torch.device | str) -> Tensor:
    """bool [documents, 1, length, keys]: query i sees the `before` keys and i + 1 more."""
    query, key = torch.arange(length)[:, None], torch.arange(keys)[None, :]
    return (key <= query + torch.from_numpy(before)[:, None, None])[:, None].to(device)


def _bucket_length(n: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: at most a third of a bucket is padding."""
    size = 8
    while size < n:
        if n <= size * 3 // 2:
            return size * 3 // 2
        size *= 2
    return size


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Causal attention inside each document, and to all of the beginning it shares.

    Shapes: q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads * D].
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q, k, v, layout)
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    if layout.uniform:
        return _bucket_sdpa(q, k, v, layout.buckets[0])
    # padded slots repeat a document's last token; their outputs are dropped, so their gradient is zero
    if layout.shared:
        queries = _Gather.apply(q.flatten(1), layout.order, layout.slots, None)  # type: ignore[no-untyped-call]
        pairs = layout.padded_keys.gather(k, v)
    else:
        fused = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), dim=1)
        fused = _Gather.apply(fused, layout.order, layout.slots, None)  # type: ignore[no-untyped-call]
        queries, pairs = fused.split((heads * dim, 2 * kv_heads * dim), dim=1)
    outputs = []
    query_rows = queries.split([b.count * b.length for b in layout.buckets])
    pair_rows = pairs.split([b.count * b.keys_length for b in layout.buckets])
    for bucket, bq, both in zip(layout.buckets, query_rows, pair_rows, strict=True):
        bk, bv = both.unflatten(1, (2, kv_heads, dim)).unbind(1)
        outputs.append(_bucket_sdpa(bq.unflatten(1, (heads, dim)), bk, bv, bucket))
    return _Gather.apply(torch.cat(outputs), layout.slots, layout.order, layout.keep)  # type: ignore[no-untyped-call]


def _bucket_sdpa(q: Tensor, k: Tensor, v: Tensor, bucket: _Bucket) -> Tensor:
    """q [count * length, heads, D], k and v [count * keys_length, kv_heads, D] -> like q, heads joined."""
    q, k, v = (t.unflatten(0, (bucket.count, -1)).transpose(1, 2) for t in (q, k, v))
    causal = bucket.mask is None
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bucket.mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(bucket.count * bucket.length, -1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    heads, kv_heads = q.shape[1], k.shape[1]
    borders, longest = layout.cu_seqlens, layout.max_length
    if layout.shared:
        keys, borders, longest = layout.flat_keys
        k, v = keys.gather(k, v).unflatten(1, (2, kv_heads, -1)).unbind(1)
    # with more keys than queries the causal window ends at the last of both
    out = varlen_attn(
        q, k, v, layout.cu_seqlens, borders, layout.max_length, longest,
        window_size=(-1, 0), enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return out.flatten(1)  # type: ignore[union-attr]
