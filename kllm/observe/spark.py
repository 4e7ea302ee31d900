"""A curve in one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"


def sparkline(values: Sequence[float], width: int = 24, bars: str = BARS) -> str:
    """`values` squeezed to at most `width` characters, each the mean of its share; lowest to highest bar.

    Values that are not finite are left out; a flat curve is drawn in the middle.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    n = min(width, len(finite))
    cuts = [round(i * len(finite) / n) for i in range(n + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    if high - low <= 1e-12 * max(abs(high), 1.0):
        return bars[len(bars) // 2] * n
    return "".join(bars[min(int((m - low) / (high - low) * len(bars)), len(bars) - 1)] for m in means)
