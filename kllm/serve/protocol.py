"""uvicorn's HTTP/1.1 protocol with what it lacks: deadlines for headers and for readers, JSON refusals."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from kllm.serve.errors import ApiError

HEADER_SECONDS = 10.0  # for the request line and all headers
_FLUSH_SECONDS = 60.0  # for a reader to take the end of an answer


class Protocol(H11Protocol):
    """One connection. `most` bounds how many there are at once."""

    most = 4096
    header_seconds = HEADER_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            headers = {"Retry-After": "1"}
            error = ApiError(503, "Too many connections.", code="overloaded", headers=headers)
            transport.write(_raw(error))
            transport.close()
            return
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if before is None or before.response_complete:
            self._expect_headers()
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # close() waits for a reader who may never come
        self.loop.call_later(_FLUSH_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """For what is not HTTP."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_raw(ApiError(400, msg)))
        self.transport.close()

    def _expect_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _raw(error: ApiError) -> bytes:
    """The answer as bytes, for a connection that is closed after it."""
    body = error.json_bytes()
    fields = {
        **error.headers,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    reason = {400: "Bad Request", 503: "Service Unavailable"}[error.status]
    lines = [f"HTTP/1.1 {error.status} {reason}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
