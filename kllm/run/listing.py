"""The runs of a folder, for `kllm runs ls`."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kllm.errors import UserError
from kllm.observe.sinks import read_rows
from kllm.run.rundir import RunDir, read_json


def find_runs(folder: Path) -> list[dict[str, Any]]:
    """Every run below `folder`, newest first; a folder that is a run itself counts as one.

    Each: path, name, state, updated (ISO 8601), age (seconds), loss (last training or held-out one) and
    stages, a list of {name, kind, dir, state, loss, seconds, result}.

    Raises:
        UserError: the folder does not exist (`runs` itself may be missing: then there are none).
    """
    if not folder.exists():
        if folder == Path("runs"):
            return []
        raise UserError("no such folder", where=str(folder))
    if (folder / "run.json").exists():
        return [describe(folder)]
    found = [describe(path.parent) for path in folder.glob("*/run.json")]
    return sorted(found, key=lambda run: run["updated"], reverse=True)


def describe(path: Path) -> dict[str, Any]:
    """One run, from its files."""
    run, facts = RunDir(path), read_json(path / "run.json")
    stages = []
    for stage in run.stages():
        status = run.status(stage["dir"])
        stages.append(
            {
                **stage,
                "state": status["state"],
                "loss": last_loss(path / stage["dir"]),
                "seconds": status.get("seconds"),
                "result": status.get("result") or {},
            }
        )
    updated = max([_changed(path / s["dir"] / "status.json") for s in stages], default="")
    updated = max(updated, str(facts.get("updated", "")))
    losses = [s["loss"] for s in stages if s["loss"] is not None]
    return {
        "path": str(path),
        "name": facts.get("name", path.name),
        "state": overall([stage["state"] for stage in stages]),
        "updated": updated,
        "age": _age(updated),
        "loss": losses[-1] if losses else None,
        "stages": stages,
    }


def last_loss(stage_dir: Path) -> float | None:
    """The last held-out loss of a stage, else its last training loss."""
    rows = read_rows(stage_dir / "metrics.jsonl")
    for name in ("val/loss", "train/loss"):
        values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        if values:
            return float(values[-1])
    return None


def overall(states: list[str]) -> str:
    """One word for a run: what goes on, else what went wrong, else how far it is."""
    for word in ("running", "failed", "interrupted"):
        if word in states:
            return word
    if states and all(state == "done" for state in states):
        return "done"
    return "unfinished" if "done" in states else "pending"


def _changed(path: Path) -> str:
    try:
        stamp = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    except OSError:
        return ""
    return stamp.isoformat(timespec="seconds")


def _age(updated: str) -> float | None:
    try:
        then = datetime.fromisoformat(updated)
    except ValueError:
        return None
    return max(0.0, (datetime.now(timezone.utc) - then).total_seconds())
