"""Rounding of weight matrices to 8 and 4 bits, without any kernel: what the numbers become.

Matrices are [N, K]: N outputs, K inputs, as `nn.Linear` stores them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INT4_GROUP = 32
"""Inputs that share a scale and a zero point. 32 as in llama.cpp's Q4_0: small models need small groups."""

_TINY = 1e-12  # a scale of a row of zeros; anything above 0 does, the row stays zero


class Int8Rows(NamedTuple):
    """w ~ q * scale[:, None]; q int8 [N, K], scale float32 [N]."""

    q: Tensor
    scale: Tensor


class Int4Groups(NamedTuple):
    """w ~ q * scale + low, group by group; q uint8 0..15 [N, K], scale and low float32 [N, groups].

    A last group may be shorter than `group`.
    """

    q: Tensor
    scale: Tensor
    low: Tensor
    group: int

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        K = self.q.shape[1]
        scale, low = (t.repeat_interleave(self.group, dim=1)[:, :K] for t in (self.scale, self.low))
        return self.q.float() * scale + low

    def packed(self) -> Tensor:
        """uint8 [N, groups * group / 2]: two values of `q` in a byte, the even one in the low half."""
        q = F.pad(self.q, (0, -self.q.shape[1] % self.group))
        return q[:, ::2] | q[:, 1::2] << 4


def int8_rows(weight: Tensor, levels: int = 127) -> Int8Rows:
    """Symmetric rounding with one scale per output; q lies in -levels..levels (63 leaves one bit unused)."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).div_(levels).clamp_min_(_TINY)
    return Int8Rows((weight / scale[:, None]).round_().clamp_(-levels, levels).to(torch.int8), scale)


def int4_groups(weight: Tensor, group: int = INT4_GROUP) -> Int4Groups:
    """Asymmetric rounding: 16 levels between the smallest and largest weight of every group."""
    weight = weight.float()
    N, K = weight.shape
    # padding by repetition of the last column changes no group's extremes
    blocks = F.pad(weight[None], (0, -K % group), mode="replicate")[0].view(N, -1, group)
    low = blocks.amin(dim=2)
    scale = (blocks.amax(dim=2) - low).div_(15).clamp_min_(_TINY)
    q = ((blocks - low[..., None]) / scale[..., None]).round_().clamp_(0, 15)
    return Int4Groups(q.view(N, -1)[:, :K].to(torch.uint8), scale, low, group)


def unpack_int4(packed: Tensor, scale: Tensor, low: Tensor, inputs: int) -> Tensor:
    """float32 [N, inputs], the matrix behind `Int4Groups.packed`, its `scale` and its `low`."""
    q = torch.stack((packed & 15, packed >> 4), dim=-1).view(*low.shape, -1)
    weight = torch.addcmul(low[..., None], q.to(low.dtype), scale[..., None])
    return weight.flatten(1)[:, :inputs]
