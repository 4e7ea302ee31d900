"""How keys and values are kept: as they are, in 8 bits, or in 4.

A format turns [..., D] vectors of one head into a few parts [..., width] and back. Rounding is per token
and head (int8) or per 32 channels of it (int4), after the rotary embedding, so a stored token never
changes when others come or go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kllm.errors import UserError

KV_DTYPES = ("auto", "int8", "int4")
_GROUP = 32


class KVFormat(Protocol):
    """Parts of a vector: `widths` and `dtypes` say how wide and of what type each is."""

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    rotation: Tensor | None
    """Orthogonal and symmetric [D, D] that queries, keys and values are multiplied by first, the result of
    attention once more: exact in itself, and it spreads the few large channels that rounding suffers from."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., D] to the parts [..., width]."""
        ...

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts back to [..., D]."""
        ...


def kv_format(name: str, head_dim: int, dtype: torch.dtype) -> KVFormat:
    """The format of `--kv-dtype`: `auto` keeps the model's own numbers of `dtype`.

    Raises:
        UserError: an unknown name, or heads whose width int4 cannot divide.
    """
    if name == "auto":
        return Plain(head_dim, dtype)
    if name == "int8":
        return Int8(head_dim, dtype)
    if name != "int4":
        raise UserError(f"unknown {name!r}", where="kv-dtype", hint=f"known: {', '.join(KV_DTYPES)}")
    if head_dim % 2:
        raise UserError(f"int4 needs an even head width, not {head_dim}", where="kv-dtype", hint="use int8")
    return Int4(head_dim, dtype)


class Plain:
    """The numbers themselves."""

    rotation: Tensor | None = None
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        self.widths, self.dtypes = (head_dim,), (dtype,)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]


class Int8:
    """Symmetric: x = code * scale, scale = max |x| / 127 per token and head."""

    rotation: Tensor | None = None
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.widths, self.dtypes = (head_dim, 1), (torch.int8, torch.float32)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-8) / 127
        return (x / scale).round_().to(torch.int8), scale

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return (parts[0] * parts[1]).to(self.dtype)


class Int4:
    """Asymmetric: x = low + code * step with codes 0..15 per 32 channels, two codes a byte.

    After a Hadamard rotation (QuaRot, Ashkboos et al. 2024): keys have channels ten times the others.
    """

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        self.dtype, self.head_dim = dtype, head_dim
        self.rotation: Tensor | None = hadamard(head_dim).to(dtype)
        self.group = _GROUP if head_dim % _GROUP == 0 else head_dim
        groups = head_dim // self.group
        self.widths = (head_dim // 2, groups, groups)
        self.dtypes = (torch.uint8, torch.float16, torch.float16)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        grouped = x.float().unflatten(-1, (-1, self.group))
        # the bounds are rounded to 16 bits first: codes must fit the numbers that decode sees
        low = grouped.amin(-1).to(torch.float16)
        step = ((grouped.amax(-1) - low.float()) / 15).clamp_(min=6e-5).to(torch.float16)
        codes = ((grouped - low.float()[..., None]) / step.float()[..., None]).round_().clamp_(0, 15)
        codes = codes.to(torch.uint8).flatten(-2)
        half = self.head_dim // 2
        return codes[..., :half] | (codes[..., half:] << 4), low, step

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        packed, low, step = parts
        codes = torch.cat((packed & 15, packed >> 4), dim=-1).unflatten(-1, (-1, self.group))
        x = codes.float() * step.float()[..., None] + low.float()[..., None]
        return x.flatten(-2).to(self.dtype)


def hadamard(size: int) -> Tensor:
    """Orthogonal and symmetric float32 [size, size]: blocks of the largest power of two that divides it."""
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    return torch.block_diag(*[block / len(block) ** 0.5] * (size // len(block)))
