"""`kllm runs ls`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def build_ls() -> Callable[..., Any]:
    """The callback of `kllm runs ls`."""

    def command(
        folder: Annotated[
            str, typer.Argument(metavar="[FOLDER]", help="Where the runs are.", show_default=False)
        ] = "runs",
        as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, for scripts.")] = False,
    ) -> None:
        """List the runs of a folder, newest first: state, stages, last figures."""
        from kllm.observe import units
        from kllm.observe.console import make_reporter
        from kllm.run.listing import find_runs

        found = find_runs(Path(folder))
        if as_json:
            typer.echo(json.dumps(found, ensure_ascii=False))
        elif not found:
            typer.echo(f"no runs in {folder}; start one with `kllm run --recipe quickstart`", err=True)
        else:

            def age(run: dict[str, Any]) -> str:
                return "?" if run["age"] is None else f"{units.age(run['age'])} ago"

            columns = ("run", "state", "stages", "updated", "result")
            rows = [(r["path"], r["state"], _stages(r["stages"]), age(r), _result(r)) for r in found]
            make_reporter().table("", columns, rows)

    return command


def _stages(stages: list[dict[str, Any]]) -> str:
    done = sum(stage["state"] == "done" for stage in stages)
    current = next((stage["name"] for stage in stages if stage["state"] != "done"), None)
    return f"{done}/{len(stages)}" + (f" (next: {current})" if current else "")


def _result(run: dict[str, Any]) -> str:
    """The figures that matter: each evaluation's score, else the last held-out loss, else any number."""
    scores: dict[str, str] = {}
    numbers: dict[str, float] = {}
    for stage in run["stages"]:
        for name, value in stage["result"].items():
            if isinstance(value, dict) and isinstance(value.get("accuracy"), (int, float)):
                scores[name] = f"{name} {100 * value['accuracy']:.1f}%"
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers[name] = value
    best = [name for name in ("val/loss", "val/bpb") if name in numbers] or list(numbers)[-2:]
    return "  ".join(list(scores.values()) or [f"{name} {numbers[name]:.4g}" for name in best])
