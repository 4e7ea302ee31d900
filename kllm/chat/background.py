"""Work in a thread, so that the main thread sees Ctrl-C while nothing comes."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

_POLL = 0.05  # seconds between two looks at Ctrl-C
_LEAVE = 1.0  # seconds that work has to end after Ctrl-C

T = TypeVar("T")


def in_background(
    work: Callable[[Callable[[T], None]], None], interrupted: Callable[[], bool], seconds: float
) -> Iterator[T]:
    """What `work` puts, as it comes, until it ends, is out of time, or does not heed Ctrl-C.

    Args:
        work: is given what puts a thing; runs in a thread, which is left behind if it does not end.
        interrupted: asked all the time.
        seconds: for all of it.

    Raises:
        what `work` raises.
    """
    out: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            work(lambda item: out.put(("item", item)))
            out.put(("end", None))
        except BaseException as error:  # it belongs to who reads
            out.put(("error", error))

    threading.Thread(target=run, name="tools", daemon=True).start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            kind, item = out.get(timeout=_POLL)
        except queue.Empty:
            if interrupted():
                deadline = min(deadline, time.monotonic() + _LEAVE)
                interrupted = _no
            continue
        if kind == "end":
            return
        if kind == "error":
            raise item
        yield item


def _no() -> bool:
    return False


class Background:
    """Runs an async iterator in a thread, so that Ctrl-C is seen while nothing comes.

    Iterating gives its items, and None whenever nothing came for a while. Leaving the block cancels it,
    which closes the connection: the server stops at once.
    """

    def __init__(self, items: AsyncIterator[dict[str, Any]]) -> None:
        self._items = items
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._work, name="chat", daemon=True)

    def __enter__(self) -> Iterator[dict[str, Any] | None]:
        self._thread.start()
        return self._each()

    def __exit__(self, *failure: object) -> None:
        with contextlib.suppress(RuntimeError):  # it has come to its end and closed the loop
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
        self._thread.join(5)

    def _each(self) -> Iterator[dict[str, Any] | None]:
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

    def _work(self) -> None:
        async def pump() -> None:
            self._task = asyncio.current_task()
            async for item in self._items:
                self._out.put(("item", item))

        try:
            self._loop.run_until_complete(pump())
            self._out.put(("end", None))
        except asyncio.CancelledError:
            self._out.put(("end", None))
        except BaseException as error:  # it belongs to who reads
            self._out.put(("error", error))
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
