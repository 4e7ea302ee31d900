"""A small HTTP client for load: raw asyncio streams, server-sent events with the time of each.

A general client costs more per event than a small model's token does, and hides what is wanted here:
leaving in the middle, not reading for a while, the moment at which bytes arrived.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kllm.errors import KllmError, UserError

_PIECE = 1 << 16


@dataclass(frozen=True)
class Target:
    """Where a server listens, and the key it wants."""

    host: str
    port: int
    base: str = ""
    tls: bool = False
    key: str | None = None

    @property
    def url(self) -> str:
        """Without `/v1`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.base}"

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Target:
        """`http://HOST:PORT`, with or without `/v1`.

        Raises:
            UserError: no such URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise UserError(f"{url!r}: {error}", where="flag --url") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is no http address", where="flag --url", hint="http://127.0.0.1:8000")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, base, parts.scheme == "https", key)


@dataclass
class Outcome:
    """What one stream brought.

    `times` are moments (seconds of `time.perf_counter`) at which text arrived, one an event; `tokens` is
    the server's own count. `error` is None for a stream that came to its end or that we left (`left`).
    """

    started: float = 0.0
    text: str = ""
    finish_reason: str | None = None
    tokens: int | None = None
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    done: bool = False
    left: bool = False
    error: str | None = None
    retry_after: float | None = None

    @property
    def first(self) -> float | None:
        """Seconds to the first text."""
        return self.times[0] - self.started if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between texts."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True)
class Manners:
    """How a reader behaves: leaves after so many texts, or stops reading for `stall` seconds after some."""

    leave_after: int | None = None
    stall_after: int | None = None
    stall: float = 3.0
    patience: float = 60.0
    """Seconds without a byte after which it gives up (it is starved)."""


class Answer:
    """An HTTP answer whose body is still coming."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers, self._reader = status, headers, reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives, without the framing of HTTP/1.1.

        Raises:
            ConnectionError, asyncio.IncompleteReadError: it was cut.
        """
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            return
        left = int(self.headers.get("content-length", -1))
        while left and (piece := await self._reader.read(_PIECE if left < 0 else min(left, _PIECE))):
            left -= len(piece) if left > 0 else 0
            yield piece
        if left > 0:
            raise asyncio.IncompleteReadError(b"", left)


class Connection:
    """One request on one connection; leaving the block closes the socket, also in the middle.

    Without a byte for `patience` seconds the connection is cut and `starved` set.
    """

    def __init__(
        self,
        target: Target,
        method: str,
        path: str,
        body: Any = None,
        *,
        patience: float = 60.0,
        slow: bool = False,
    ) -> None:
        self._target, self._slow, self._patience = target, slow, patience
        self.starved = False
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {target.base}{path} HTTP/1.1",
            f"Host: {target.host}:{target.port}",
            "Connection: close",
            "Accept: */*",
        ]
        if target.key:
            lines.append(f"Authorization: Bearer {target.key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        self._request = "\r\n".join([*lines, "", ""]).encode() + data

    async def __aenter__(self) -> Answer:
        try:
            reader, self._writer = await asyncio.wait_for(self._open(), self._patience)
        except (TimeoutError, asyncio.TimeoutError):
            self.starved = True
            raise ConnectionError("no connection in time") from None
        self._last = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(self._patience, self._look)
        try:
            self._writer.write(self._request)
            await self._writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
        except (ValueError, IndexError):
            self._close()
            raise ConnectionError("not an HTTP answer") from None
        except BaseException:
            self._close()
            raise
        pairs = (line.partition(":") for line in head[1:] if line)
        return Answer(status, {name.strip().lower(): value.strip() for name, _, value in pairs}, reader)

    async def __aexit__(self, *failure: object) -> None:
        self._close()

    def touch(self, ahead: float = 0.0) -> None:
        """Something came; or: for `ahead` seconds nothing is expected to."""
        self._last = time.monotonic() + ahead

    def _look(self) -> None:
        left = self._last + self._patience - time.monotonic()
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self._look)
        else:
            self.starved = True
            self._writer.transport.abort()

    def _close(self) -> None:
        self._timer.cancel()
        self._writer.close()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        target = self._target
        tls = ssl.create_default_context() if target.tls else None
        if not self._slow:
            return await asyncio.open_connection(target.host, target.port, ssl=tls)
        # a small window, so that the server feels that nobody reads
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        raw = socket.socket(found[0][0], socket.SOCK_STREAM)
        try:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            await loop.sock_connect(raw, found[0][4])
            named = target.host if tls else None
            return await asyncio.open_connection(sock=raw, ssl=tls, server_hostname=named, limit=4096)
        except BaseException:
            raw.close()
            raise


async def fetch(
    target: Target, method: str, path: str, body: Any = None, timeout: float = 60.0
) -> tuple[int, bytes]:
    """Status and whole body.

    Raises:
        KllmError: nobody answers there.
    """
    try:
        async with Connection(target, method, path, body, patience=timeout) as answer:
            return answer.status, b"".join([piece async for piece in answer.pieces()])
    except (OSError, EOFError) as error:
        # asyncio wraps the refusals of a name with several addresses into a plain OSError
        if isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error):
            raise KllmError("connection refused", target.url, "is the server running?") from None
        why = str(error) or type(error).__name__
        raise KllmError(f"no answer: {why}", where=f"{target.host}:{target.port}{path}") from None


async def read_stream(
    target: Target,
    path: str,
    body: dict[str, Any],
    manners: Manners = Manners(),
) -> Outcome:
    """Posts `body` (a streaming completion) and reads to the end, or as long as `manners` say.

    Nothing is raised: what went wrong is in the outcome's `error`.
    """
    out = Outcome(started=time.perf_counter())
    connection = Connection(
        target, "POST", path, body, patience=manners.patience, slow=manners.stall_after is not None
    )
    try:
        async with connection as answer:
            if answer.status != 200:
                await _refused(answer, out)
            else:
                await _events(answer, out, manners, connection)
    except (OSError, EOFError) as error:
        out.error = f"connection: {type(error).__name__}"
    except ValueError as error:  # broken framing or JSON
        out.error = f"not a stream: {type(error).__name__}"
    out.ended = time.perf_counter()
    if connection.starved:
        out.error = "starved"
    elif not (out.error or out.left or out.done):
        out.error = "no [DONE]"
    elif not (out.error or out.left or out.finish_reason):
        out.error = "no finish_reason"
    return out


async def _refused(answer: Answer, out: Outcome) -> None:
    raw = b"".join([piece async for piece in answer.pieces()])
    try:
        error = json.loads(raw)["error"]
        words = error.get("code") or error.get("type") or ""
        out.text = str(error.get("message", ""))[:300]
    except (ValueError, LookupError, TypeError, AttributeError):
        words = ""
    out.error = f"http {answer.status} {words}".strip()
    after = answer.headers.get("retry-after", "")
    out.retry_after = float(after) if after.replace(".", "", 1).isdigit() else None


async def _events(answer: Answer, out: Outcome, manners: Manners, connection: Connection) -> None:
    held, stalled = b"", False
    async for piece in answer.pieces():
        now = time.perf_counter()
        connection.touch()
        *whole, held = (held + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            _take(event, out, now)
        if out.error:
            return
        if manners.leave_after is not None and len(out.times) >= manners.leave_after and not out.done:
            out.left = True
            return
        if manners.stall_after is not None and len(out.times) >= manners.stall_after and not stalled:
            stalled = True
            connection.touch(manners.stall)
            await asyncio.sleep(manners.stall)


def _take(event: bytes, out: Outcome, now: float) -> None:
    for line in event.split(b"\n"):
        if not line.startswith(b"data:"):
            continue  # a comment keeps the connection alive
        data = line[5:].strip()
        if data == b"[DONE]":
            out.done = True
            continue
        found = json.loads(data)
        if error := found.get("error"):
            kind = error.get("code") or error.get("type") if isinstance(error, dict) else None
            out.error = f"error event {kind or ''}".strip()
            return
        if usage := found.get("usage"):
            out.tokens = usage.get("completion_tokens")
        for choice in found.get("choices") or []:
            text = choice.get("text") or _delta(choice.get("delta") or {})
            if text:
                out.text += text
                out.times.append(now)
            out.finish_reason = choice.get("finish_reason") or out.finish_reason


def _delta(delta: dict[str, Any]) -> str:
    return str(delta.get("reasoning_content") or delta.get("reasoning") or "") + str(
        delta.get("content") or ""
    )
