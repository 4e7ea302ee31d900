"""Quantised Hugging Face directories: what is quantised, the two packed layouts, writing and reading back.

AWQ "gemm" (vLLM, SGLang, LMDeploy): `qweight` int32 [in, out/8], `qzeros` int32 [in/g, out/8], `scales`
[in/g, out]; w = (q - z) s. compressed-tensors "pack-quantized" (those and transformers on a CPU):
`weight_packed` int32 [out, in bits/32], `weight_scale` [out, in/g or 1], `weight_shape` [2]; w = q s.
Both store the linear layers of the blocks; embeddings, norms, routers and the head stay in 16 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kllm.errors import UserError

GROUPS = (128, 64, 32)
"""Group sizes that engines have kernels for, the one with the fewest scales first."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word holds output AWQ_ORDER[i] of its eight."""
SMALLEST_SCALE = 2.0**-24
"""The least positive float16: the scale of a group of zeros, so that nothing divides by zero."""

_LINEAR = re.compile(r"\.layers\.\d+\..*\.(?:(?:q|k|v|o|gate|up|down)_proj|w[123])\.weight$")


@dataclass(frozen=True)
class QuantizedExport:
    """A quantised model ready to be written.

    `tensors`: contiguous CPU tensors in Hugging Face names; `quantization_config`: for config.json;
    `dtype`: of what stays unquantised; `scheme`: awq, int4 or int8; `group_size`: weights along the
    input that share a scale, None for one scale a row; `notes`: lines worth telling the user.
    """

    tensors: dict[str, Tensor]
    quantization_config: dict[str, Any]
    dtype: str
    scheme: str
    group_size: int | None
    notes: list[str] = field(default_factory=list)


def is_quantised(name: str) -> bool:
    """Whether this is the Hugging Face name of the weight of a block's linear layer (no router, no gate)."""
    return _LINEAR.search(name) is not None


def input_widths(tensors: dict[str, Tensor]) -> list[int]:
    """Input widths of the linears that are quantised, ascending."""
    return sorted({t.shape[-1] for name, t in tensors.items() if is_quantised(name)})


def choose_group(widths: Iterable[int], group_size: int | None) -> int:
    """`group_size` if every input width is a multiple of it; None takes the largest of 128, 64, 32 that fits.

    Raises:
        UserError: no group size, or not this one, fits; the widths are named.
    """
    widths = sorted(set(widths))
    shown = ", ".join(map(str, widths))
    if group_size is not None and group_size not in GROUPS:
        raise UserError(f"group size {group_size} is not one of 128, 64, 32, which engines run")
    for group in GROUPS if group_size is None else (group_size,):
        if all(width % group == 0 for width in widths):
            return group
    tried = "none of 128, 64, 32 divides" if group_size is None else f"{group_size} does not divide"
    raise UserError(f"group size: {tried} every input width ({shown})", hint="int8 needs no groups")


