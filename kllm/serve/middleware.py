"""Pure ASGI layers around the routes, outermost first: `Frame`, `Gate`, `BodyLimit`.

None of them buffers an answer or hides a disconnect.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Iterable

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kllm.serve.errors import ApiError, ClientGone, internal_error, shown
from kllm.serve.registry import Registry
from kllm.serve.settings import Settings, digest

log = logging.getLogger("kllm.serve")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_TOKENS = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_LOOPBACK = re.compile(r"localhost|.+\.localhost")
_WILD = ("", "0.0.0.0", "::")
_CLOSED_BY_CLIENT = 499  # in the log only; nginx' number
_DEFAULT_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
_ABSOLUTE = re.compile(r"https?://[^/]*", re.IGNORECASE)
_DRAINED, _DRAIN_SECONDS = 128 << 20, 5.0
_QUIET = ("/health", "/metrics", "/web/render")  # asked for every few seconds, or ten times a second
_ALWAYS_UP = ("/health", "/metrics", "/version")


class Frame:
    """Gives every request an id, every answer its headers, every crash a 500, and the log a line.

    A caller's own X-Request-Id is kept if it is short and plain.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if absolute := _ABSOLUTE.match(scope["path"]):  # RFC 9112, 3.2.2: a proxy's way to ask
            scope = {**scope, "path": scope["path"][absolute.end() :] or "/", "raw_path": b""}
        given = header(scope, b"x-request-id") or ""
        number = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = number
        started, status = time.perf_counter(), 0
        extra = [(b"x-request-id", number.encode()), *self._cors(header(scope, b"origin"))]

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = list(message.get("headers", []))
                names = {name.lower() for name, _ in own}
                own += [pair for pair in _DEFAULT_HEADERS if pair[0] not in names]
                message = {**message, "headers": own + extra}
            await send(message)

        try:
            await self.app(scope, receive, framed)
        except (ClientGone, ClientDisconnect):
            status = _CLOSED_BY_CLIENT
        except ApiError as error:
            if status:
                raise
            await error.response()(scope, receive, framed)
        except Exception:
            log.exception("request %s failed", number)
            if status:
                raise  # half an answer is out: the connection must break
            await internal_error().response()(scope, receive, framed)
        finally:
            self._log(scope, status, time.perf_counter() - started, number)

    def _cors(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        allowed = self.settings.cors
        if not allowed:
            return []
        headers = [(b"vary", b"Origin")]
        if origin is not None and ("*" in allowed or origin in allowed):
            value = "*" if "*" in allowed else origin
            headers += [
                (b"access-control-allow-origin", value.encode("latin-1")),
                (b"access-control-expose-headers", b"X-Request-Id, Retry-After"),
            ]
        return headers

    def _log(self, scope: Scope, status: int, seconds: float, number: str) -> None:
        if scope["path"] in _QUIET and status == 200:
            return
        client = scope.get("client") or ("-",)
        path = scope.get("raw_path") or scope["path"].encode("utf-8", "replace")
        line = path.decode("latin-1").encode("unicode_escape").decode("ascii")[:200]
        log.info("%s %s %s %d %.3fs %s", client[0], scope["method"], line, status, seconds, number)


class Gate:
    """Who may come in: host, origin, key; and whether the server is open at all.

    The Host header is checked where no key protects the server: a web page that made its own name point
    here (DNS rebinding) sends that name. The Origin header is checked always.
    """

    def __init__(self, app: ASGIApp, settings: Settings, registry: Registry) -> None:
        self.app, self.settings, self.registry = app, settings, registry
        self._hosts = {host.lower() for host in (*settings.allowed_hosts, settings.host)}
        self._machine = socket.gethostname().lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http" and scope["path"] != "/health":
            answer = self._decide(scope)
            if answer is not None:
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _decide(self, scope: Scope) -> Response | None:
        host, origin = header(scope, b"host"), header(scope, b"origin")
        guarded = not self.settings.keys or self.settings.allowed_hosts
        if host is not None and guarded and not self._known(host):
            hint = "start the server with --allowed-hosts to allow it"
            raise ApiError(403, f"Host {shown(host)} is not allowed; {hint}.", code="host_not_allowed")
        if origin is not None and not self._welcome(origin, host):
            hint = "start the server with --cors to allow it"
            raise ApiError(403, f"Origin {shown(origin)} is not allowed; {hint}.", code="origin_not_allowed")
        if scope["method"] == "OPTIONS":
            wanted = header(scope, b"access-control-request-method")
            return _preflight(scope) if origin is not None and wanted is not None else None
        page = scope["method"] in ("GET", "HEAD") and _is_page(scope["path"])
        if not page and not (self.settings.metrics_public and scope["path"] == "/metrics"):
            self._check_key(scope)
        if not page and scope["path"] not in _ALWAYS_UP:
            self.registry.check_open()
        return None

    def _known(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
        name = name.strip("[]").lower().rstrip(".")
        if "*" in self._hosts or name in self._hosts or host.lower() in self._hosts:
            return True
        wild = self.settings.host in _WILD
        try:
            # An address cannot be rebound; only names can.
            return ipaddress.ip_address(name).is_loopback or wild
        except ValueError:
            return bool(_LOOPBACK.fullmatch(name)) or (wild and name == self._machine)

    def _welcome(self, origin: str, host: str | None) -> bool:
        if "*" in self.settings.cors or origin in self.settings.cors:
            return True
        scheme, _, place = origin.partition("://")
        return host is not None and scheme in ("http", "https") and place.lower() == host.lower()

    def _check_key(self, scope: Scope) -> None:
        keys = self.settings.keys
        if not keys:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key:
            raise _unauthorised("No API key was sent. Send it as the header Authorization: Bearer KEY.")
        found, offered = False, digest(key)
        for known in keys:  # all of them, so that the time tells nothing
            found |= secrets.compare_digest(offered, known)
        if not found:
            raise _unauthorised("The API key is not valid.")


class BodyLimit:
    """Refuses bodies that are too large (413) or too slow (408), while they come."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.settings.max_body
        declared = header(scope, b"content-length")
        if declared is not None and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            error = _too_large(limit)
            app: ASGIApp = JSONResponse(error.body(), error.status, error.headers)
            size = limit + 1
        else:
            app, size = self.app, 0
        deadline = time.monotonic() + self.settings.body_timeout
        complete, answered = False, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete or answered:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                headers = {"Connection": "close"}
                text = f"The body did not arrive within {self.settings.body_timeout:g} s."
                raise ApiError(408, text, code="request_timeout", headers=headers) from None
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(limit)
            return message

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = True
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if last and size > limit and not complete:  # the answer is out, its end comes after the body's
                await send({**message, "more_body": True})
                await _drain(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await app(scope, limited, watched)


async def _drain(receive: Receive) -> None:
    """Throws away the rest of a body: a client that sends first and then reads would see a reset instead."""
    left, deadline = _DRAINED, time.monotonic() + _DRAIN_SECONDS
    while left > 0:
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            return
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        left -= len(message.get("body", b""))


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that (lower-case) name."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _is_page(path: str) -> bool:
    return path in ("/", "/favicon.ico") or path.startswith("/web/")


def _preflight(scope: Scope) -> Response:
    headers = {"Access-Control-Allow-Methods": "GET, POST, OPTIONS", "Access-Control-Max-Age": "600"}
    wanted = header(scope, b"access-control-request-headers") or ""
    if _TOKENS.fullmatch(wanted) and len(wanted) < 2000:
        headers["Access-Control-Allow-Headers"] = wanted
    return Response(None, 204, headers)


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")


def digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    """What is kept of API keys; equal ones once."""
    return tuple(dict.fromkeys(digest(key) for key in keys))
