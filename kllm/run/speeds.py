"""The last measured training speed on each device, beside the runs: what a plan's time is estimated from."""

from __future__ import annotations

import contextlib
import platform
import statistics
from pathlib import Path
from typing import Any

from kllm.errors import KllmError
from kllm.files import write_json
from kllm.observe.sinks import read_rows
from kllm.run.context import StageContext
from kllm.run.rundir import now, read_json


def speeds_file(run_dir: Path) -> Path:
    """`runs/speeds.json` for `runs/NAME`."""
    return run_dir.parent / "speeds.json"


def remember(ctx: StageContext, status: dict[str, Any]) -> None:
    """Stores the median tokens/s of the stage, and the FLOP/s it amounts to, under its device."""
    rates = [row["perf/tok_s"] for row in read_rows(ctx.metrics_path) if row.get("perf/tok_s")]
    tokens, flops = status.get("tokens"), status.get("flops")
    if not rates or not tokens or not flops or ctx.smoke:
        return
    # the first line carries warm-up
    rate = statistics.median(rates[1:] or rates)
    path = speeds_file(ctx.run_dir)
    known = read_json(path)
    known[_key(str(status.get("device", ctx.device)), int(status.get("processes", 1)))] = {
        "tok_s": rate,
        "flops_s": rate * flops / tokens,
        "parameters": status.get("parameters"),
        "run": f"{ctx.run_dir.name}/{ctx.name}",
        "device": status.get("device"),
        "when": now(),
    }
    with contextlib.suppress(KllmError, OSError):  # a memory aid only
        write_json(path, known)


def recall(run_dir: Path, device: str, processes: int) -> dict[str, Any] | None:
    """The newest measurement for `device` (auto: whatever was measured last) on this machine."""
    known = read_json(speeds_file(run_dir))
    if device != "auto":
        return known.get(_key(device, processes))
    suffix = f" x{processes} @{platform.node()}"
    fitting = [entry for key, entry in known.items() if key.endswith(suffix)]
    return max(fitting, key=lambda entry: entry.get("when", ""), default=None)


def _key(device: str, processes: int) -> str:
    return f"{device} x{processes} @{platform.node()}"
