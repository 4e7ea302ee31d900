"""What a stage needs now: nothing, a start, a continuation, or another run, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kllm.config.recipe import Recipe, stage_kind
from kllm.config.stages import STAGES
from kllm.run.fingerprint import Change, Identity, changes, hash_data, hash_directory, identity
from kllm.run.inputs import Input, find_inputs
from kllm.run.rundir import RunDir


@dataclass(frozen=True)
class Decision:
    """action: skip (done), run (never began), resume (unfinished), rerun (changed or forced), wait (an
    input of this run does not exist yet); reason: for people; changes: what differs from last time."""

    name: str
    dirname: str
    action: str
    reason: str
    state: str
    inputs: dict[str, Input] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)


def present_identity(
    recipe: Recipe, name: str, run: RunDir, inputs: Mapping[str, Input]
) -> tuple[Identity, dict[str, str]]:
    """What the stage's result would depend on if it ran now, and the hashes of its inputs."""
    hashes = {w: hash_directory(i.directory, run.memo) for w, i in inputs.items() if i.directory}
    stage = recipe.stage(name)
    data = hash_data(stage, run.memo)
    return identity(stage, seed=recipe.seed, inputs=hashes, data=data), hashes


def decide(
    recipe: Recipe,
    name: str,
    run: RunDir,
    origins: Mapping[str, str],
    *,
    force: bool = False,
    fetch: bool = True,
) -> Decision:
    """Compares what is on disk with what the recipe asks for. Writes nothing but remembered hashes.

    Raises:
        UserError: an input or a data file that does not exist.
    """
    dirname = recipe.dirname(name)
    status = run.status(dirname)
    state = status["state"]
    inputs = find_inputs(recipe, name, run.path, fetch=fetch)

    def decision(action: str, reason: str, found: list[Change] | None = None) -> Decision:
        return Decision(name, dirname, action, reason, state, inputs, found or [], status)

    missing = list(dict.fromkeys(i.stage for i in inputs.values() if i.stage and i.directory is None))
    if missing:
        return decision("wait", f"needs {', '.join(missing)}")
    if state == "pending":
        return decision("run", "never ran")
    if force:
        return decision("rerun", "forced")
    if any(i.directory is None for i in inputs.values()):
        return decision("wait", "its hub input was not fetched")
    now, _ = present_identity(recipe, name, run, inputs)
    found = changes(status.get("identity", {}), now, name, origins)
    if found:
        return decision("rerun", "; ".join(map(str, found)), found)
    if state == "done":
        final = run.path / dirname / "final"
        kind = stage_kind(recipe.stage(name))
        if (STAGES[kind].produces or kind == "export") and not final.is_dir():
            return decision("rerun", "its result is gone")
        return decision("skip", "done, unchanged")
    reasons = {"running": "is running", "interrupted": "was interrupted", "failed": "failed"}
    return decision("resume", reasons[state])
