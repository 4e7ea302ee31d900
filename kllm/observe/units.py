"""How numbers read to a person: counts, bytes, seconds, rates."""

from __future__ import annotations

import math

UNKNOWN = "n/a"


def count(value: float | None) -> str:
    """25829888 -> '25.8M'; None -> 'n/a'."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 1000 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def work(flops: float | None) -> str:
    """Floating-point operations: 1.95e11 -> '195 GFLOP'."""
    if flops is None or not math.isfinite(flops):
        return UNKNOWN
    for scale, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(flops) >= scale:
            return f"{flops / scale:.3g} {unit}FLOP"
    return f"{flops:.0f} FLOP"


def size(value: float | None) -> str:
    """Bytes in binary units: 1610612736 -> '1.50 GiB'."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {unit}" if scale >= 2**30 else f"{value / scale:.0f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds as '4.2s', '03:05', '2:03:05' or '3d 04h'."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def age(seconds: float) -> str:
    """How long ago: '12 s', '5 min', '3 h', '4 d'."""
    for scale, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= scale:
            return f"{seconds / scale:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def percent(share: float | None) -> str:
    """0.613 -> '61%'; None -> 'n/a' (an unknown share is never shown as 0%)."""
    if share is None or not math.isfinite(share):
        return UNKNOWN
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"
