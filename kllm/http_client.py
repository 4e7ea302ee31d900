"""A small HTTP/1.1 client on asyncio streams: one request a connection, plain or over TLS.

A general client costs more per event than a small model's token does, and hides what the bench wants:
leaving in the middle, not reading for a while, the moment at which bytes arrived.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from kllm.errors import KllmError, UserError

_PIECE = 1 << 16
_MOST = 64 << 20  # bytes of a body that is read whole


@dataclass(frozen=True)
class Target:
    """Where a server listens, and the key it wants."""

    host: str
    port: int
    base: str = ""
    tls: bool = False
    key: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """`HOST:PORT`, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Without `/v1`."""
        return f"{'https' if self.tls else 'http'}://{self.address}{self.base}"

    @classmethod
    def parse(cls, url: str, key: str | None = None, where: str = "flag --url") -> Target:
        """`http://HOST:PORT`, with or without `/v1`.

        Raises:
            UserError: no such URL, or a key that no header can carry; `where` is what gave the URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise UserError(f"{url!r}: {error}", where=where) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is no http address", where=where, hint="http://127.0.0.1:8000")
        if not (parts.hostname + parts.path).isascii() or any(c.isspace() for c in parts.path):
            raise UserError(f"{url!r} is no http address", where=where, hint="letters must be ASCII")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise UserError("the key has a character that no key has", hint="perhaps a line break")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, base, parts.scheme == "https", key)

    def versioned(self) -> Target:
        """The target with the whole path before `/chat/completions`.

        Most servers have `/v1`; an address that names a version itself is taken as it is.
        """
        base = self.base.removesuffix("/chat/completions")
        return replace(self, base=base if re.search(r"/v\d", base) else f"{base}/v1")


class NoAnswer(KllmError):
    """Nobody answered, or not in HTTP. `final`: asking again is of no use (no such host, a bad certificate).

    `silent`: the time ran out.
    """

    final = False
    silent = False


class Answer:
    """An HTTP answer whose body is still coming."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers, self._reader = status, headers, reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives, without the framing of HTTP/1.1.

        Raises:
            ConnectionError, asyncio.IncompleteReadError, ValueError: it was cut, or its framing is broken.
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

    async def events(self, touch: Callable[[], None] = lambda: None) -> AsyncIterator[bytes]:
        """The data of each server-sent event of the body; comments, which keep it alive, are dropped.

        Args:
            touch: called whenever bytes come.

        Raises:
            as `pieces`.
        """
        held, data = b"", list[bytes]()
        async for piece in self.pieces():
            touch()
            *lines, held = (held + piece).split(b"\n")
            if len(held) > _MOST:
                raise ValueError(f"an event is longer than {_MOST >> 20} MiB")
            for line in (one.rstrip(b"\r") for one in lines):
                if line.startswith(b"data:"):
                    data.append(line[5:].removeprefix(b" "))
                elif not line and data:
                    yield b"\n".join(data)
                    data = []
        if held.startswith(b"data:"):
            data.append(held[5:].strip())
        if data:
            yield b"\n".join(data)


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
            f"Host: {target.address}",
            "Connection: close",
            "Accept: */*",
            "User-Agent: kllm",  # some hosts refuse who does not say a name
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
            status, head = 100, [""]
            while status // 100 == 1:  # "early hints" and the like come before the answer
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                status = int(head[0].split()[1])
        except (ValueError, IndexError, asyncio.LimitOverrunError):
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
        tls = _tls() if target.tls else None
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


@functools.cache
def _tls() -> ssl.SSLContext:
    """Reading the authorities' certificates takes longer than many an answer."""
    return ssl.create_default_context()


async def request(
    target: Target, method: str, path: str, body: Any = None, timeout: float = 60.0
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and whole body.

    Args:
        body: sent as JSON.
        timeout: seconds without a byte.

    Raises:
        NoAnswer: nobody answers there, or not whole.
    """
    connection = Connection(target, method, path, body, patience=timeout)
    where = f"{target.address}{target.base}{path}"
    try:
        async with connection as answer:
            content = bytearray()
            async for piece in answer.pieces():
                connection.touch()
                content += piece
                if len(content) > _MOST:
                    raise ValueError(f"the answer is longer than {_MOST >> 20} MiB")
            return answer.status, answer.headers, bytes(content)
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        raise no_answer(error, target, where, timeout if connection.starved else None) from None


def no_answer(error: Exception, target: Target, where: str, waited: float | None) -> NoAnswer:
    """What broke a request, in a line; `waited`: seconds after which the silence was given up."""
    if waited is not None:
        silent = NoAnswer(f"no answer in {waited:g} s", where=where)
        silent.silent = True
        return silent
    # asyncio wraps the refusals of a name with several addresses into a plain OSError
    if isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return NoAnswer("connection refused", target.url, "is the server running?")
    if isinstance(error, socket.gaierror):
        unknown = NoAnswer(f"unknown host {target.host!r}", target.url, "is the address right?")
        unknown.final = error.errno == socket.EAI_NONAME
        return unknown
    if isinstance(error, ssl.SSLError):
        why = getattr(error, "verify_message", "") or error.reason or str(error)
        broken = NoAnswer(f"no secure connection: {why}", target.url, "SSL_CERT_FILE names other authorities")
        broken.final = isinstance(error, ssl.SSLCertVerificationError)
        return broken
    return NoAnswer(f"no answer: {str(error) or type(error).__name__}", where=where)


async def fetch(
    target: Target, method: str, path: str, body: Any = None, timeout: float = 60.0
) -> tuple[int, bytes]:
    """Status and whole body; see `request`."""
    status, _, content = await request(target, method, path, body, timeout)
    return status, content


def error_of(raw: bytes) -> tuple[str, str]:
    """(message, code) of an error's body, in whichever of the usual places."""
    try:
        found = json.loads(raw)
        error = found.get("error", found)
        if isinstance(error, str):
            return error[:300], ""
        words = error.get("message") or error.get("detail") or found.get("detail") or ""
        return str(words)[:300], str(error.get("code") or error.get("type") or "").casefold()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return " ".join(raw[:200].decode(errors="replace").split()), ""