def rest_of(tensors: dict[str, Tensor], quantised: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """On the CPU and in `dtype` all but the `quantised`; UserError for one that overflows it."""
    left_out = set(quantised)
    out = {}
    for name, tensor in tensors.items():
        if name in left_out:
            continue
        out[name] = tensor.detach().to("cpu", dtype).contiguous()
        if not out[name].isfinite().all():
            raise UserError(f"tensor {name} has values beyond {str(dtype).removeprefix('torch.')}")
    return out


def round_asymmetric(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., in], zero points and float16 scales [..., in / group]: w = (q - z) s, q and z in 0..15.

    weight: float32 [..., in]. z and q are made with s already rounded to float16.
    """
    rows = weight.unflatten(-1, (-1, group))
    low = rows.amin(-1, keepdim=True).clamp_max(0)  # 0 must lie inside, or z leaves 0..15
    high = rows.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(SMALLEST_SCALE).half()
    zero = (-low / scale.float()).round_().clamp_(0, 15)
    codes = (rows / scale.float()).round_().add_(zero).clamp_(0, 15)
    return codes.flatten(-2), zero.squeeze(-1), scale.squeeze(-1)


def rounded(weight: Tensor, group: int) -> Tensor:
    """float32 [..., in]: what readers make of the quantised `weight`."""
    codes, zeros, scales = round_asymmetric(weight, group)
    codes = codes.unflatten(-1, (-1, group)).sub_(zeros[..., None]).mul_(scales.float()[..., None])
    return codes.flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """AWQ words, int32 [rows, out / 8], of codes 0..15 [rows, out]: bits 4i to 4i + 3 hold AWQ_ORDER[i]."""
    codes = codes.to(torch.int32)
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for i, output in enumerate(AWQ_ORDER):
        words |= codes[:, output::8] << 4 * i
    return words


def unpack_nibbles(words: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [rows, out]."""
    codes = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.uint8)
    for i, output in enumerate(AWQ_ORDER):
        codes[:, output::8] = ((words >> 4 * i) & 15).to(torch.uint8)
    return codes


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """compressed-tensors words, int32 [out, ceil(in bits / 32)], of signed codes [out, in].

    Codes are stored plus 2^(bits - 1), the first in the lowest bits.
    """
    per_word = 32 // bits
    unsigned = codes.to(torch.int32) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % per_word))
    words = torch.zeros(len(unsigned), unsigned.shape[1] // per_word, dtype=torch.int32)
    for i in range(per_word):
        words |= unsigned[:, i::per_word] << bits * i
    return words


def unpack_bits(words: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack_bits`: int32 [out, width]."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :width] - (1 << (bits - 1))


def dequantize_tensors(
    tensors: dict[str, Tensor], quantization_config: dict[str, Any], where: str
) -> dict[str, Tensor]:
    """Tensors in plain Hugging Face names, quantised ones as float32 [out, in], the rest untouched.

    Reads quant_method "awq" (4 bits, version gemm) and "compressed-tensors" (pack-quantized integers of
    4 or 8 bits, per group or channel, symmetric or not).

    Args:
        tensors: all tensors of the directory.
        quantization_config: that entry of config.json.
        where: the directory, for messages.

    Raises:
        UserError: another method or variant, or tensors that do not belong together.
    """
    try:
        return _dequantized(tensors, quantization_config, where)
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as e:
        message = f"its quantization_config and its tensors do not fit together ({e})"
        raise UserError(message, where=where, hint="copy the folder again") from None


def _dequantized(
    tensors: dict[str, Tensor], quantization_config: dict[str, Any], where: str
) -> dict[str, Tensor]:
    method = str(quantization_config.get("quant_method", "")).lower()
    if method == "awq":
        _check_awq(quantization_config, where)
        first = ".qweight"
    elif method == "compressed-tensors":
        bits, symmetric = _packed_scheme(quantization_config, where)
        first = ".weight_packed"
    else:
        raise UserError(
            f"quantised with {method or 'an unnamed method'}, which kllm does not read",
            where=where,
            hint="awq and compressed-tensors (pack-quantized) are read",
        )
    parts = {".qweight": (".qzeros", ".scales")}.get(
        first, (".weight_scale", ".weight_shape", ".weight_zero_point")
    )
    modules = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    used = {module + part for module in modules for part in (first, *parts)}
    out = {name: tensor for name, tensor in tensors.items() if name not in used}
    for module in modules:
        if method == "awq":
            out[f"{module}.weight"] = _from_awq(tensors, module, where)
        else:
            out[f"{module}.weight"] = _from_packed(tensors, module, bits, symmetric, where)
    return out


def _check_awq(config: dict[str, Any], where: str) -> None:
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UserError(
            f"AWQ with {bits} bits, version {version}: only 4 bits, version gemm is read", where=where
        )


def _packed_scheme(config: dict[str, Any], where: str) -> tuple[int, bool]:
    """Bits and symmetry that all groups of a compressed-tensors config share."""
    kinds: set[tuple[int, bool]] = set()
    groups = config.get("config_groups") or {}
    for group in groups.values():
        weights = group.get("weights") or {}
        form = group.get("format") or config.get("format")
        # act-order "weight" (or "static") changed the codes alone; any other moved weights between groups
        moved = weights.get("actorder") not in (None, False, "weight", "static")
        if form != "pack-quantized" or weights.get("type") != "int" or moved:
            kind = f"{form}, {weights.get('type')}{', act-order' if moved else ''}"
            raise UserError(f"compressed-tensors ({kind}): only pack-quantized int is read", where=where)
        kinds.add((int(weights.get("num_bits", 0)), bool(weights.get("symmetric", True))))
    if len(kinds) != 1 or next(iter(kinds))[0] not in (4, 8):
        shown = ", ".join(f"{bits} bits" for bits, _ in sorted(kinds)) or "no scheme"
        raise UserError(f"compressed-tensors with {shown}: one scheme of 4 or 8 bits is read", where=where)
    return kinds.pop()


def _part(tensors: dict[str, Tensor], name: str, where: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"tensor {name} is missing", where=where)
    return tensors[name]


def _from_awq(tensors: dict[str, Tensor], module: str, where: str) -> Tensor:
    words = tensors[f"{module}.qweight"]
    scales = _part(tensors, f"{module}.scales", where).float()
    zeros = _part(tensors, f"{module}.qzeros", where)
    inputs, outputs, groups = words.shape[0], words.shape[1] * 8, scales.shape[0]
    if scales.shape[1] != outputs or tuple(zeros.shape) != (groups, words.shape[1]) or inputs % groups:
        raise UserError(f"the shapes of {module}.qweight, .qzeros and .scales do not fit", where=where)
    codes = unpack_nibbles(words).view(groups, -1, outputs).float()
    weight = (codes - unpack_nibbles(zeros).float()[:, None]) * scales[:, None]
    return weight.view(inputs, outputs).t().contiguous()


def _from_packed(tensors: dict[str, Tensor], module: str, bits: int, symmetric: bool, where: str) -> Tensor:
    words = tensors[f"{module}.weight_packed"]
    scales = _part(tensors, f"{module}.weight_scale", where).float()
    outputs, inputs = (int(n) for n in _part(tensors, f"{module}.weight_shape", where))
    groups = scales.shape[-1]
    if (
        tuple(words.shape) != (outputs, math.ceil(inputs * bits / 32))
        or len(scales) != outputs
        or inputs % groups
    ):
        raise UserError(f"the shapes of {module}.weight_packed, _scale and _shape do not fit", where=where)
    codes = unpack_bits(words, bits, inputs).view(outputs, groups, -1).float()
    if not symmetric:  # packed along the outputs, not the inputs
        zeros = _part(tensors, f"{module}.weight_zero_point", where).t().contiguous()
        codes = codes - unpack_bits(zeros, bits, outputs).t().float()[..., None]
    return (codes * scales[..., None]).view(outputs, inputs)
