"""Curves of a stage: PNG files from metrics.jsonl (matplotlib, optional) and lines of text."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kllm.files import io_errors
from kllm.observe.metrics import Ema, describe
from kllm.observe.sinks import read_rows
from kllm.observe.spark import sparkline

Series = dict[str, tuple[list[float], list[float]]]

_SKIP = frozenset({"train/tokens", "train/trained_tokens", "train/epoch", "mem/peak"})


def available() -> bool:
    """matplotlib is installed (nothing is imported)."""
    return importlib.util.find_spec("matplotlib") is not None


def read_series(metrics_jsonl: Path) -> Series:
    """name -> (steps, values) of every number in the file; values that are not finite are left out."""
    series: Series = {}
    for row in read_rows(metrics_jsonl):
        step = row.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return series


def plot_run(metrics_jsonl: Path, out_dir: Path) -> list[Path]:
    """Draws `loss.png` (train, smoothed, held-out) and one PNG for each further family of metrics.

    Returns the files written; none without matplotlib (see `available`) or without two points.
    """
    if not available():
        return []
    series = {n: s for n, s in read_series(metrics_jsonl).items() if len(s[0]) > 1 and n not in _SKIP}
    families: dict[str, list[str]] = {}
    for name in series:
        family = "loss" if name in ("train/loss", "val/loss") else name.split("/")[0]
        families.setdefault(family, []).append(name)
    with io_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        return [_draw(out_dir / f"{f}.png", names, series, f == "loss") for f, names in families.items()]


def _draw(path: Path, names: Sequence[str], series: Series, together: bool) -> Path:
    """One figure: all names in one panel, or one panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[list[str]] = [sorted(names)] if together else [[n] for n in sorted(names)]
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7 * columns, 4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name in panel:
            _curve(axes, name, *series[name])
        metric = describe(panel[0])
        axes.set_xlabel("step")
        axes.set_ylabel(metric.unit if metric else "")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize="small")
    # a plot can always be drawn again: no fsync, but never half a file
    aside = path.with_name(f".{path.name}.tmp")
    figure.savefig(aside, format="png")
    aside.replace(path)
    return path


def _curve(axes: Any, name: str, steps: list[float], values: list[float]) -> None:
    if name != "train/loss" or len(values) < 20:
        axes.plot(steps, values, marker="o" if len(values) < 30 else None, markersize=3, label=name)
        return
    ema = Ema(0.9)
    axes.plot(steps, values, alpha=0.3, linewidth=0.8, color="tab:blue")
    axes.plot(steps, [ema.add(v) for v in values], color="tab:blue", label=f"{name} (smoothed)")


def loss_line(metrics_jsonl: Path, width: int = 40) -> str:
    """The training loss as one line of text with its first and last value; '' without two points."""
    _, values = read_series(metrics_jsonl).get("train/loss", ([], []))
    if len(values) < 2:
        return ""
    return f"loss {values[0]:.3f} {sparkline(values, width)} {values[-1]:.3f}"
