"""Ways to multiply few rows by one matrix, and the probe that picks the fastest on this machine.

Generation multiplies 1 to some tens of rows by every matrix of the model. Which of torch's kernels does
that fastest depends on the processor far more than on the model (a factor of 10 between the extremes,
in either direction), so nothing is decided here by name of device: every candidate is built from a few of
the model's own matrices and timed. Candidates that a build or device lacks raise, and are left out.

A kernel is made from a weight [N, K] and perhaps a bias [N]; calling it maps x [M, K] to [M, N] of x's dtype.
Each row of the result depends on that row of x alone: what a request gets never depends on its neighbours
(beyond float rounding: the order of a sum may change with M).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kllm.model.quantize import Int8Rows, int4_groups, int8_rows, unpack_int4


class Kernel(Protocol):
    """x [M, K] -> [M, N]."""

    def __call__(self, x: Tensor) -> Tensor: ...


Make = Callable[[Tensor, "Tensor | None"], Kernel]
"""(weight [N, K], bias [N] or None) -> kernel; raises where the machine cannot."""


# -- the model's own numbers -------------------------------------------------------------------------


class Plain:
    """`F.linear` on the matrix as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Transposed:
    """x @ W with W stored [K, N]: MKL reads such a matrix about twice as fast for one row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.t().contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


class Packed:
    """oneDNN with the matrix reordered once: the fastest float kernel for 4 rows and more on most CPUs.

    Fewer rows are padded to 4: oneDNN's kernel for one row is slower than the one for four where memory is
    not cached.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.device.type != "cpu":
            raise RuntimeError("oneDNN's packed weights are for CPUs")
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows >= 4 or not rows:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        padded = torch.cat((x, x[-1:].expand(4 - rows, -1))) if rows > 1 else x.expand(4, -1)
        return torch.ops.mkldnn._linear_pointwise(padded, self.weight, self.bias, "none", [], "")[:rows]


class Tiled:
    """For one row: W cut into tiles of 16 columns, multiplied as a batch.

    A tile lies in memory as it is read and its sums stay in one register: MKL streams such tiles at the speed
    of memory, a whole transposed matrix at about three quarters of that.
    """

    COLUMNS = 16

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.device.type != "cpu":
            raise RuntimeError("tiles are for CPUs")
        self.outputs, self.bias = len(weight), bias
        padded = F.pad(weight, (0, 0, 0, -len(weight) % self.COLUMNS))
        self.tiles = padded.unflatten(0, (-1, self.COLUMNS)).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(len(self.tiles), -1, -1), self.tiles).view(1, -1)[:, : self.outputs]
        return y if self.bias is None else y + self.bias


