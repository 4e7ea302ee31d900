"""Server-sent events: one ASGI response for every stream of this server.

The status line waits for the first event (ten seconds at most), so that what goes wrong before it is a
plain HTTP error. Silence is filled with comments, a reader that is gone or takes nothing for a minute
frees its request, and an error after the first byte is an event of its own before [DONE].
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from kllm.serve.errors import ApiError, internal_error

log = logging.getLogger("kllm.serve")

KEEP_ALIVE, STALLED = 10.0, 60.0  # seconds
DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
# Line ends to str.splitlines, and so to some clients, though not to JSON or to the event stream's grammar.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})

Message = MutableMapping[str, Any]


def event(data: Any, name: str | None = None) -> bytes:
    """One event: JSON on one line, UTF-8 as it is; `name` adds the `event:` line of the Responses API."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_LINE_ENDS)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode("utf-8", "replace")


class EventStream(Response):
    """A response that sends what an asynchronous iterator of encoded events (see `event`) yields.

    Args:
        events: each item goes out at once; several events may be joined in one.
        cancel: frees the request; called whenever the stream ends before `events` does.
        done: whether `data: [DONE]` is the end.
        keep_alive: seconds of silence before a comment is sent.
        stalled: seconds that a reader may take nothing.
        failed: the event for an error in mid-stream; the error object if None.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        cancel: Callable[[], None],
        *,
        done: bool = True,
        keep_alive: float = KEEP_ALIVE,
        stalled: float = STALLED,
        failed: Callable[[ApiError], bytes] | None = None,
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._cancel = cancel
        self._done = done
        self._keep_alive = keep_alive
        self._stalled = stalled
        self._failed = failed or (lambda error: event(error.body()))

    async def __call__(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        writer = _Writer(send, self.raw_headers)
        watch = _Watch(self._stalled)
        others = [
            asyncio.ensure_future(watch.connection(receive)),
            asyncio.ensure_future(watch.silence(writer, self._keep_alive)),
        ]
        complete = False
        try:
            complete = await self._run(writer)
        except asyncio.CancelledError:
            if not watch.stopped:
                raise
            watch.forgive()
        except OSError:  # the connection broke while sending
            pass
        finally:
            watch.over = True
            if not complete:
                self._cancel()
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _run(self, writer: _Writer) -> bool:
        """Sends everything; whether `events` got to its end."""
        end = DONE if self._done else b""
        try:
            async for data in self._events:
                await writer.write(data)
        except Exception as e:
            if not writer.started or isinstance(e, OSError):
                raise
            await writer.end(self._failed(_api_error(e)) + end)
            return False
        finally:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()
        await writer.end(end)
        return True


class _Writer:
    """Sends body parts, the response's start before the first; one at a time."""

    def __init__(self, send: Callable[..., Any], headers: list[tuple[bytes, bytes]]) -> None:
        self._send, self._headers = send, headers
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self.started = False
        self.last = self._loop.time()
        """When the newest part was handed over, on the loop's clock."""
        self.busy = False
        """Whether a part is being handed over."""

    async def write(self, data: bytes, more: bool = True) -> None:
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
            self.busy, self.last = True, self._loop.time()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
            self.busy, self.last = False, self._loop.time()

    async def end(self, data: bytes) -> None:
        if data:
            await self.write(data)
        await self.write(b"", more=False)


class _Watch:
    """Ends the task that made it when its reader leaves or takes nothing."""

    def __init__(self, stalled: float) -> None:
        self._task = asyncio.current_task()
        self._stalled = stalled
        self.stopped = self.over = False

    async def connection(self, receive: Callable[..., Any]) -> None:
        """Waits for the reader to leave."""
        await _disconnected(receive)
        self._stop()

    async def silence(self, writer: _Writer, keep_alive: float) -> None:
        """Fills it with comments, and notices the reader that does not read them either."""
        clock = asyncio.get_running_loop().time
        while True:
            patience = self._stalled if writer.busy else keep_alive
            await asyncio.sleep(max(min(patience, keep_alive) / 4, writer.last + patience - clock()))
            quiet = clock() - writer.last
            stalled = writer.busy and quiet >= self._stalled
            if not writer.busy and quiet >= keep_alive:
                try:
                    await asyncio.wait_for(writer.write(_COMMENT), self._stalled)
                except (TimeoutError, asyncio.TimeoutError):
                    stalled = True
                except OSError:
                    return self._stop()
            if stalled:
                log.info("a reader took nothing for %g s: its request is cancelled", self._stalled)
                return self._stop()

    def forgive(self) -> None:
        """The task goes on as if it had not been cancelled."""
        if self._task is not None and hasattr(self._task, "uncancel"):  # Python 3.11
            self._task.uncancel()

    def _stop(self) -> None:
        if self._task is not None and not self.over:
            self.stopped = True
            self._task.cancel()


async def _disconnected(receive: Callable[..., Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    log.error("a stream failed", exc_info=error)
    return internal_error()
