"""What a run says to a person, whatever the display: the calls, the figures, and their wording."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from kllm.observe import units
from kllm.observe.metrics import Ema, Eta

Spans = Sequence[tuple[str, bool]]


class Reporter(Protocol):
    """What the rest of the program says to the person; every implementation takes the same calls."""

    def header(self, title: str, rows: Mapping[str, Any]) -> None:
        """What is about to run, before step 1."""

    def progress(self, stage: str, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """`step` of `total` steps are done. Empty `metrics` only moves the bar: plain lines stay silent."""

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Held-out figures at `step`."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model says to `prompt` at `step`."""

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A result: goes to stdout, and is shown even when quiet."""

    def spans(self, title: str, spans: Spans) -> None:
        """A text as (piece, trained) pairs: trained pieces bright, the others dim (`[...]` when plain)."""

    def message(self, text: str) -> None:
        """One line of news."""

    def warn(self, text: str) -> None:
        """Something to look at; shown even when quiet."""

    def done(self, text: str) -> None:
        """The end of a piece of work and what to do next."""

    def close(self) -> None:
        """Ends a live display; may be called twice."""


def pretty(name: str, value: Any) -> str:
    """One figure as a person reads it: ('train/loss', 3.14159) -> 'loss 3.1416'."""
    short = _SHORT.get(name, name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f"{short} {units.UNKNOWN}"
    if name == "perf/tok_s":
        return f"{units.count(value)} tok/s"
    if name == "perf/mfu" or name.endswith(("_rate", "data_wait", "padding")):
        return f"{short} {units.percent(value)}"
    if name == "mem/peak":
        return f"{short} {units.size(value)}"
    if name == "perf/step_s":
        return f"{units.duration(value)}/step"
    if name == "collect/requests_s":
        return f"{value:.3g} requests/s"
    if name == "train/tokens":
        return f"{units.count(value)} tokens"
    if name == "opt/lr":
        return f"{short} {value:.2e}"
    if name == "opt/grad_norm":
        return f"{short} {value:.2f}"
    if isinstance(value, float):
        return f"{short} {value:.4f}" if abs(value) < 1000 else f"{short} {value:.4g}"
    return f"{short} {value}"


_SHORT = {
    "train/loss": "loss",
    "train/aux_loss": "aux",
    "val/loss": "val loss",
    "val/bpb": "bits/byte",
    "opt/lr": "lr",
    "opt/grad_norm": "grad",
    "opt/clip_rate": "clipped",
    "perf/mfu": "mfu",
    "mem/peak": "mem",
    "moe/load_max": "load max",
    "collect/kept": "kept",
    "collect/dropped": "dropped",
    "collect/failed": "failed",
}
_ORDER = (
    "train/loss", "collect/requests_s", "perf/tok_s", "perf/mfu", "opt/lr", "opt/grad_norm", "mem/peak",
    "train/aux_loss", "collect/kept", "collect/dropped", "collect/failed",
)  # fmt: skip


class Curve:
    """What the display remembers of a stage: smoothed loss, its curve, the pace, the last figures."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.step = 0
        self.total = 0
        self.metrics: dict[str, Any] = {}
        self.losses: list[float] = []
        self._ema = Ema(0.9)
        self.eta = Eta()

    def observe(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        self.step, self.total = step, total
        self.eta.observe(step)
        self.metrics.update(metrics)
        if metrics.get("train/loss") is not None:
            self.metrics["train/loss"] = self._ema.add(float(metrics["train/loss"]))
            self.losses = [*self.losses, self.metrics["train/loss"]][-400:]

    def fields(self) -> list[str]:
        """The figures in order of importance; MFU is always named, as n/a when unknown."""
        trains = "perf/tok_s" in self.metrics and "collect/requests_s" not in self.metrics
        shown = {"perf/mfu": None, **self.metrics} if trains else self.metrics
        return [pretty(name, shown[name]) for name in _ORDER if name in shown]

    def position(self) -> str:
        """'12/200', or '3.1M/20M' where steps are bytes."""
        big = self.total >= 1_000_000
        return "/".join(units.count(n) if big else str(n) for n in (self.step, self.total))

    def left(self) -> str:
        remaining = self.eta.remaining(self.total)
        return "" if remaining is None or self.step >= self.total else f"eta {units.duration(remaining)}"


def one_line(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def merged(spans: Spans) -> list[tuple[str, bool]]:
    """Neighbours of the same kind as one piece."""
    joined: list[tuple[str, bool]] = []
    for piece, trained in spans:
        if joined and joined[-1][1] == trained:
            joined[-1] = (joined[-1][0] + piece, trained)
        else:
            joined.append((piece, trained))
    return joined


def cell_width(text: str) -> int:
    """Terminal columns of `text`: East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
