"""Rotary position embedding, rotate-half convention, with the scalings real models use.

RoPE: Su et al. 2021 (arXiv 2104.09864). YaRN: Peng et al. 2023 (arXiv 2309.00071), computed as
transformers, vLLM and llama.cpp do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kllm.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [D/2] and the factor that multiplies cos and sin."""
    inv_freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return inv_freq.float(), 1.0
    if kind not in ROPE_TYPES:
        raise UserError(
            f"rope_type {kind!r} is not supported",
            where="rope_scaling",
            hint=f"known: {', '.join(ROPE_TYPES)}",
        )
    factor = float(scaling.get("factor", 1.0))
    if kind == "linear":
        return (inv_freq / factor).float(), 1.0
    if kind == "llama3":
        return _llama3(inv_freq, factor, scaling).float(), 1.0
    scaled, attention_factor = _yarn(inv_freq, head_dim, theta, factor, scaling)
    return scaled.float(), attention_factor


def _llama3(inv_freq: Tensor, factor: float, scaling: dict[str, Any]) -> Tensor:
    low = float(scaling.get("low_freq_factor", 1.0))
    high = float(scaling.get("high_freq_factor", 4.0))
    original = float(scaling["original_max_position_embeddings"])
    rotations = original * inv_freq / (2 * math.pi)
    mix = ((rotations - low) / (high - low)).clamp(0, 1)
    return inv_freq * mix + inv_freq / factor * (1 - mix)


def _yarn(
    inv_freq: Tensor, head_dim: int, theta: float, factor: float, scaling: dict[str, Any]
) -> tuple[Tensor, float]:
    original = float(scaling.get("original_max_position_embeddings") or 0)
    if not original:
        raise UserError("yarn needs original_max_position_embeddings", where="rope_scaling")

    def dim(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim(float(scaling.get("beta_fast") or 32)), dim(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    scaled = inv_freq * (1 - ramp) + inv_freq / factor * ramp

    def mscale(k: float) -> float:
        return 0.1 * k * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = scaling.get("attention_factor")
    if given is not None:
        return scaled, float(given)
    m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return scaled, mscale(m) / mscale(m_all) if m and m_all else mscale(1.0)


def rope_table(
    head_dim: int, theta: float, scaling: dict[str, Any] | None, length: int
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [length, D/2] each."""
    inv_freq, factor = rope_frequencies(head_dim, theta, scaling)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq[None, :]
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., heads, D] by cos, sin [..., 1, D/2]; halves are (first, second) as in Llama."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
