"""What a stage's result depends on, and what changed since it was made.

A stage's identity is its resolved section (without `name` and `log`), the seed, the content of its
inputs and of its data files, and a code version per kind. Device and process count are left out: they
change speed, not meaning. Contents are hashed, so a touched file is not a changed file; hashes are
remembered by path, size and time in the run's `hashes.json`, so an unchanged one is not read twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kllm.config.base import Section
from kllm.config.dump import plain
from kllm.config.recipe import stage_kind
from kllm.config.stages import STAGES, DistillStage, DpoStage, Stage
from kllm.data.sources import content_hash, is_builtin
from kllm.errors import UserError
from kllm.eval.names import task_data
from kllm.files import write_json
from kllm.run.rundir import read_json

CODE_VERSIONS = dict.fromkeys(STAGES, 1)
"""Raised by hand when a stage of this kind would give another result from the same inputs."""

IGNORED = ("log", "name")
_CARDS = frozenset({"README.md"})
Identity = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """One difference: `kind` is config, inputs, data or code; before and now as text."""

    kind: str
    key: str
    before: Any
    now: Any
    origin: str = ""

    def __str__(self) -> str:
        if self.kind == "config":
            text = f"{self.key}: {_text(self.before)} -> {_text(self.now)}"
        elif self.kind == "code":
            text = f"kllm's own code of this stage changed ({self.before} -> {self.now})"
        else:
            what = "data" if self.kind == "data" else "input"
            gone, new = self.before is None, self.now is None
            verb = "is new" if gone else "is no longer used" if new else "changed"
            text = f"{what} {self.key} {verb}"
        return f"{text} ({self.origin})" if self.origin and self.origin != "default" else text


def identity(
    stage: Stage,
    *,
    seed: int,
    inputs: Mapping[str, str],
    data: Mapping[str, str],
) -> Identity:
    """What the stage's result depends on: {"config": {...}, "inputs": ..., "data": ..., "code": ...}.

    Args:
        inputs: `model` and `tokenizer` -> content hash.
        data: source path -> content hash.
    """
    kind = stage_kind(stage)
    config = {k: v for k, v in flatten(stage).items() if k.split(".")[0] not in IGNORED}
    config["seed"] = seed
    code = {kind: CODE_VERSIONS.get(kind, 1)}
    return {"config": config, "inputs": dict(inputs), "data": dict(data), "code": code}


def flatten(section: Section, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> plain value of every set option."""
    flat: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif value is not None:
            flat[prefix + name] = plain(value)
    return flat


def digest(what: Identity) -> str:
    """The fingerprint: a hash of an identity."""
    text = json.dumps(what, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def changes(before: Identity, now: Identity, stage: str, origins: Mapping[str, str]) -> list[Change]:
    """What differs, config first; the origin of a changed option is where its present value stands.

    Identities are compared as JSON gives them back, so that a stored one equals its source.
    """
    now = json.loads(json.dumps(now, default=str))
    found = []
    for kind in ("config", "inputs", "data", "code"):
        old, new = before.get(kind, {}), now.get(kind, {})
        for key in [*new, *(k for k in old if k not in new)]:
            if old.get(key) != new.get(key):
                origin = origins.get(f"{stage}.{key}", "") if kind == "config" else ""
                origin = origin or (origins.get("seed", "") if key == "seed" else "")
                found.append(Change(kind, key, old.get(key), new.get(key), origin))
    return found


def data_paths(stage: Stage) -> list[str]:
    """Every data source that the stage reads: training, validation, evaluation files, templates."""
    paths = [source.path for source in getattr(stage, "data", [])]
    dataset = getattr(stage, "dataset", None)
    paths += [source.path for source in dataset.val_data] if dataset else []
    if isinstance(stage, DpoStage | DistillStage) and samples_answers(stage):
        paths += [source.path for source in stage.rollout.prompts]
    if isinstance(stage, DistillStage):
        paths += stage.prompts
    if getattr(stage, "quant", None) and getattr(stage, "calibrate", None):
        paths.append(stage.calibrate)  # type: ignore[union-attr]
    for task in getattr(stage, "tasks", []):
        paths += task_data(task)
    return list(dict.fromkeys(paths))


def samples_answers(stage: DpoStage | DistillStage) -> bool:
    """Whether answers are sampled from the model while it trains."""
    return stage.online if isinstance(stage, DpoStage) else stage.distill.on_policy > 0


def templates(stage: Stage) -> list[str]:
    """Jinja files that the stage reads."""
    given = getattr(stage, "chat_template", None) or getattr(
        getattr(stage, "tokenizer", None), "chat_template", None
    )
    return [given] if given else []


def hash_data(stage: Stage, memo: Path) -> dict[str, str]:
    """Source -> content hash, for every source of the stage.

    Raises:
        UserError: a source does not exist.
    """
    hashes = {path: content_hash(path, memo=None if is_builtin(path) else memo) for path in data_paths(stage)}
    for path in templates(stage):
        try:
            hashes[path] = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
        except OSError as e:
            raise UserError(f"cannot read the chat template: {e.strerror}", where=path) from e
    return hashes


def hash_directory(directory: Path, memo: Path) -> str:
    """Hash of a model or tokenizer directory (or file): names and contents, model cards left out."""
    known = read_json(memo)
    total = hashlib.blake2b(digest_size=16)
    fresh = False
    files = [directory] if directory.is_file() else sorted(p for p in directory.iterdir() if p.is_file())
    for file in files:
        if file.name in _CARDS or file.name.startswith("."):
            continue
        status = file.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = known.get(str(file.resolve()))
        if not (isinstance(entry, list) and entry[:3] == stamp):
            entry = [*stamp, _hash_file(file)]
            known[str(file.resolve())] = entry
            fresh = True
        total.update(f"{file.name}:{entry[3]}\n".encode())
    if fresh:
        write_json(memo, known)
    return total.hexdigest()


def _hash_file(file: Path) -> str:
    whole = hashlib.blake2b(digest_size=16)
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


def _text(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False, default=str)
