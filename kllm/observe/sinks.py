"""Where metric rows go: always a jsonl file; TensorBoard, wandb and SwanLab when named.

A row is `{"step": int, name: number, ...}` with the names of `metrics.METRICS`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kllm.errors import UserError
from kllm.files import io_errors, write_bytes


class Sink(Protocol):
    """Takes rows of metrics."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def clean(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


class JsonlSink:
    """Appends one JSON object a line.

    Every row reaches the operating system at once (a killed process loses none); `flush` also
    forces it to disk and must be called before a checkpoint of the same step is declared complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self._end_torn_line()
            self._file = self.path.open("a", encoding="utf-8")
        with io_errors(self.path):
            self._file.write(json.dumps(clean(row), ensure_ascii=False) + "\n")
            self._file.flush()

    def _end_torn_line(self) -> None:
        """A line torn by a crash must not swallow the row written after it."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        with self.path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def truncate_after(self, step: int) -> int:
        """Drops rows beyond `step` and torn lines, atomically; returns how many lines went.

        For an exact resume: what the lost steps wrote is written again, neither twice nor never.
        """
        self.close()
        if not self.path.exists():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _keep(line, step)]
        if len(kept) < len(lines):
            write_bytes(self.path, b"".join(kept))
        return len(lines) - len(kept)


def _keep(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("step", 0) <= step


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file; torn or broken lines are left out; no file gives no rows."""
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        k: v for k, v in row.items() if k != "step" and isinstance(v, int | float) and not isinstance(v, bool)
    }


class _CallSink:
    """A sink made of a function that logs and one that ends."""

    def __init__(self, log: Callable[[dict[str, float], int], Any], end: Callable[[], Any]) -> None:
        self._log, self._end = log, end

    def write(self, row: Mapping[str, Any]) -> None:
        if numbers := _numbers(row):
            self._log(numbers, int(row.get("step", 0)))

    def flush(self) -> None:
        """These keep their own buffers."""

    def close(self) -> None:
        self._end()


def _tensorboard(stage_dir: Path, project: str, name: str, config: Mapping[str, Any]) -> Sink:
    _require("tensorboard", "tensorboard")
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(stage_dir / "tensorboard"))

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return _CallSink(log, writer.close)


def _wandb(stage_dir: Path, project: str, name: str, config: Mapping[str, Any]) -> Sink:
    wandb = _require("wandb", "wandb")
    # kept with the stage, so that a resumed stage continues its curve and a fresh one starts another
    kept = stage_dir / "wandb.id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    ident = kept.read_text(encoding="utf-8")
    run = wandb.init(
        project=project, name=name, id=ident, resume="allow", dir=str(stage_dir), config=dict(config)
    )
    return _CallSink(lambda numbers, step: run.log(numbers, step=step), run.finish)


def _swanlab(stage_dir: Path, project: str, name: str, config: Mapping[str, Any]) -> Sink:
    swanlab = _require("swanlab", "swanlab")
    swanlab.init(
        project=project, experiment_name=name, logdir=str(stage_dir / "swanlab"), config=dict(config)
    )
    return _CallSink(lambda numbers, step: swanlab.log(numbers, step=step), swanlab.finish)


_OPTIONAL = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}


def _require(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(
            f"the sink {extra!r} needs a package that is not installed",
            where="log.sinks",
            hint=f"pip install 'kllm[{extra}]'",
        ) from e


class Sinks:
    """The jsonl file and the optional sinks as one."""

    def __init__(self, jsonl: JsonlSink, others: Iterable[Sink] = ()) -> None:
        self.jsonl = jsonl
        self.others = list(others)

    def write(self, row: Mapping[str, Any]) -> None:
        for sink in (self.jsonl, *self.others):
            sink.write(row)

    def flush(self) -> None:
        for sink in (self.jsonl, *self.others):
            sink.flush()

    def close(self) -> None:
        for sink in (self.jsonl, *self.others):
            sink.close()

    def truncate_after(self, step: int) -> int:
        """See `JsonlSink.truncate_after`; the others cannot unwrite."""
        return self.jsonl.truncate_after(step)


def make_sinks(
    stage_dir: Path, names: Iterable[str] = (), *, project: str = "kllm", name: str = "", config: Any = None
) -> Sinks:
    """`stage_dir/metrics.jsonl` plus each named sink; a missing package is a UserError.

    Args:
        names: of tensorboard, wandb, swanlab.
        project, name, config: what the remote services file the run under.
    """
    others = [_OPTIONAL[n](stage_dir, project, name or stage_dir.name, config or {}) for n in names]
    return Sinks(JsonlSink(stage_dir / "metrics.jsonl"), others)


def check_sinks(names: Iterable[str]) -> None:
    """Static check: every named sink's package is installed (without importing it)."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"the sink {name!r} needs a package that is not installed",
                where="log.sinks",
                hint=f"pip install 'kllm[{name}]'",
            )
