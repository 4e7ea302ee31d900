"""Prometheus' text format for what the engines do; names after vLLM's, no label from a caller."""

from __future__ import annotations

import bisect
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kllm.serve.registry import Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)


class Histogram:
    """Counts of observations up to each bound; seconds."""

    def __init__(self, bounds: Sequence[float] = _LONG) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value`, as often as it stands for."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str, label: str) -> Iterator[str]:
        """The samples: cumulative buckets, sum and count."""
        total = 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            edge = "+Inf" if bound is None else f"{float(bound):g}"
            yield f'{name}_bucket{{{label},le="{edge}"}} {total}'
        yield f"{name}_sum{{{label}}} {self.sum:.9g}"
        yield f"{name}_count{{{label}}} {total}"


class ModelMetrics:
    """What is counted for one model or adapter; written by the event loop."""

    def __init__(self) -> None:
        self.rejected = self.prompt_tokens = self.generation_tokens = 0
        self.reasons = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self.tool_calls: Counter[tuple[str, str]] = Counter()
        """By (tool, outcome)."""
        self.first_token = Histogram()
        self.between_tokens = Histogram(_SHORT)
        self.whole = Histogram()
        self.queue = Histogram()

    def finished(self, reason: str) -> None:
        """Counts the end of a request."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


class Metrics:
    """The document of all models. What an engine has is under its own model's name, not an adapter's."""

    def render(self, models: Iterable[Served]) -> str:
        """The text of /metrics."""
        served = list(models)
        first = {one.runtime: one for one in reversed(served)}
        labels = [f'model_name="{_escaped(one.name)}"' for one in served]
        lines: list[str] = []

        def family(name: str, kind: str, text: str, samples: Iterable[str]) -> None:
            lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples))

        pairs = list(zip(served, labels, strict=True))
        owners = [(one, label) for one, label in pairs if first[one.runtime] is one]
        for of_engine, name, kind, text, value in _SIMPLE:
            full, whose = f"kllm:{name}", owners if of_engine else pairs
            family(full, kind, text, [f"{full}{{{label}}} {value(one):.9g}" for one, label in whose])
        name = "kllm:request_success_total"
        reasons = [
            f'{name}{{{label},finished_reason="{reason}"}} {count}'
            for one, label in pairs
            for reason, count in one.metrics.reasons.items()
        ]
        family(name, "counter", "Finished requests by the reason of their end.", reasons)
        name = "kllm:tool_calls_total"
        calls = [
            f'{name}{{{label},tool="{_escaped(tool)}",outcome="{outcome}"}} {count}'
            for one, label in pairs
            for (tool, outcome), count in sorted(one.metrics.tool_calls.items())
        ]
        if calls:
            family(name, "counter", "Calls of the server's tools by what came of them.", calls)
        for name, attribute, text in _HISTOGRAMS:
            samples = [
                line
                for one, label in pairs
                for line in getattr(one.metrics, attribute).lines(f"kllm:{name}", label)
            ]
            family(f"kllm:{name}", "histogram", text, samples)
        resident = resident_bytes()
        if resident is not None:
            name = "process_resident_memory_bytes"
            family(name, "gauge", "Resident memory of the process.", [f"{name} {resident}"])
        return "\n".join(lines) + "\n"


def _kv_usage(one: Served) -> float:
    stats = one.runtime.stats()
    return 1 - stats.kv_pages_free / stats.kv_pages_total if stats.kv_pages_total else 0.0


_ENGINE, _NAME = True, False
_SIMPLE = (
    (_ENGINE, "num_requests_running", "gauge", "Requests that hold a row.", lambda m: m.runtime.running),
    (_ENGINE, "num_requests_waiting", "gauge", "Requests that wait for a row.", lambda m: m.runtime.waiting),
    (_ENGINE, "num_requests_in_tools", "gauge", "Requests whose tools run.", lambda m: m.runtime.in_tools),
    (_ENGINE, "kv_cache_usage_perc", "gauge", "Used part of the KV cache; 1 is all.", _kv_usage),
    (
        _ENGINE,
        "num_preemptions_total",
        "counter",
        "Requests put back into the queue.",
        lambda m: m.runtime.stats().preemptions,
    ),
    (_NAME, "prompt_tokens_total", "counter", "Tokens of prompts.", lambda m: m.metrics.prompt_tokens),
    (_NAME, "generation_tokens_total", "counter", "Tokens generated.", lambda m: m.metrics.generation_tokens),
    (
        _ENGINE,
        "prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
        lambda m: m.runtime.stats().prefix_queries,
    ),
    (
        _ENGINE,
        "prefix_cache_hits_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
        lambda m: m.runtime.stats().prefix_hits,
    ),
    (
        _NAME,
        "admission_rejections_total",
        "counter",
        "Requests refused because the queue was full.",
        lambda m: m.metrics.rejected,
    ),
)
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "first_token", "From admission to the first token."),
    ("inter_token_latency_seconds", "between_tokens", "Between two tokens of a request."),
    ("e2e_request_latency_seconds", "whole", "From admission to the end."),
    ("request_queue_time_seconds", "queue", "From admission to the prefill."),
)


def resident_bytes() -> int | None:
    """Resident memory of this process, None where the system does not tell (it does on Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
