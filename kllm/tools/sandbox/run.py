"""One run of code, from the parent's side: what is printed, the calls of functions, and how it ends.

Nothing the worker sends is believed: messages are JSON lines of bounded size and number, output is cut
while it is read, and time, interruption and scratch are looked at every TICK, the last less often where
that would take more than LOOK_SHARE. The worst that hostile code can do here is to falsify the result of
its own run.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kllm.tools.sandbox.held import WorkerClosed
from kllm.tools.sandbox.process import CHUNK, Limits, Worker
from kllm.tools.sandbox.scratch import SCRATCH_DEPTH, SCRATCH_SIZES, scratch_is_full
from kllm.tools.text import Kept

Function = Callable[[list[Any], dict[str, Any]], Any]

TICK = 0.02
LOOK_SHARE = 0.05  # of a core, at most, to look at the scratch folder
MAX_CALLS = 100
MAX_MESSAGES = 1000  # a run's lines, answered or not
MAX_LINE = 1 << 18
MAX_ERROR = 300
LOST = "the worker is gone, its variables and files are lost"
ONE_PIPE = 32  # reads that empty a pipe nobody writes to


@dataclass(frozen=True)
class Ran:
    """What came of one run.

    Attributes:
        output: what was printed, the last expression's value, the error's last lines; for the model.
        error: the error in one line, None if it went well.
        lost: the worker is gone, and with it all variables and files.
        seconds: wall clock.
    """

    output: str
    error: str | None
    lost: bool
    seconds: float


def how_it_ended(code: int | None, limits: Limits) -> str:
    """A worker's end in words, from its return code (negative: a signal; None: it lives, but is mute)."""
    if code is None:
        return "the code closed the worker's pipes"
    if code >= 0:
        return f"the code ended the worker (exit code {code})"
    if -code == signal.SIGXCPU:
        return f"time-out: {limits.cpu_seconds} s of processor time used up"
    if -code == signal.SIGKILL:
        return "the system killed the worker (out of memory or of processor time)"
    if -code == getattr(signal, "SIGSYS", 31):
        return "the worker was killed for a forbidden kind of system call"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"the worker crashed ({name})"


def _safe_json(value: Any) -> str:
    """As JSON; an error message instead if that cannot be or is too long."""
    try:
        text = json.dumps({"result": value})
    except (TypeError, ValueError, RecursionError) as e:
        return json.dumps({"error": f"the result cannot be sent: {e}"[:MAX_ERROR]})
    if len(text) > MAX_LINE:
        return json.dumps({"error": f"the result is too long ({len(text):,} characters)"})
    return text


