"""The folder of a run: one lock, the state of each stage, the events; nothing is ever deleted.

    runs/NAME/  run.json  recipe.yaml  recipe.resolved.yaml  events.jsonl  01-tokenizer/ 02-pretrain/ ...

A stage's state is in its status.json: running, done, failed or interrupted. `running` with a process
that no longer exists was killed: it counts as interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from kllm.config.recipe import Recipe, stage_kind
from kllm.errors import KllmError
from kllm.files import io_errors, write_json, write_text

try:
    import fcntl
except ImportError:  # Windows has no flock; runs are not locked there
    fcntl = None  # type: ignore[assignment]

STATES = ("pending", "running", "interrupted", "failed", "done")


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} if there is none or it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def alive(pid: int) -> bool:
    """A process with this id runs on this machine; one that ended but was not waited for does not."""
    if pid <= 0:
        return False
    with contextlib.suppress(OSError, IndexError):
        # in a container nobody may reap orphans, and signal 0 still finds them
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError as e:
        return e.errno == errno.EPERM
    return True


def move_aside(path: Path, into: Path | None = None) -> Path | None:
    """Renames `path` to the first free NAME.old-N, beside it or in `into`; None if there is nothing."""
    if not path.exists():
        return None
    place = into or path.parent
    n = 1
    while (aside := place / f"{path.name}.old-{n}").exists():
        n += 1
    with io_errors(path):
        place.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
    return aside


class RunDir:
    """Reads and writes the files of one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd: int | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def create(self) -> None:
        """Makes the folder; a read-only place is a one-line KllmError."""
        with io_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self, wait: float = 2.0) -> Iterator[int | None]:
        """Holds the run for this process; yields the descriptor for stages' processes to inherit.

        Args:
            wait: seconds to wait for a process that is just ending.

        Raises:
            KllmError: another process holds it; the message names its id.
        """
        self.create()
        if fcntl is None:
            yield None
            return
        with io_errors(self.path):
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._acquire(fd, wait)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield fd
        finally:
            os.close(fd)  # closing gives the lock up, unless a stage's process still holds it

    def _acquire(self, fd: int, wait: float) -> None:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as e:
                if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise KllmError(f"cannot lock the run: {e.strerror}", where=str(self.path)) from e
            if time.monotonic() > deadline:
                pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                raise KllmError(
                    f"this run is in use by process {pid}",
                    where=str(self.path),
                    hint="wait for it, stop it, or give another --out",
                )
            time.sleep(0.05)

    def adopt(self, recipe: Recipe) -> None:
        """Renames stage folders whose number changed because stages were put in or taken out."""
        wanted = {recipe.dirname(stage.name): stage.name for stage in recipe.stages}
        for dirname, name in wanted.items():
            if (self.path / dirname).exists():
                continue
            others = [p for p in self.path.glob(f"[0-9][0-9]-{name}") if p.name not in wanted]
            if len(others) == 1:
                with io_errors(self.path):
                    others[0].rename(self.path / dirname)

    def write_recipe(self, recipe: Recipe, given: str, resolved: str, argv: list[str] | None = None) -> None:
        """recipe.yaml as given, recipe.resolved.yaml, and run.json with versions, machine and command."""
        write_text(self.path / "recipe.yaml", given)
        write_text(self.path / "recipe.resolved.yaml", resolved)
        old = read_json(self.path / "run.json")
        facts = {
            "format": 1,
            "name": recipe.name,
            "created": old.get("created") or now(),
            "updated": now(),
            "command": shlex.join(argv or ["kllm", *sys.argv[1:]]),
            "seed": recipe.seed,
            "device": recipe.device,
            "nproc": recipe.nproc,
            **machine(),
            "stages": [
                {"name": s.name, "kind": stage_kind(s), "dir": recipe.dirname(s.name)} for s in recipe.stages
            ],
        }
        write_json(self.path / "run.json", facts)

    def stages(self) -> list[dict[str, str]]:
        """name, kind and dir of the stages that run.json lists."""
        listed = read_json(self.path / "run.json").get("stages")
        return listed if isinstance(listed, list) else []

    def retire(self, stage_dir: str) -> Path | None:
        """Moves a stage's folder to old/, where no reader of the run takes it for a stage."""
        return move_aside(self.path / stage_dir, self.path / "old")

    @property
    def memo(self) -> Path:
        """Where hashes of files are remembered."""
        return self.path / "hashes.json"

    def status(self, stage_dir: str) -> dict[str, Any]:
        """status.json of a stage, with its true `state`: pending if it never began, interrupted if killed."""
        status = read_json(self.path / stage_dir / "status.json")
        state = status.get("state")
        if state not in STATES:
            return {"state": "pending"}
        if state == "running" and not (status.get("host") == platform.node() and alive(status.get("pid", 0))):
            return {**status, "state": "interrupted", "error": "the process was killed"}
        return status

    def write_status(self, stage_dir: str, status: Mapping[str, Any]) -> None:
        """Replaces status.json in one step."""
        write_json(self.path / stage_dir / "status.json", dict(status))

    def event(self, event: str, stage: str | None = None, **facts: Any) -> None:
        """Appends one line to events.jsonl."""
        row = {"time": now(), "event": event, **({"stage": stage} if stage else {}), **facts}
        with io_errors(self.path), (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def machine() -> dict[str, Any]:
    """Versions and hardware, without importing what is heavy."""
    versions = {}
    for package in ("kllm", "torch", "tokenizers", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }
