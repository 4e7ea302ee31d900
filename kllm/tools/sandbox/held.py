"""What a worker holds in its parent: a process, pipes, a folder; let go of once, whoever does it and when."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from kllm.errors import KllmError
from kllm.tools.sandbox.scratch import make_scratch, remove_scratch

_ONE_PIPE = 1 << 20  # more than any pipe holds
_CHUNK = 1 << 16


class WorkerClosed(KllmError):
    """The worker was killed from here, perhaps by another thread."""


def return_code(process: subprocess.Popen[bytes]) -> int | None:
    """A process's, None while it lives. It is not reaped: its number stays its own until `Held.close`."""
    if process.returncode is not None or not hasattr(os, "waitid"):  # macOS before Python 3.13
        return process.poll()
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return process.poll()
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the group, then reaps its leader: the other way round, the number may be somebody else's."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Held:
    """Whatever is used of it is used within `use`: once closed, the same numbers may be another worker's.

    Attributes:
        process: once it is started.
        unread: output that was in the pipe at the end.
        ended: set at the end.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.unread = b""
        self.ended = threading.Event()
        self._lock = threading.RLock()  # a signal's handler may close what its thread uses
        self._closed = False
        self._owner = os.getpid()
        self._last = contextlib.ExitStack()  # what is to be done at the end, the latest first
        self._last.callback(self.ended.set)
        self._theirs: list[int] = []

    def make_scratch(self) -> Path:
        """The worker's folder. Raises OSError."""
        path, lock = make_scratch()
        self._last.callback(os.close, lock)
        self._last.callback(remove_scratch, path)
        return path

    def make_pipes(self) -> tuple[int, int, int]:
        """The parent's ends: of requests, replies and output. Raises OSError."""
        ours = []
        for i in range(3):
            ends = os.pipe()
            mine, theirs = ends if i else ends[::-1]
            self._last.callback(os.close, mine)
            self._theirs.append(theirs)
            os.set_blocking(mine, False)
            ours.append(mine)
        self._last.callback(self._keep_unread, ours[2])
        return ours[0], ours[1], ours[2]

    def _keep_unread(self, output: int) -> None:
        with contextlib.suppress(OSError):
            while len(self.unread) < _ONE_PIPE and (chunk := os.read(output, _CHUNK)):
                self.unread += chunk

    def start(self, start: Callable[[int, int, int], subprocess.Popen[bytes]]) -> None:
        """Starts the process, given the worker's ends of the pipes; these are closed here after.

        Raises what `start` does; WorkerClosed if all this is closed meanwhile: then the process is ended.
        """
        with self.use():
            theirs, self._theirs = self._theirs, []
        try:
            process = start(*theirs)
        finally:
            for fd in theirs:
                os.close(fd)
        with self._lock:
            if not self._closed:
                self.process = process
                self._last.callback(_end, process)
                return
        _end(process)
        raise WorkerClosed("the sandbox was closed")

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """A block in which nobody closes; raises WorkerClosed if somebody has."""
        with self._lock:
            if self._closed:
                raise WorkerClosed("the sandbox was closed")
            yield

    def close(self) -> None:
        """Ends the process, closes the pipes, removes the folder. Idempotent; ends what was interrupted."""
        if os.getpid() != self._owner:  # a forked child of ours that ends; another thread may have the lock
            return
        with self._lock:
            self._closed = True
            theirs, self._theirs = self._theirs, []
            for fd in theirs:
                os.close(fd)
            self._last.close()