class TiledAndPacked:
    """`Tiled` for one row and `Packed` for more: both at their best for twice the memory."""

    copies = 2

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.one, self.many = Tiled(weight, bias), Packed(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.one(x) if x.shape[0] == 1 else self.many(x)


class Widened:
    """16-bit weights kept as float32, for CPUs that compute 16-bit products in software."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.inner = Transposed(weight.float(), None if bias is None else bias.float())

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x.float()).to(x.dtype)


# -- 8 and 4 bits ------------------------------------------------------------------------------------


class RowInt8:
    """fbgemm's 8-bit product with one scale per row and activations of twice 7 bits.

    fbgemm's own dynamic kernel takes one activation scale for all rows, so that an answer would change with
    its neighbours. Here every row is divided by its own largest magnitude, so that one fixed scale fits all,
    and multiplied back afterwards. The sums are exact integers: a row's bits are the same alone and among
    others.

    8 bits do not carry activations with outliers: they cost SmolLM2-135M 2-4% of perplexity, where rounding
    the weights costs 0.3-1.2%. What the rounding of a row leaves over is therefore rounded again and
    multiplied as a second set of rows, nearly free for one row and 1.7 times the product for sixteen; then
    activations cost nothing. 7 bits each, because without VNNI two products of an unsigned and a signed byte
    are added in 16 bits, which saturates (vpmaddubsw): 2 * 127 * 127 fits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.device.type != "cpu":
            raise RuntimeError("fbgemm is for CPUs")
        self.packed = _fbgemm_pack(int8_rows(weight))
        self.bias = bias
        # [2, 1, 1]: the step of the first rounding and that of what it leaves, in shares of the largest value
        self.steps = torch.tensor((1 / _LEVELS, 1 / (2 * _LEVELS**2))).view(2, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=1, keepdim=True) * self.steps
        both = x / scale  # [2, M, K]; NaN for a row of zeros, whose result is then multiplied by 0
        high, low = both.unbind(0)
        low.sub_(high.round(), alpha=2 * _LEVELS)
        high, low = _fbgemm(both, self.packed).mul_(scale).unbind(0)
        y = high.add_(low)
        return y if self.bias is None else y.add_(self.bias)


class RowInt8FromInt4(RowInt8):
    """4-bit weights carried by the 8-bit kernel: their accuracy and RowInt8's speed and memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(int4_groups(weight).dequantize(), bias)


class Int8Weights:
    """8-bit weights turned into x's dtype at every call: right everywhere, fast nowhere."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.q, self.scale = int8_rows(weight)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.q.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


class Int4Weights:
    """4-bit weights, two in a byte, unpacked at every call: right everywhere, fast nowhere."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        quantized = int4_groups(weight)
        self.inputs, self.bias = weight.shape[1], bias
        self.q, self.scale, self.low = quantized.packed(), quantized.scale, quantized.low

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, unpack_int4(self.q, self.scale, self.low, self.inputs).to(x.dtype))
        return y if self.bias is None else y.add_(self.bias)


class AtenInt8:
    """aten's weight-only 8-bit product in bfloat16 (CUDA; vectorised on some CPUs)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.q, scale = int8_rows(weight)
        self.scale, self.bias = scale.bfloat16(), bias

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int8pack_mm(x.bfloat16().contiguous(), self.q, self.scale).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


class AtenInt4:
    """aten's weight-only 4-bit product in bfloat16 (tensor cores on CUDA, AVX512 on CPUs)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.shape[1] % 64 or weight.shape[0] % 64:
            raise RuntimeError("the packed layout needs multiples of 64")
        quantized = int4_groups(weight)
        # the kernel computes (q - 8) * scale + zero
        zero = quantized.low + 8 * quantized.scale
        pairs = torch.stack((quantized.scale.t(), zero.t()), dim=-1)
        self.scale_and_zero = pairs.bfloat16().contiguous()
        self.group, self.bias = quantized.group, bias
        if weight.device.type == "cpu":
            self.q = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.q.int(), 1)
            self.mm = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            q = quantized.q[:, ::2] << 4 | quantized.q[:, 1::2]
            self.q = torch.ops.aten._convert_weight_to_int4pack(q.contiguous(), 8)
            self.mm = torch.ops.aten._weight_int4pack_mm

    def __call__(self, x: Tensor) -> Tensor:
        y = self.mm(x.bfloat16().contiguous(), self.q, self.group, self.scale_and_zero).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


_LEVELS = 63


def _fbgemm(x: Tensor, packed: object) -> Tensor:
    """x [..., K], rounded to whole numbers within -63..63 -> float32 [..., N]."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, 64, packed)


def _fbgemm_pack(rows: Int8Rows) -> object:
    with warnings.catch_warnings():
        # torch announces another home for quantised tensors; fbgemm's packed weight is still made from one
        warnings.simplefilter("ignore", UserWarning)
        zeros = torch.zeros(len(rows.scale), dtype=torch.int64)
        tensor = torch._make_per_channel_quantized_tensor(rows.q, rows.scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)


FLOAT: dict[str, Make] = {
    "plain": Plain,
    "transposed": Transposed,
    "oneDNN packed": Packed,
    "tiles + oneDNN packed": TiledAndPacked,
}
HALF: dict[str, Make] = {**FLOAT, "widened to fp32": Widened}
INT8: dict[str, Make] = {
    "fbgemm row-wise": RowInt8,
    "aten weight-only": AtenInt8,
    "dequantised at every call": Int8Weights,
}
INT4: dict[str, Make] = {
    "fbgemm row-wise, 4-bit values": RowInt8FromInt4,
    "aten weight-only": AtenInt4,
    "dequantised at every call": Int4Weights,
}


def candidates(weights: str, dtype: torch.dtype) -> dict[str, Make]:
    """Kernels for `weights` ("int8", "int4", else float) with activations of `dtype`, the default first."""
    if weights == "int8":
        return INT8
    if weights == "int4":
        return INT4
    return FLOAT if dtype == torch.float32 else HALF
