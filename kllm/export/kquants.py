"""Quantisers for the K-quant blocks of GGUF (ggml's Q4_K, Q5_K, Q6_K) and the type of every tensor of a mix.

The formats are ggml's "k-quants" by Iwan Kawrakow; the search is our own. A super-block holds 256
weights of one row. All numbers are little-endian, d and dmin are float16:

    q4_k  144 bytes   d, dmin, 12 bytes of codes, 128 of nibbles    x = d * scale[j] * q - dmin * low[j]
    q5_k  176 bytes   d, dmin, 12 bytes of codes, 32 of fifth bits, 128 of nibbles           the same
    q6_k  210 bytes   128 of nibbles, 64 of two high bits, 16 scales (int8), d    x = d * scale[j] * (q - 32)

q4_k and q5_k have 8 sub-blocks j of 32 weights with 6-bit scale and low (see `_codes`): sub-blocks 2k
and 2k + 1 are the low and the high nibbles of the k-th 32 bytes, the fifth bit of weight i of sub-block
j is bit j of byte i. q6_k has 16 sub-blocks of 16 weights; each half of 128 weights is four quarters of
32: quarters 0 and 1 are the low nibbles of its 64 bytes, 2 and 3 the high ones, and the two high bits
of the four at position i share byte i, quarter 0 lowest.

Minimised is the squared error with the weights sqrt(mean x^2 of the sub-block) + |x|, since the large
weights of a matrix move its outputs most: candidates for every sub-block, then the codes that fit the
rounded d and dmin best, then d and dmin by least squares on those codes.

Inside, arrays are [weight in sub-block, sub-block, super-block], so that a sum over a sub-block adds
whole rows of memory.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kllm.errors import KllmError, UserError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SUPER_BLOCK = 256
BLOCK_BYTES = {"q4_k": 144, "q5_k": 176, "q6_k": 210}

_HALF_MAX = 65504.0
LARGEST = {"q4_k": 63 * _HALF_MAX, "q5_k": 63 * _HALF_MAX, "q6_k": 31 * 127 * _HALF_MAX}
"""The largest |weight| that d and dmin in float16 can express."""

_CHUNK = 600  # super-blocks at a time: the working set stays near the cache, and no power of two
_NEGLIGIBLE = 2.0**-30  # far below the smallest step (2^-24): taken as 0, keeps divisions finite
_ROUNDS = 2

# How many steps the range of a sub-block is cut into, less the number of levels, and by how much of
# a step the lowest weight lies outside: those two decide how the rest falls on the grid.
_AFFINE_GRID = [(c, shift) for c in (-1.2, -0.8, -0.4, 0.0, 0.4, 0.8) for shift in (0.0, -0.3)]
_SYMMETRIC_GRID = [0.2 * i for i in range(-16, 5)]


def quantize(weights: NDArray[Any], kind: str) -> Bytes:
    """Rows of K-quant blocks, as gguf-py and llama.cpp read them.

    Args:
        weights: [rows, cols] or [experts, rows, cols], taken as float32; cols is a multiple of 256.
        kind: q4_k, q5_k or q6_k.

    Returns:
        uint8 [..., rows, cols / 256 * bytes of a block].

    Raises:
        UserError: an unknown kind, or columns that do not fill super-blocks.
        KllmError: a weight that is not finite, or too large for float16 scales.
    """
    if kind not in BLOCK_BYTES:
        raise UserError(f"no K-quant named {kind!r}", hint=f"one of {', '.join(BLOCK_BYTES)}")
    if weights.ndim < 2 or weights.shape[-1] % SUPER_BLOCK:
        raise UserError(f"{kind} needs rows of a multiple of {SUPER_BLOCK} weights, not {weights.shape}")
    blocks = weights.reshape(-1, SUPER_BLOCK)
    out = np.empty((len(blocks), BLOCK_BYTES[kind]), np.uint8)
    for start in range(0, len(blocks), _CHUNK):
        part = blocks[start : start + _CHUNK].astype(np.float32)
        largest = float(np.abs(part).max())
        if not np.isfinite(largest):
            raise KllmError(f"a weight is not finite; {kind} has no code for that")
        if largest > LARGEST[kind]:
            raise KllmError(f"a weight of {largest:.3g} is too large; {kind} holds up to {LARGEST[kind]:.3g}")
        part[np.abs(part) < _NEGLIGIBLE] = 0
        encode = _encode_symmetric if kind == "q6_k" else _encode_affine
        out[start : start + _CHUNK] = encode(part, kind)
    return out.reshape(*weights.shape[:-1], weights.shape[-1] // SUPER_BLOCK * BLOCK_BYTES[kind])


# --- helpers ------------------------------------------------------------------------------------


def _split(blocks: Floats, sub_blocks: int) -> Floats:
    """[n, 256] as [256 / sub_blocks, sub_blocks, n], contiguous."""
    return np.ascontiguousarray(blocks.reshape(len(blocks), sub_blocks, -1).transpose(2, 1, 0))


def _join(q: Floats) -> Bytes:
    """The inverse of `_split`, for levels from 0 to 255."""
    return np.ascontiguousarray(q.transpose(2, 1, 0)).astype(np.uint8).reshape(q.shape[2], SUPER_BLOCK)


def _dot(a: Floats, b: Floats) -> Floats:
    """Sums of products over every sub-block: [sub-block, super-block]."""
    return np.einsum("ijk,ijk->jk", a, b)


def _inverse(values: Floats) -> Floats:
    """1 / values, and 0 for 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values != 0)


