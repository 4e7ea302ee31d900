"""Causal attention over packed documents, one function with a backend per device.

A row holds many documents; none may see another. On CUDA in 16-bit the varlen kernel takes the
document borders as they are. Elsewhere documents of similar length are gathered into one padded
batch and given to SDPA: pads stand after every real token, so the plain causal mask is exact and no
block mask is ever built (which costs 3-5x on a CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass
class _Bucket:
    """`count` documents padded to `length`: rows [start, start + count * length) of the gathered order."""

    start: int
    count: int
    length: int


class PackedLayout:
    """Where documents lie in a flat row of T tokens; made once a batch, used by every layer.

    Args:
        cu_seqlens: int [documents + 1] on the CPU, document borders, cu_seqlens[-1] == T.
        device: where q, k, v live.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str = "cpu") -> None:
        borders = cu_seqlens.cpu().numpy().astype(np.int64)
        starts, lengths = borders[:-1], np.diff(borders)
        self.tokens = int(borders[-1])
        self.max_length = int(lengths.max())
        self.cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int32)
        self.uniform = bool((lengths == lengths[0]).all())
        self.buckets: list[_Bucket] = []
        if self.uniform:
            self.buckets.append(_Bucket(0, len(lengths), int(lengths[0])))
            return
        padded = np.array([_bucket_length(n) for n in lengths])
        gather, slots = [], np.empty(self.tokens, dtype=np.int64)
        position = 0
        for length in np.unique(padded):
            docs = np.flatnonzero(padded == length)
            longest = int(lengths[docs].max())
            offsets = np.arange(longest)
            index = starts[docs][:, None] + np.minimum(offsets[None, :], lengths[docs][:, None] - 1)
            real = offsets[None, :] < lengths[docs][:, None]
            slots[index[real]] = position + np.flatnonzero(real.ravel())
            gather.append(index.ravel())
            self.buckets.append(_Bucket(position, len(docs), longest))
            position += index.size
        order = np.concatenate(gather)
        keep = np.zeros(len(order), dtype=np.float32)
        keep[slots] = 1.0
        self.order = torch.from_numpy(order).to(device)
        self.slots = torch.from_numpy(slots).to(device)
        self.keep = torch.from_numpy(keep).to(device)

    def documents(self) -> Tensor:
        """int64 [T]: the number of the document that each token belongs to."""
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        ids = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(ids, lengths, output_size=self.tokens)


def _bucket_length(n: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: at most a third of a bucket is padding."""
    size = 8
    while size < n:
        if n <= size * 3 // 2:
            return size * 3 // 2
        size *= 2
    return size


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Causal attention inside each document.

    Shapes: q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads * D].
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q, k, v, layout)
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    if layout.uniform:
        bucket = layout.buckets[0]
        return _bucket_sdpa(q, k, v, bucket.count, bucket.length)
    fused = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), dim=1)
    # padded slots repeat a document's last token; their outputs are dropped, so their gradient is zero
    fused = _Gather.apply(fused, layout.order, layout.slots, None)  # type: ignore[no-untyped-call]
    outputs = []
    for bucket in layout.buckets:
        rows = fused[bucket.start : bucket.start + bucket.count * bucket.length]
        bq, bk, bv = rows.split((heads * dim, kv_heads * dim, kv_heads * dim), dim=1)
        outputs.append(
            _bucket_sdpa(
                bq.unflatten(1, (heads, dim)),
                bk.unflatten(1, (kv_heads, dim)),
                bv.unflatten(1, (kv_heads, dim)),
                bucket.count,
                bucket.length,
            )
        )
    return _Gather.apply(torch.cat(outputs), layout.slots, layout.order, layout.keep)  # type: ignore[no-untyped-call]


def _bucket_sdpa(q: Tensor, k: Tensor, v: Tensor, count: int, length: int) -> Tensor:
    """[count * length, heads, D] each -> [count * length, heads * D]."""
    q, k, v = (t.reshape(count, length, t.shape[1], t.shape[2]).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(count * length, -1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_length, layout.max_length,
        window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.flatten(1)  # type: ignore[union-attr]
