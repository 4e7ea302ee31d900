"""Sandbox: Python for a model's code, with variables that live on, in a process of its own that is locked."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from types import TracebackType

from kllm.errors import KllmError
from kllm.tools.sandbox.process import Limits, Worker, check_platform
from kllm.tools.sandbox.run import Function, Ran, Run

MAX_CODE = 64 << 10


class Sandbox:
    """A conversation's Python. One run at a time; not for two threads at once.

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

    def start(self) -> None:
        """Starts the worker if there is none. Raises UserError, one line, where it cannot be locked."""
        if self._closed:
            raise KllmError("this sandbox is closed")
        if self._worker is not None:
            return
        if not self.unsafe:
            check_platform()
        self._worker = Worker(list(self.functions), self.limits, self.unsafe)
        self.startup_seconds = self._worker.startup_seconds
        self.lock_seconds = self._worker.lock_seconds

    def run(self, code: str, interrupted: Callable[[], bool] | None = None) -> Ran:
        """Runs `code` after all that ran before it in this conversation.

        `interrupted` is asked about every 20 ms; True kills the worker. Raises only what `start` does, and
        what is no Exception (Ctrl-C): then too the worker is gone.
        """
        if len(code.encode("utf-8", "surrogatepass")) > MAX_CODE:
            error = f"the code is too long: over {MAX_CODE >> 10} kB"
            return Ran(error + "\n", error, False, 0.0)
        self.start()
        assert self._worker is not None
        self._runs += 1
        try:
            ran = Run(self._worker, self.functions, self.limits, self._runs).follow(code, interrupted)
        except BaseException:
            self._drop()
            raise
        if ran.lost:
            self._worker = None
        return ran

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def close(self) -> None:
        """Kills the worker and removes its files. Idempotent."""
        self._closed = True
        self._drop()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
