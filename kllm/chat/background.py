"""An async iterator run in a thread, so that the main thread sees Ctrl-C while nothing comes."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

_POLL = 0.05  # seconds between two looks at Ctrl-C


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
