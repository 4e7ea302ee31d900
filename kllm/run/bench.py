"""What every speed measurement needs: taking turns, clocks, spreads, the machine it was taken on."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kllm.data.sources import iter_records
from kllm.data.texts import all_texts

TEXTS = "builtin:world/pretrain"


@dataclass(frozen=True)
class Cost:
    """Seconds of one piece of work: of the processors (all threads together) and of the clock."""

    cpu: float
    wall: float


@dataclass
class Costs:
    """The costs of one candidate, one a round."""

    rounds: list[Cost] = field(default_factory=list)

    def spread(self, clock: str) -> dict[str, float]:
        """min and median seconds on the `cpu` or `wall` clock."""
        values = [getattr(cost, clock) for cost in self.rounds]
        return {"min": min(values), "median": statistics.median(values)}


Work = Callable[[int], "Cost | None"]
"""Does one round (its number is given); None: the caller's clocks measure it."""


def timed(work: Work, number: int) -> Cost:
    """One round of `work`, by this process's clocks unless it brings its own figures."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    own = work(number)
    return own or Cost(time.process_time() - cpu, time.perf_counter() - wall)


def interleave(candidates: Mapping[str, Work], rounds: int) -> dict[str, Costs]:
    """Candidates take turns (A B C, B C A, ...), so that a busy moment hits all; round 0 is a warm-up."""
    costs = {name: Costs() for name in candidates}
    names = list(candidates)
    gc.collect()
    gc.freeze()  # collections look at what the candidates make, not at all that is loaded
    try:
        for number in range(rounds + 1):
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                cost = timed(candidates[name], number)
                if number:
                    costs[name].rounds.append(cost)
    finally:
        gc.unfreeze()
    return costs


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` (0 to 1) of all do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else None


def jain(values: Sequence[float]) -> float | None:
    """Jain's fairness index: 1 when all are equal, 1/n when one has everything; None of nothing."""
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def texts_of(where: str) -> Iterator[str]:
    """Every text in a source of data (see `kllm.data.sources`) that is not blank."""
    return (text for _, record in iter_records(where) for text in all_texts(record) if text.strip())


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, other work's load; torch and its arithmetic if in use."""
    torch = sys.modules.get("torch")  # a load client does without
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability() if torch else None,
        "torch": version("torch"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