class Run:
    """Sends `code` to a worker and follows it to the end."""

    def __init__(
        self, worker: Worker, functions: Mapping[str, Function], limits: Limits, number: int
    ) -> None:
        self.worker = worker
        self.functions = functions
        self.limits = limits
        self.number = number
        self.kept = Kept(limits.output)
        self.pending = bytearray()  # to the worker
        self.line = bytearray()  # from it, so far without its end
        self.calls = self.messages = 0
        self.deadline = 0.0  # monotonic
        self.done = False
        self.error: str | None = None
        self.end: str | None = None  # why the worker must go, or went

    def follow(self, code: str, interrupted: Callable[[], bool] | None) -> Ran:
        """Runs `code`; on any end but a regular one the worker is killed.

        Another thread may kill it meanwhile, even while this one is in a function that the code called.
        """
        start = time.monotonic()
        self.deadline = start + self.limits.seconds
        try:
            self._forget_the_last_run()
            self.pending += json.dumps({"run": self.number, "code": code}).encode() + b"\n"
            self.worker.signal(signal.SIGCONT)
            self._follow(interrupted)
        except WorkerClosed as closed:
            self.end = self.end or closed.message
        # Nothing the code left behind (a timer, a forged "done") goes on while nobody looks.
        self.worker.signal(signal.SIGSTOP)
        self._look()
        self._drain()
        return self._result(time.monotonic() - start)

    def _follow(self, interrupted: Callable[[], bool] | None) -> None:
        """Serves the pipes until the run is done or has to end."""
        poller = select.poll()
        poller.register(self.worker.replies, select.POLLIN)
        poller.register(self.worker.output, select.POLLIN)
        tick = look = time.monotonic() + TICK
        while not self.done and self.end is None:
            if self.pending:
                poller.register(self.worker.requests, select.POLLOUT)
            else:  # not even for errors: a closed pipe would wake us all the time
                with contextlib.suppress(KeyError):
                    poller.unregister(self.worker.requests)
            wait = max(0.0, min(tick, self.deadline) - time.monotonic())
            for fd, _ in poller.poll(wait * 1000 + 1):
                self._serve(fd)
            now = time.monotonic()
            if now >= self.deadline and not self.done:
                self.end = self.end or f"time-out after {self.limits.seconds:g} s"
            elif now >= tick:
                tick = now + TICK
                self.worker.check()  # or its numbers would be polled on, whosever they are now
                if interrupted is not None and interrupted():
                    self.end = self.end or "interrupted"
                if now >= look:  # often, as a worker fills 300 MB in 0.2 s; rarely if it makes looking dear
                    look = now + max(TICK, self._look() / LOOK_SHARE)

    def _look(self) -> float:
        """Ends the run if its folder is too full; returns the processor seconds that it took to see."""
        start, room = time.thread_time(), self.limits.file_bytes * SCRATCH_SIZES
        if scratch_is_full(self.worker.scratch, room):
            why = f"too many files, over {room:,} bytes of them, or over {SCRATCH_DEPTH} folders deep"
            self.end = self.end or why
        return time.thread_time() - start

    def _serve(self, fd: int) -> None:
        """One read or write on a pipe that is ready."""
        if self.end is not None or self.done:
            return
        try:
            if fd == self.worker.requests:
                sent = self.worker.write(fd, self.pending[:CHUNK])
                del self.pending[:sent]
                return
            chunk = self.worker.read(fd)
        except BlockingIOError:
            return
        except BrokenPipeError:
            chunk = b""
        if not chunk:
            self.end = how_it_ended(self.worker.ended_by_itself(), self.limits)
        elif fd == self.worker.output:
            self.kept.add(chunk)
        else:
            self._receive(chunk)

    def _receive(self, chunk: bytes) -> None:
        """Takes the whole lines out of what has come so far."""
        *lines, rest = (bytes(self.line) + chunk).split(b"\n")
        self.line = bytearray(rest)
        for line in lines:
            # the clock too: forged calls of a slow function come many at once
            if self.done or self.end is not None or time.monotonic() >= self.deadline:
                return
            self.messages += 1
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict) or self.messages > MAX_MESSAGES:
                self.end = "the code wrote nonsense into the worker's pipe"
            elif "call" in message:
                self._call(message)
            elif message.get("done") == self.number:
                error = message.get("error")
                self.error = " ".join(error.split())[:MAX_ERROR] if isinstance(error, str) else None
                self.done = True
        if len(self.line) > MAX_LINE or len(self.pending) > 2 * MAX_LINE:
            self.end = "the code wrote too much into the worker's pipe"

    def _call(self, message: dict[str, Any]) -> None:
        """Answers one function call; whatever the function raises is a text for the code."""
        name, args, kwargs = message["call"], message.get("args"), message.get("kwargs")
        self.calls += 1
        function = self.functions.get(name) if isinstance(name, str) else None
        if function is None or not isinstance(args, list) or not isinstance(kwargs, dict):
            answer = json.dumps({"error": "no such function"})
        elif self.calls > MAX_CALLS:
            answer = json.dumps({"error": f"no more than {MAX_CALLS} function calls in one run"})
        else:
            try:
                answer = _safe_json(function(args, kwargs))
            except Exception as e:  # the worker asked for it; its traceback shows the text
                answer = json.dumps({"error": (str(e) or type(e).__name__)[:MAX_ERROR]})
        mark = message.get("id")
        mark = mark if type(mark) is int and abs(mark) < 2**53 else None
        self.pending += f'{answer[:-1]}, "id": {json.dumps(mark)}}}\n'.encode()

    def _forget_the_last_run(self) -> None:
        """Empties the pipes of what a stopped worker had left there."""
        for fd in (self.worker.output, self.worker.replies):
            for _ in self._rest(fd):
                pass

    def _drain(self) -> None:
        """The rest of the output; the worker is stopped or gone, so this is one pipe's content."""
        try:
            for chunk in self._rest(self.worker.output):
                self.kept.add(chunk)
        except WorkerClosed:
            self.kept.add(self.worker.unread)

    def _rest(self, fd: int) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            for _ in range(ONE_PIPE):
                if not (chunk := self.worker.read(fd)):
                    return
                yield chunk

    def _result(self, seconds: float) -> Ran:
        text = self.kept.text()
        if self.end is None:
            return Ran(text, self.error, False, seconds)
        self.worker.kill()
        gap = "" if not text or text.endswith("\n") else "\n"
        return Ran(f"{text}{gap}[{self.end}: {LOST}]\n", self.end, True, seconds)
