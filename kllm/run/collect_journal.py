"""The answers that came, one JSON line each, so that no answer is asked for twice.

A line is written whole and at once handed to the system, so a killed process loses none; every few seconds
it is forced to the disk, so that a lost machine loses little. A torn last line is cut off when the file is
opened again. What stands here is raw: rules may be changed and applied again without asking anybody.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from kllm.errors import KllmError, UserError
from kllm.files import io_errors

try:
    import fcntl
except ImportError:  # Windows has no flock; two processes at one file are not noticed there
    fcntl = None  # type: ignore[assignment]

_SYNC_SECONDS = 2.0
_FIELDS = {"finish_reason", "prompt_tokens", "completion_tokens"}
_START = b'{"id": "'


@dataclass(frozen=True)
class Reply:
    """An answer as the teacher gave it: the assistant's message, why it ended, and its size in tokens."""

    message: dict[str, Any]
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """Answers by (request, sample). A context: the file is locked and open inside.

    Raises:
        UserError: the file is something else.
        KllmError: another process has it, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.foreign = 0
        """Lines that could not be read."""
        self._places: dict[tuple[str, int], int] = {}
        self._synced = 0.0

    def __enter__(self) -> Journal:
        with io_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("a+b")
        try:
            self._lock()
            self._scan()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with io_errors(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def has(self, request: str, sample: int) -> bool:
        """Whether this answer came already."""
        return (request, sample) in self._places

    def get(self, request: str, sample: int) -> Reply | None:
        """The answer, None if there is none yet."""
        place = self._places.get((request, sample))
        if place is None:
            return None
        self._file.seek(place)
        row = json.loads(self._file.readline())
        return Reply(row["message"], row["finish_reason"], row["prompt_tokens"], row["completion_tokens"])

    def add(self, request: str, sample: int, reply: Reply) -> None:
        """Writes an answer.

        Raises:
            KllmError: no space.
        """
        row = {
            "id": request,
            "sample": sample,
            "message": reply.message,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
        line = json.dumps(row).encode() + b"\n"  # ASCII: half a surrogate pair can be kept as well
        with io_errors(self.path):
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self._places[request, sample] = place

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "another process collects into this file"
            raise KllmError(message, where=str(self.path), hint="wait for it, or give another file") from None
        except OSError:
            return  # a file system without locks

    def _scan(self) -> None:
        """Finds what is there; cuts off a last line that was not written whole."""
        self._file.seek(0)
        place, torn = 0, False
        for line in self._file:
            torn = not line.endswith(b"\n")
            if torn:
                break
            try:
                row = json.loads(line)
                key = (str(row["id"]), int(row["sample"]))
                known = isinstance(row["message"], dict) and row.keys() >= _FIELDS
            except (ValueError, LookupError, TypeError):
                known = False
            if known:
                self._places.setdefault(key, place)
            else:
                self.foreign += 1
            place += len(line)
        # a machine that was switched off may leave zeros where the line was to be
        begun = torn and (line[: len(_START)] == _START[: len(line)] or not line.strip(b"\0"))
        ours = bool(self._places) or begun
        if (self.foreign or torn) and not ours:
            raise UserError("this is no file of collected answers", where=str(self.path))
        if torn:
            self._file.truncate(place)
