"""The process that runs the code: locks itself, then answers one JSON line with another until the pipe ends.

Started by path (`python -I -S -B -X utf8 worker.py REQUESTS REPLIES`, two pipe numbers); standard output
is a pipe to the parent too. Imports nothing of kllm. Whatever the code does to this process, the parent
believes none of it: limits and the lock are the kernel's and the parent's.
"""

from __future__ import annotations

import ast
import base64
import builtins
import contextlib
import importlib.util
import io
import json
import linecache
import os
import resource
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

EXIT_REFUSED = 78  # the lock failed; nothing was run
LAST_LINES = 10
SLICE = 1 << 16


class ToolError(RuntimeError):
    """A function of the parent's side failed or was refused; the text is for the model."""


class Pipes:
    """The three ways out of and into this process, as descriptors nobody closes by accident."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests = os.fdopen(requests, "rb")
        self.replies = replies
        self.output = os.dup(1)
        self.unread: dict[str, Any] | None = None

    def receive(self) -> dict[str, Any] | None:
        """The parent's next message; None at the end."""
        if (unread := self.unread) is not None:
            self.unread = None
            return unread
        line = self.requests.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def send(self, message: dict[str, Any]) -> None:
        write(self.replies, json.dumps(message).encode() + b"\n")

    def put(self, text: str) -> None:
        """Text straight to the output pipe, whatever became of sys.stdout; surrogates as `?`."""
        for start in range(0, len(text), SLICE):
            write(self.output, text[start : start + SLICE].encode("utf-8", "replace"))


def write(fd: int, data: bytes) -> None:
    """All of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Live:
    """Standard output: the first lines go out at once, so that they survive a kill.

    Past `limit` characters it puts plain block buffering in its place, since 10^7 prints at one system
    call each would take the whole time.
    """

    def __init__(self, blocks: io.TextIOWrapper, limit: int) -> None:
        self._blocks = blocks
        self._left = limit

    def write(self, text: str) -> int:
        written = self._blocks.write(text)
        self._left -= written
        if self._left < 0:
            for name in ("stdout", "stderr"):
                if getattr(sys, name, None) is self:
                    setattr(sys, name, self._blocks)
        elif "\n" in text:
            self._blocks.flush()
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks, name)


class Console:
    """A namespace that lives on between runs, and what a run of code in it prints."""

    def __init__(self, pipes: Pipes, functions: list[str], limit: int, cpu_seconds: int) -> None:
        self.pipes = pipes
        self.limit = limit
        self.cpu_seconds = cpu_seconds
        self.calls = 0
        # A module of its own, so that dataclasses, pickle and typing find the classes of the code.
        self.module = types.ModuleType("__main__")
        sys.modules["__main__"] = self.module
        names = self.module.__dict__
        names.update(__builtins__=builtins, ToolError=ToolError)
        names.update({name: self.proxy(name) for name in functions})

    def proxy(self, name: str) -> Callable[..., Any]:
        """A function here that runs in the parent."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.pipes.send({"call": name, "id": self.calls, "args": args, "kwargs": kwargs})
            while (answer := self.pipes.receive()) is not None:
                if answer.get("id") == self.calls:
                    break
                if "code" in answer:  # this run forged its end, and the next one waits
                    self.pipes.unread, answer = answer, None
                    break
            if answer is None:
                raise SystemExit
            if "error" in answer:
                raise ToolError(answer["error"])
            return answer["result"]

        call.__name__ = call.__qualname__ = name
        return call

    def run(self, code: str, number: int) -> str | None:
        """Runs `code`; its prints, value and traceback go to the output. Returns the error in one line."""
        name = f"<run {number}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        blocks = open(self.pipes.output, "w", SLICE, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        # Kept here too: print() in CPython only borrows sys.stdout, which Live replaces meanwhile.
        self.live = Live(blocks, self.limit)
        sys.stdout = sys.stderr = self.live  # type: ignore[assignment]
        shown, error = "", None
        try:
            value = execute(code, name, self.module.__dict__)
            if value is not None:
                builtins._ = value  # type: ignore[attr-defined]
                shown = repr(value) + "\n"
        except BaseException as e:  # SystemExit and KeyboardInterrupt end the run, not the worker
            shown, error = described(e)
        finally:
            for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
                signal.setitimer(timer, 0)
        with contextlib.suppress(Exception):
            blocks.flush()
        self.pipes.put(shown)
        return error

    def allow_time(self) -> None:
        """CPU seconds are counted from here: the soft limit moves, the hard one stays."""
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = int(time.process_time()) + 1 + self.cpu_seconds
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))


def execute(code: str, name: str, namespace: dict[str, Any]) -> Any:
    """Runs `code` and returns the value of its last line, if that is an expression."""
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec", dont_inherit=True), namespace)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), namespace)


def described(error: BaseException) -> tuple[str, str]:
    """The last lines of the traceback, without this file's frames, and the error in one line."""
    try:
        line = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
        report = traceback.TracebackException.from_exception(error)
        strip(report)
        text = "".join(report.format())
    except Exception as e:  # a __str__ that fails, no memory, too deep
        line = text = f"{type(error).__name__} (its text could not be made: {type(e).__name__})"
    return "\n".join(text.rstrip("\n").split("\n")[-LAST_LINES:]) + "\n", line


def strip(report: traceback.TracebackException | None) -> None:
    """Takes this file's frames out of a report and of the errors it came from."""
    while report is not None:
        own = [frame for frame in report.stack if frame.filename not in (__file__, ast.__file__)]
        report.stack = traceback.StackSummary.from_list(own)
        for inner in (report.__cause__, *(getattr(report, "exceptions", None) or ())):
            strip(inner)
        report = report.__context__


def locked(settings: dict[str, Any]) -> float:
    """Takes away what the code must not have; returns the seconds that took, imports apart.

    Raises lock's LockError or whatever else goes wrong.
    """
    spec = importlib.util.spec_from_file_location("lock", settings["lock"])
    assert spec is not None and spec.loader is not None
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    start = time.perf_counter()
    program = settings["program"]
    if sys.platform == "linux":
        lock.die_with_parent()
    lock.set_limits(settings["limits"], strict=program is not None)
    if program is not None:
        time.tzset()  # reads /etc/localtime, once
        readable = [*map(os.path.realpath, sys.path), "/usr/share/zoneinfo"]
        lock.lock(readable, settings["scratch"], base64.b64decode(program))
    return time.perf_counter() - start


def main() -> None:
    """Settings in, ready out; then one run after the other."""
    pipes = Pipes(int(sys.argv[1]), int(sys.argv[2]))
    settings = pipes.receive()
    if settings is None:
        return
    try:
        seconds = locked(settings)
    except Exception as e:
        pipes.send({"refused": f"{e}" or type(e).__name__})
        os._exit(EXIT_REFUSED)
    pipes.send({"ready": seconds})
    sys.argv[:] = [""]
    console = Console(pipes, settings["functions"], settings["output"], settings["cpu_seconds"])
    while (request := pipes.receive()) is not None:
        if "code" in request:  # not a late answer to a call the code forged
            console.allow_time()
            error = console.run(request["code"], request["run"])
            pipes.send({"done": request["run"], "error": error})
    os._exit(0)


if __name__ == "__main__":
    main()
