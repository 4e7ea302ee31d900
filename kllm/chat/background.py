"""Work in a thread, so that the main thread sees Ctrl-C while nothing comes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

_POLL = 0.05  # seconds between two looks at Ctrl-C
_LEAVE = 1.0  # seconds that work has to end after Ctrl-C

T = TypeVar("T")
Put = Callable[[T], None]


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """While a user's own functions run: there is nothing to read, and what they print goes to stderr.

    One that reads would take what is typed for ever, also after it was left behind.
    """
    before = sys.stdin, sys.stdout
    sys.stdin, sys.stdout = io.StringIO(), sys.stderr
    try:
        yield
    finally:
        sys.stdin, sys.stdout = before


class _Worker(Generic[T]):
    """A thread that does `work`; iterating gives what it puts, and None whenever nothing came for a while.

    What `work` raises is raised where it is read.
    """

    def __init__(self, name: str, work: Callable[[Put[T]], None]) -> None:
        self._work = work
        self._out: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._work(lambda item: self._out.put(("item", item)))
            self._out.put(("end", None))
        except BaseException as error:  # it belongs to who reads
            self._out.put(("error", error))

    def __iter__(self) -> Iterator[T | None]:
        while True:
            try:
                kind, item = self._out.get(timeout=_POLL)
            except queue.Empty:
                yield None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item


def in_background(
    work: Callable[[Put[T]], None], interrupted: Callable[[], bool], seconds: float
) -> Iterator[T]:
    """What `work` puts, as it comes, until it ends, is out of time, or does not heed Ctrl-C.

    Args:
        work: is given what puts a thing; runs in a thread, which is left behind if it does not end.
        interrupted: asked whenever nothing comes.
        seconds: for all of it.

    Raises:
        what `work` raises.
    """
    deadline, asked = time.monotonic() + seconds, False
    for item in _Worker("tools", work):
        if item is not None:
            yield item
        elif not asked and interrupted():
            deadline, asked = min(deadline, time.monotonic() + _LEAVE), True
        if time.monotonic() >= deadline:
            return


class Background:
    """Runs an async iterator in a thread, so that Ctrl-C is seen while nothing comes.

    Iterating gives its items, and None whenever nothing came for a while. Leaving the block cancels it,
    which closes the connection: the server stops at once.
    """

    def __init__(self, items: AsyncIterator[dict[str, Any]]) -> None:
        self._items = items
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._worker: _Worker[dict[str, Any]] | None = None

    def __enter__(self) -> Iterator[dict[str, Any] | None]:
        self._worker = _Worker("chat", self._work)
        return iter(self._worker)

    def __exit__(self, *failure: object) -> None:
        with contextlib.suppress(RuntimeError):  # it has come to its end and closed the loop
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
        if self._worker is not None:
            self._worker.thread.join(5)

    def _work(self, put: Put[dict[str, Any]]) -> None:
        async def pump() -> None:
            self._task = asyncio.current_task()
            async for item in self._items:
                put(item)

        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(pump())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