def _half(values: Floats, up: bool = False) -> Floats:
    """The nearest float16 of non-negative numbers, or the next one up; only 0 becomes 0."""
    rounded = np.minimum(values, _HALF_MAX).astype(np.float16)
    short = (rounded < values) if up else (rounded == 0) & (values > 0)
    return np.where(short, np.nextafter(rounded, np.float16(_HALF_MAX)), rounded).astype(np.float32)


def _half_bytes(values: Floats) -> Bytes:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _importance(x: Floats) -> Floats:
    w = np.abs(x)
    w += np.sqrt(_dot(x, x) / len(x))
    return w


# --- q4_k and q5_k ------------------------------------------------------------------------------


def _encode_affine(blocks: Floats, kind: str) -> Bytes:
    top = 15.0 if kind == "q4_k" else 31.0
    x = _split(blocks, 8)
    w = _importance(x)
    step, low = _search_affine(x, w, top)
    # up, or else the largest code may be over 63 where float16 is coarse
    d, dmin = _half(step.max(0) / 63, up=True), _half(low.max(0) / 63, up=True)
    scale = np.clip(np.rint(step * _inverse(d)), 0, 63)
    low = np.clip(np.rint(low * _inverse(dmin)), 0, 63)
    for _ in range(_ROUNDS):
        scale, low = _fit_codes_affine(x, w, top, d, dmin, scale, low)
        d, dmin = _fit_halves(x, w, top, d, dmin, scale, low)
    q = _join(_levels(x, d * scale, dmin * low, top, np.empty_like(x)))
    head = [_half_bytes(d), _half_bytes(dmin), _codes(scale, low)]
    nibbles = (q & 15).reshape(-1, 4, 2, 32)
    body = (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(-1, 128)
    if kind == "q4_k":
        return np.concatenate([*head, body], axis=1)
    fifth = np.packbits((q >> 4).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([*head, fifth, body], axis=1)


def _codes(scale: Floats, low: Floats) -> Bytes:
    """8 scales and 8 lows of 6 bits in 12 bytes.

    The first four of each fill the low six bits of bytes 0-3 and 4-7; the last four have their low
    nibbles in bytes 8-11 (scale below, low above) and their high two bits atop bytes 0-7.
    """
    s, m = scale.T.astype(np.uint8), low.T.astype(np.uint8)
    return np.concatenate(
        [
            s[:, :4] | (s[:, 4:] >> 4 << 6),
            m[:, :4] | (m[:, 4:] >> 4 << 6),
            (s[:, 4:] & 15) | (m[:, 4:] << 4),
        ],
        axis=1,
    )


def _search_affine(x: Floats, w: Floats, top: float) -> tuple[Floats, Floats]:
    """Step and low (>= 0) with x ~ step * q - low, for every sub-block by itself.

    Every candidate of the grid assigns levels; the line through them is least squares. Weights are
    seen as y from 0 to 1 there: no sum loses digits when the range lies far from zero.
    """
    bottom = np.minimum(x.min(0), 0)
    span = x.max(0) - bottom
    per_span = _inverse(np.where(span > _NEGLIGIBLE, span, 0))
    y = (x - bottom) * per_span
    limit = -bottom * per_span  # the format cannot lift a sub-block above zero
    sum_w, sum_y = w.sum(0), _dot(w, y)
    best, step, start = (np.zeros_like(span) for _ in range(3))
    q, wq = np.empty_like(x), np.empty_like(x)
    for extra, shift in _AFFINE_GRID:
        np.multiply(y, top + extra, out=q)
        if shift:
            q += shift
        np.clip(np.rint(q, out=q), 0, top, out=q)
        np.multiply(w, q, out=wq)
        q1, q2, qy = wq.sum(0), _dot(wq, q), _dot(wq, y)
        det = sum_w * q2 - q1 * q1
        t = (q2 * sum_y - q1 * qy) * _inverse(np.where(det > 1e-6 * sum_w * q2, det, 0))
        t = np.minimum(t, limit)
        s = (qy - t * q1) * _inverse(q2)
        gain = s * (2 * qy - s * q2 - 2 * t * q1) + t * (2 * sum_y - t * sum_w)
        better = gain > best
        for kept, new in ((best, gain), (step, s), (start, t)):
            np.copyto(kept, new, where=better)
    return step * span, np.maximum(-(bottom + start * span), 0)


def _levels(x: Floats, step: Floats, low: Floats, top: float, out: Floats) -> Floats:
    """The nearest levels; 0 where the step is 0."""
    np.add(x, low, out=out)
    out *= _inverse(step)
    return np.clip(np.rint(out, out=out), 0, top, out=out)


def _fit_codes_affine(
    x: Floats, w: Floats, top: float, d: Floats, dmin: Floats, scale: Floats, low: Floats
) -> tuple[Floats, Floats]:
    """Of a scale code and its neighbours the one, with the low that suits it, of the least error."""
    sum_w, sum_x = w.sum(0), _dot(w, x)
    mean_of = _inverse(sum_w) * _inverse(dmin)
    q, error = np.empty_like(x), np.empty_like(x)
    least = np.full_like(sum_w, np.inf)
    best_scale, best_low = scale, low
    for delta in (0, -1, 1):
        s = np.clip(scale + delta, 0, 63)
        _levels(x, d * s, dmin * low, top, q)
        m = np.clip(np.rint((d * s * _dot(w, q) - sum_x) * mean_of), 0, 63)
        _levels(x, d * s, dmin * m, top, q)
        np.multiply(q, d * s, out=error)
        error -= dmin * m
        error -= x
        np.multiply(error, w, out=q)
        total = _dot(q, error)
        better = total < least
        least = np.where(better, total, least)
        best_scale, best_low = np.where(better, s, best_scale), np.where(better, m, best_low)
    return best_scale, best_low


def _fit_halves(
    x: Floats, w: Floats, top: float, d: Floats, dmin: Floats, scale: Floats, low: Floats
) -> tuple[Floats, Floats]:
    """d and dmin by least squares over a super-block, its codes and levels given."""
    q = _levels(x, d * scale, dmin * low, top, np.empty_like(x))
    wq = w * q
    rest = x - q * (d * scale) + dmin * low
    # solved for the change, from what is left over: x itself may be far larger than its spread
    dd = (scale * scale * _dot(wq, q)).sum(0)
    dm = (scale * low * wq.sum(0)).sum(0)
    mm = (low * low * w.sum(0)).sum(0)
    u, v = (scale * _dot(wq, rest)).sum(0), (low * _dot(w, rest)).sum(0)
    det = dd * mm - dm * dm
    both = _inverse(np.where(det > 1e-5 * dd * mm, det, 0))
    new_d = d + np.where(both > 0, (mm * u - dm * v) * both, u * _inverse(dd))
    new_dmin = dmin + (dm * u - dd * v) * both
    return _half(np.where(new_d > 0, new_d, d)), _half(np.where(new_dmin > 0, new_dmin, dmin))


# --- q6_k ---------------------------------------------------------------------------------------


def _encode_symmetric(blocks: Floats, kind: str) -> Bytes:
    x = _split(blocks, 16)
    w = _importance(x)
    step = _search_symmetric(x, w)
    d = _half(np.abs(step).max(0) / 127, up=True)
    scale = np.clip(np.rint(step * _inverse(d)), -128, 127)
    for _ in range(_ROUNDS):
        scale = _fit_codes_symmetric(x, w, d, scale)
        q = _signed_levels(x, d * scale, np.empty_like(x))
        wq = w * q
        new = (scale * _dot(wq, x)).sum(0) * _inverse((scale * scale * _dot(wq, q)).sum(0))
        d = _half(np.where(new > 0, new, d))
    q6 = _join(_signed_levels(x, d * scale, np.empty_like(x)) + 32).reshape(-1, 2, 4, 32)
    low, high = q6 & 15, q6 >> 4
    nibbles = low[:, :, :2] | (low[:, :, 2:] << 4)
    pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    scales = np.ascontiguousarray(scale.T).astype(np.int8).view(np.uint8)
    return np.concatenate([nibbles.reshape(-1, 128), pairs.reshape(-1, 64), scales, _half_bytes(d)], axis=1)


def _search_symmetric(x: Floats, w: Floats) -> Floats:
    """The step (of either sign) with x ~ step * q, q from -32 to 31, for every sub-block by itself.

    The largest weight gets a negative level: there is one more of them.
    """
    at = np.abs(x).argmax(0)
    peak = -np.take_along_axis(x, at[None], 0)[0]
    y = x * _inverse(np.where(np.abs(peak) > _NEGLIGIBLE, peak, 0))
    wy = w * y
    best, step = np.zeros_like(peak), np.zeros_like(peak)
    q, wq = np.empty_like(x), np.empty_like(x)
    for extra in _SYMMETRIC_GRID:
        np.multiply(y, 32 + extra, out=q)
        np.clip(np.rint(q, out=q), -32, 31, out=q)
        np.multiply(w, q, out=wq)
        qy = _dot(wy, q)
        s = qy * _inverse(_dot(wq, q))
        gain = s * qy
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(step, s, where=better)
    return step * peak


def _signed_levels(x: Floats, step: Floats, out: Floats) -> Floats:
    np.multiply(x, _inverse(step), out=out)
    return np.clip(np.rint(out, out=out), -32, 31, out=out)


def _fit_codes_symmetric(x: Floats, w: Floats, d: Floats, scale: Floats) -> Floats:
    """Of a scale code and its neighbours the one of the least error."""
    q, error = np.empty_like(x), np.empty_like(x)
    least, best = np.full_like(scale, np.inf), scale
    for delta in (0, -1, 1):
        s = np.clip(scale + delta, -128, 127)
        _signed_levels(x, d * s, q)
        np.multiply(q, d * s, out=error)
        error -= x
        np.multiply(error, w, out=q)
        total = _dot(q, error)
        better = total < least
        least, best = np.where(better, total, least), np.where(better, s, best)
    return best


# --- which tensor gets which type ---------------------------------------------------------------

_MIXES = {"q4_k_m": "q4_k", "q5_k_m": "q5_k", "q6_k": "q6_k"}
_NARROW = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def choose_type(
    mix: str,
    name: str,
    layer: int,
    layers: int,
    cols: int,
    *,
    experts: int = 0,
    gqa: int = 1,
    tied: bool = False,
    dims: int = 2,
    arch: str = "llama",
) -> str:
    """The type of one tensor in a llama.cpp mix, as its `llama_tensor_get_type` decides (0.3.36's copy).

    Args:
        mix: q4_k_m, q5_k_m or q6_k.
        name: in GGUF, such as blk.3.ffn_down_exps.weight.
        layer: the block it is in, from 0; anything for a tensor outside of blocks.
        layers: blocks of the model.
        cols: length of a row (the first GGUF dimension).
        experts: of a layer; 0 or 1 for a dense model. Eight is Mixtral's case, with rules of its own.
        gqa: query heads per key head; only the 80-layer models of llama look at it.
        tied: there is no output.weight, so that token_embd.weight is also the head.
        dims: without those of size 1 at the end; vectors are never quantised.
        arch: general.architecture; only the 80-layer rule looks at it.

    Returns:
        f32, f16, q5_0, q5_1, q8_0, q4_k, q5_k or q6_k.
    """
    if mix not in _MIXES:
        raise UserError(f"no mix named {mix!r}", hint=f"one of {', '.join(_MIXES)}")
    kept = not name.endswith("weight") or "_norm.weight" in name or "ffn_gate_inp" in name
    if kept or dims < 2:
        return "f32"
    kind = _MIXES[mix]
    more = mix != "q6_k" and _more_bits(layer, layers)
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = "q8_0" if cols % SUPER_BLOCK else "q6_k"
    elif re.search(r"attn_(v|qkv|kv_b)\.weight", name):
        kind = "q6_k" if more else kind
        if kind == "q4_k" and layers == 80 and (arch == "qwen2" or (arch == "llama" and gqa > 1)):
            kind = "q5_k"
        kind = "q8_0" if experts == 8 else kind
    elif "attn_k.weight" in name:
        kind = "q8_0" if experts == 8 else kind
    elif "attn_output.weight" in name:
        kind = "q5_k" if experts == 8 and mix == "q4_k_m" else kind
    elif "ffn_down" in name:
        kind = "q6_k" if more else kind
    if kind in _NARROW and cols % SUPER_BLOCK:
        kind = _NARROW[kind]
    return "f16" if cols % 32 else kind


def _more_bits(layer: int, layers: int) -> bool:
    """The layers whose errors cost most: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
