"""One resolver for everything that can stand where a model is expected. No torch: paths only."""

from __future__ import annotations

import json
from pathlib import Path

from kllm.errors import UserError

COMPLETE = "COMPLETE"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILES = (".gguf", ".pth", ".pt", ".ckpt", ".bin")
"""Single files that hold a whole model."""


def complete_checkpoints(stage_dir: Path) -> list[Path]:
    """Whole checkpoints of a stage, oldest first; a torn one has no COMPLETE file."""
    found = (stage_dir / "checkpoints").glob("step-*")
    return sorted(p for p in found if (p / COMPLETE).exists())


def _stage_result(stage_dir: Path) -> Path | None:
    if (stage_dir / "final" / "config.json").exists():
        return stage_dir / "final"
    # a checkpoint of an adapter holds no model
    checkpoints = [p for p in complete_checkpoints(stage_dir) if (p / "config.json").exists()]
    return checkpoints[-1] if checkpoints else None


def _last_stage(run_dir: Path) -> Path | None:
    """The result of the last stage that leaves a model: final if it has one, else its last checkpoint."""
    exported = None
    for stage_dir in sorted(run_dir.glob("[0-9][0-9]-*"), reverse=True):
        if result := _stage_result(stage_dir):
            if not _is_export(stage_dir):
                return result
            exported = exported or result
    return exported


def _is_export(stage_dir: Path) -> bool:
    """What an export stage wrote may be a rounded copy: the run's model is the stage's before it."""
    try:
        return json.loads((stage_dir / "status.json").read_text(encoding="utf-8")).get("kind") == "export"
    except (OSError, ValueError, AttributeError):
        return False


def resolve(path: str | Path, *, weights: bool = True) -> Path:
    """What holds the model behind a run, a stage, a checkpoint, a folder, a file or a hub id.

    Args:
        weights: False fetches no more than the config of a hub id.

    Returns:
        A Hugging Face directory, or a file of one of the kinds `MODEL_FILES`.

    Raises:
        UserError: nothing there, or nothing in it yet.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return _from_hub(str(path), "model" if weights else "config")
    if place.is_file():
        whole = place.suffix in MODEL_FILES
        if whole and not (place.suffix == ".bin" and (place.parent / "config.json").exists()):
            return place
        if (place.parent / "config.json").exists():
            return place.parent  # a file of a model directory, named by its weights or config
        raise UserError("is a file, not a model", where=str(path), hint=f"kinds: {', '.join(MODEL_FILES)}")
    if (place / "config.json").exists():
        return place
    found = _stage_result(place) or _last_stage(place) or _only_file(place)
    if found is None:
        what = "the run has no trained model yet" if (place / "run.json").exists() else "no model in it"
        hint = "give a run, a stage, a checkpoint, a Hugging Face directory or a file"
        if find_adapter(place) is not None:
            what = f"{what}, only an adapter"
            hint = f"kllm convert {path} OUT --merge makes a model of it"
        raise UserError(what, where=str(path), hint=hint)
    return found


def find_adapter(folder: Path) -> Path | None:
    """The PEFT directory in a folder, a run (its last stage's), a stage or a checkpoint.

    A stage that has not ended gives that of its newest checkpoint.
    """
    for place in (folder, *sorted(folder.glob("[0-9][0-9]-*"), reverse=True)):
        newest = complete_checkpoints(place)[-1:]
        for found in (place, *(p / "adapter" for p in (place, place / "final", *newest))):
            if (found / ADAPTER_CONFIG).is_file():
                return found
    return None


def _only_file(directory: Path) -> Path | None:
    files = sorted(f for f in directory.iterdir() if f.suffix in MODEL_FILES and f.is_file())
    if len(files) > 1:
        names = ", ".join(f.name for f in files[:4])
        raise UserError(f"several models in it: {names}", where=str(directory), hint="name one of the files")
    return files[0] if files else None


def resolve_tokenizer(path: str | Path) -> Path:
    """The directory with tokenizer files behind a run, a stage, a model or a tokenizer directory.

    A GGUF file holds its tokenizer and is returned as it is.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return _from_hub(str(path), "tokenizer")
    for candidate in (place, place / "final"):
        if (candidate / "tokenizer.json").exists() or (candidate / "vocab.json").exists():
            return candidate
    stages = sorted(place.glob("[0-9][0-9]-*/final"), reverse=True)
    for candidate in stages:
        if (candidate / "tokenizer.json").exists():
            return candidate
    file = place if place.is_file() else _only_file(place)
    if file is not None and file.suffix == ".gguf":
        return file
    if file is not None and (beside := tokenizer_beside(file)) is not None:
        return beside
    raise UserError("no tokenizer.json in it", where=str(path), hint="give a directory that has one")


def tokenizer_beside(place: Path) -> Path | None:
    """The tokenizer directory of a model: itself, or near a model file (MiniMind has it in ../model)."""
    folders = [place] if place.is_dir() else [place.parent, place.parent.parent / "model"]
    return next((folder for folder in folders if _has_tokenizer(folder)), None)


def _has_tokenizer(folder: Path) -> bool:
    pair = ("vocab.json", "merges.txt")  # GPT-2's form
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in pair)


def _from_hub(name: str, what: str) -> Path:
    """OWNER/NAME[@REVISION], or one file of it, OWNER/NAME/FILE.gguf, fetched into the hub's own cache."""
    if name.endswith(MODEL_FILES[1:]):
        raise UserError("no such file or directory", where=name, hint="check the path")
    from kllm.export.hub import fetch

    return fetch(name, what)
