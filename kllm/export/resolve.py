"""One resolver for everything that can stand where a model is expected. No torch: paths only."""

from __future__ import annotations

import re
from pathlib import Path

from kllm.errors import UserError

COMPLETE = "COMPLETE"


def complete_checkpoints(stage_dir: Path) -> list[Path]:
    """Whole checkpoints of a stage, oldest first; a torn one has no COMPLETE file."""
    found = (stage_dir / "checkpoints").glob("step-*")
    return sorted(p for p in found if (p / COMPLETE).exists())


def _stage_result(stage_dir: Path) -> Path | None:
    if (stage_dir / "final" / "config.json").exists():
        return stage_dir / "final"
    checkpoints = complete_checkpoints(stage_dir)
    return checkpoints[-1] if checkpoints else None


def _last_stage(run_dir: Path) -> Path | None:
    """The result of the last stage that leaves a model: final if it has one, else its last checkpoint."""
    for stage_dir in sorted(run_dir.glob("[0-9][0-9]-*"), reverse=True):
        if result := _stage_result(stage_dir):
            return result
    return None


def resolve(path: str | Path) -> Path:
    """The model directory behind a run, a stage, a checkpoint, a Hugging Face directory or a hub id.

    Raises:
        UserError: nothing there, or nothing in it yet.
    """
    directory = Path(path)
    if not directory.exists():
        return _from_hub(str(path))
    if directory.is_file():
        raise UserError("is a file, not a model directory", where=str(path))
    if (directory / "config.json").exists():
        return directory
    found = _stage_result(directory) or _last_stage(directory)
    if found is None:
        what = "the run has no trained model yet" if (directory / "run.json").exists() else "no model in it"
        raise UserError(
            what, where=str(path), hint="give a run, a stage, a checkpoint or a Hugging Face directory"
        )
    return found


def resolve_tokenizer(path: str | Path) -> Path:
    """The directory with tokenizer files behind a run, a stage, a model or a tokenizer directory."""
    directory = Path(path)
    if not directory.exists():
        return _from_hub(str(path))
    for candidate in (directory, directory / "final"):
        if (candidate / "tokenizer.json").exists() or (candidate / "vocab.json").exists():
            return candidate
    stages = sorted(directory.glob("[0-9][0-9]-*/final"), reverse=True)
    for candidate in stages:
        if (candidate / "tokenizer.json").exists():
            return candidate
    raise UserError("no tokenizer.json in it", where=str(path), hint="give a directory that has one")


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise UserError("no such file or directory", where=name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            "no such directory, and hub ids need huggingface_hub",
            where=name,
            hint="pip install 'kllm[hub]', or give a local directory",
        ) from None
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # the hub raises many kinds; all mean the same to the user
        reason = str(e).splitlines()[0][:200]
        raise UserError(f"no such directory, and the hub gave: {reason}", where=name) from None
