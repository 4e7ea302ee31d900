"""Sandbox: Python for a model's code, with variables that live on, in a process of its own that is locked."""

from __future__ import annotations

import keyword
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from kllm.errors import KllmError
from kllm.tools.sandbox.process import Limits, Worker, check_platform
from kllm.tools.sandbox.run import Function, Ran, Run

MAX_CODE = 64 << 10


class Sandbox:
    """A conversation's Python. One run at a time; another thread may close it meanwhile.

    Args:
        functions: names the code may call; each gets (args, kwargs), of JSON's types, in this process.
        limits: what one run may use.
        unsafe: no lock, only limits: the code may do whatever the user may.
    """

    def __init__(
        self,
        functions: Mapping[str, Function] | None = None,
        *,
        limits: Limits | None = None,
        unsafe: bool = False,
    ) -> None:
        self.functions = dict(functions or {})
        for name in self.functions:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"{name!r} is not a name Python code can call")
        self.limits = limits or Limits()
        self.unsafe = unsafe
        self.startup_seconds: float | None = None
        self.lock_seconds: float | None = None
        self._worker: Worker | None = None
        self._runs = 0
        self._closed = False
        self._lock = threading.RLock()  # a signal's handler may close

    def start(self) -> None:
        """Starts the worker if there is none. Raises UserError, one line, where it cannot be locked."""
        self._started()

    def _started(self) -> Worker:
        if self._closed:
            raise KllmError("this sandbox is closed")
        if (worker := self._worker) is not None:
            return worker
        if not self.unsafe:
            check_platform()
        worker = Worker(list(self.functions), self.limits, self.unsafe)
        with self._lock:
            if not self._closed:
                self._worker = worker
                self.startup_seconds, self.lock_seconds = worker.startup_seconds, worker.lock_seconds
                return worker
        worker.kill()
        raise KllmError("this sandbox was closed while it started")

    def run(self, code: str, interrupted: Callable[[], bool] | None = None) -> Ran:
        """Runs `code` after all that ran before it in this conversation.

        `interrupted` is asked about every 20 ms; True kills the worker. Raises only what `start` does, and
        what is no Exception (Ctrl-C): then too the worker is gone.
        """
        if len(code.encode("utf-8", "surrogatepass")) > MAX_CODE:
            error = f"the code is too long: over {MAX_CODE >> 10} kB"
            return Ran(error + "\n", error, False, 0.0)
        worker = self._started()
        self._runs += 1
        try:
            ran = Run(worker, self.functions, self.limits, self._runs).follow(code, interrupted)
        except BaseException:
            self._drop()
            raise
        if ran.lost:
            self._worker = None
        return ran

    def _drop(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()

    def close(self) -> None:
        """Kills the worker and removes its files; a run in another thread ends. Idempotent."""
        with self._lock:
            self._closed = True
        self._drop()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
