"""int8 and int4 weights in compressed-tensors' "pack-quantized" layout: no calibration, every reader.

Symmetric round-to-nearest; the scale of each row (int8) or group (int4) is the one with the least squared
error, a little below the one that reaches the largest weight (MSE clipping, e.g. Banner et al. 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kllm.errors import UserError
from kllm.export.mapping import state_to_hf
from kllm.export.quantized import (
    SMALLEST_SCALE,
    QuantizedExport,
    choose_group,
    input_widths,
    is_quantised,
    pack_bits,
    rest_of,
)
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

CLIP_RATIOS = tuple(1 - i / 50 for i in range(21))
"""Scales tried, as shares of the one that reaches the largest weight."""


@torch.no_grad()
def quantize_packed(
    model: Transformer, bits: int, group_size: int | None = None, *, dtype: str = "float16"
) -> QuantizedExport:
    """The model with 8-bit weights (one scale a row) or 4-bit weights (one a group), both symmetric.

    Experts are quantised one by one as every other linear: transformers 4.57 to 5.24 read them, and
    transformers 5 does not read a file whose experts stay in 16 bits beside quantised attention.

    Args:
        model: any float dtype and device; not changed.
        bits: 8 or 4.
        group_size: 128, 64 or 32 weights to a scale, for 4 bits; None takes the largest that fits.
        dtype: of the scales and of what stays unquantised.

    Raises:
        UserError: other bits, a group size that does not fit, or a tensor that overflows `dtype`.
    """
    if bits not in (4, 8):
        raise UserError(f"{bits} bits: pack-quantized weights have 4 or 8")
    if bits == 8 and group_size is not None:
        raise UserError("int8 has one scale a row and takes no group size")
    shape, kind = model.shape, getattr(torch, dtype)
    source = state_to_hf(model.state_dict(), shape)
    group = choose_group(input_widths(source), group_size) if bits == 4 else None
    names = [name for name in source if is_quantised(name)]
    tensors = rest_of(source, names, kind)
    for name in names:
        weight = source[name].detach().float()
        codes, scales = round_symmetric(weight, bits, group, kind)
        module = name.removesuffix(".weight")
        tensors[f"{module}.weight_packed"] = pack_bits(codes.cpu(), bits)
        tensors[f"{module}.weight_scale"] = scales.cpu()
        tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    config = _config(shape, bits, group)
    return QuantizedExport(tensors, config, dtype, f"int{bits}", group)


def round_symmetric(
    weight: Tensor, bits: int, group: int | None, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] from -2^(bits-1) and scales in `dtype`, [out, in / group] or [out, 1].

    weight: float32 [out, in]. Codes are made with the scale already rounded to `dtype`.
    """
    top = 2 ** (bits - 1)
    rows = weight.view(weight.shape[0], -1, group or weight.shape[1])
    largest = rows.abs().amax(dim=-1, keepdim=True)
    best_error = torch.full_like(largest, torch.inf)
    best = largest
    for ratio in CLIP_RATIOS:
        scale = (largest * ratio / (top - 1)).clamp_min(SMALLEST_SCALE).to(dtype).float()
        error = (
            ((rows / scale).round_().clamp_(-top, top - 1).mul_(scale) - rows).square_().sum(-1, keepdim=True)
        )
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    codes = (rows / best).round_().clamp_(-top, top - 1).to(torch.int8)
    scales = best.squeeze(-1).to(dtype).contiguous()
    if not scales.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"a weight of {float(largest.max()):.3g} needs a scale beyond {name}")
    return codes.view_as(weight), scales


def _config(shape: ModelShape, bits: int, group: int | None) -> dict[str, object]:
    """config.json's quantization_config. `ignore` names what is a linear somewhere but stays as it is."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    scheme = {
        "targets": ["Linear"],
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }
    routers = [r"re:.*\.gate$", r"re:.*\.shared_expert_gate$"] if shape.is_moe else []
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *routers],
        "config_groups": {"group_0": scheme},
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
