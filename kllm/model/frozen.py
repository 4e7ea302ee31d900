"""Linear layers that are never trained: weights in full or rounded to 8 or 4 bits, products without dW.

The backward of a frozen layer makes the gradient of its input alone. A rounded weight is turned back into
numbers for the product and once more for its backward instead of being kept, so that one layer's numbers
exist at a time (QLoRA, Dettmers et al. 2023).

Shapes: T tokens, K inputs, N outputs; stacks of E experts are [E, N, K].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kllm.model.quantize import INT4_GROUP, int4_groups, int8_rows, unpack_int4

BASES = {"none": 4.0, "int8": 1.0, "int4": 0.5 + 8 / INT4_GROUP}
"""Kinds of frozen weights with the bytes of one weight (of int4 with scale and low of its group)."""


def freeze(weight: Tensor, base: str) -> tuple[Tensor, ...]:
    """The parts that carry a weight [..., N, K]: itself; int8 (values, scale); int4 (packed, scale, low)."""
    if base == "none":
        return (weight,)
    rows = weight.flatten(0, -2)
    if base == "int8":
        return tuple(t.unflatten(0, weight.shape[:-1]) for t in int8_rows(rows))
    groups = int4_groups(rows)
    return tuple(t.unflatten(0, weight.shape[:-1]) for t in (groups.packed(), groups.scale, groups.low))


def thaw(parts: tuple[Tensor, ...], inputs: int, dtype: torch.dtype) -> Tensor:
    """[..., N, inputs] in `dtype`: the inverse of `freeze`, up to its rounding."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    if len(parts) == 2:
        q, scale = parts
        return (q.to(scale.dtype) * scale[..., None]).to(dtype)
    packed, scale, low = (t.flatten(0, -2) for t in parts)
    return unpack_int4(packed, scale, low, inputs).unflatten(0, parts[0].shape[:-1]).to(dtype)


class FrozenMatrix(nn.Module):
    """A weight [..., N, K] that is never trained, in full or rounded.

    Its parts are parameters, not buffers: DistributedDataParallel would send buffers at every step.
    """

    _NAMES = (("weight",), ("values", "scale"), ("packed", "scale", "low"))

    def __init__(self, weight: Tensor, base: str) -> None:
        super().__init__()
        self.shape, self.kind = weight.shape, base
        self.dtype = weight.dtype
        self.replace(weight)

    @torch.no_grad()
    def replace(self, weight: Tensor) -> None:
        """Holds this weight from now on, rounded as before."""
        parts = freeze(weight.detach(), self.kind)
        for name, part in zip(self._NAMES[len(parts) - 1], parts, strict=True):
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    def parts(self) -> tuple[Tensor, ...]:
        return tuple(self._parameters.values())  # type: ignore[arg-type]

    def full(self, dtype: torch.dtype) -> Tensor:
        """The weight's numbers, [..., N, K]."""
        return thaw(self.parts(), self.shape[-1], dtype)


# -- products that make no gradient of the weight ----------------------------------------------------


class _FrozenProduct(torch.autograd.Function):
    """x W^T for x [T, K]; the backward makes dx only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.inputs = x.shape[1]
        return x @ thaw(parts, x.shape[1], x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        return (grads[0] @ thaw(parts, ctx.inputs, grads[0].dtype), *[None] * len(parts))


class _FrozenGrouped(torch.autograd.Function):
    """Each row of x [T, K] times the transposed weight of its own expert; the backward makes dx only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, *parts)
        ctx.inputs = x.shape[1]
        return F.grouped_mm(x, thaw(parts, x.shape[1], x.dtype).transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        offsets, *parts = ctx.saved_tensors
        weight = thaw(tuple(parts), ctx.inputs, grads[0].dtype)
        return F.grouped_mm(grads[0].contiguous(), weight, offs=offsets), None, *[None] * len(parts)


# -- layers ------------------------------------------------------------------------------------------


class FrozenLinear(nn.Module):
    """A linear layer that is not trained; made of one, whose weight it takes over."""

    def __init__(self, linear: nn.Linear, base: str) -> None:
        super().__init__()
        self.base = FrozenMatrix(linear.weight, base)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the precision of a surrounding autocast."""
        y = self.product(x.to(precision(x)).flatten(0, -2))
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.unflatten(0, x.shape[:-1])

    def product(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], without the bias."""
        return _FrozenProduct.apply(x, *self.base.parts())  # type: ignore[no-any-return, no-untyped-call]


class FrozenStack(nn.Module):
    """One matrix of each of E experts, [E, N, K], that is not trained."""

    def __init__(self, weight: Tensor, base: str) -> None:
        super().__init__()
        self.base = FrozenMatrix(weight, base)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, K] sorted by expert -> [T, N]; offsets int32 [E] are the ends of each expert's rows."""
        return _FrozenGrouped.apply(x, offsets, *self.base.parts())  # type: ignore[no-any-return, no-untyped-call]


def precision(x: Tensor) -> torch.dtype:
    """What a linear layer computes in: x's dtype, or that of a surrounding autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
