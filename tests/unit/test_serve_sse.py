"""Event streams: framing, keep-alive, readers that leave or stall, errors before and after the first byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kllm.serve.errors import ApiError
from kllm.serve.sse import EventStream, event


class Wire:
    """An ASGI connection; `leave_after` body messages the client goes, `stall_after` it reads no more."""

    def __init__(self, leave_after: int | None = None, stall_after: int | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self._leave, self._stall = leave_after, stall_after
        self._gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        bodies = sum(m["type"] == "http.response.body" for m in self.sent)
        if self._stall is not None and bodies >= self._stall:
            await asyncio.Event().wait()
        self.sent.append(message)
        if self._leave is not None and bodies + 1 >= self._leave:
            self._gone.set()

    @property
    def body(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent).decode()


def run(events: Any, wire_options: dict[str, Any] | None = None, **options: Any) -> tuple[Wire, list[str]]:
    cancelled: list[str] = []

    async def go() -> Wire:
        wire = Wire(**(wire_options or {}))
        await EventStream(events(), lambda: cancelled.append("x"), **options)({}, wire.receive, wire.send)
        return wire

    return asyncio.run(asyncio.wait_for(go(), 20)), cancelled


async def two() -> AsyncIterator[bytes]:
    yield event({"a": "你\n\u2028好"})
    yield event({"b": 1}, "named")


def test_framing_and_headers() -> None:
    wire, cancelled = run(two)
    assert wire.body == 'data: {"a":"你\\n\\u2028好"}\n\nevent: named\ndata: {"b":1}\n\ndata: [DONE]\n\n'
    headers = dict(wire.sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache, no-transform" and headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers
    assert [m["more_body"] for m in wire.sent[1:]][-1] is False and not cancelled
    assert run(two, done=False)[0].body.endswith('{"b":1}\n\n')


def test_silence_is_filled_with_comments() -> None:
    async def slow() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.15)
        yield event(1)

    wire, _ = run(slow, keep_alive=0.04)
    assert wire.body.startswith(": keep-alive\n\n: keep-alive\n\n") and wire.body.endswith(
        "data: 1\n\ndata: [DONE]\n\n"
    )


def test_an_error_before_the_first_event_is_a_plain_one() -> None:
    async def broken() -> AsyncIterator[bytes]:
        raise ApiError(503, "no", code="draining")
        yield b""

    with pytest.raises(ApiError):
        run(broken)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ApiError(408, "late", code="request_timeout"), "request_timeout"),
        (ZeroDivisionError("secret"), "internal_error"),
    ],
)
def test_an_error_in_mid_stream_is_an_event_before_done(error: Exception, code: str) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield event(1)
        raise error

    wire, cancelled = run(broken)
    first, second, done, rest = wire.body.split("\n\n")
    assert (first, done, rest) == ("data: 1", "data: [DONE]", "")
    body = json.loads(second.removeprefix("data: "))
    assert body["error"]["code"] == code and "secret" not in second and cancelled == ["x"]


def test_a_reader_that_leaves_cancels_at_once() -> None:
    closed = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield event(1)
            await asyncio.Event().wait()
        finally:
            closed.append(1)

    wire, cancelled = run(endless, {"leave_after": 1})
    assert cancelled == ["x"] and closed == [1] and "[DONE]" not in wire.body


def test_a_reader_that_takes_nothing_is_cancelled() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield event(1)

    _, cancelled = run(endless, {"stall_after": 3}, stalled=0.05)
    assert cancelled == ["x"]


def test_a_reader_that_takes_no_comment_is_cancelled() -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield event(1)
        await asyncio.Event().wait()

    _, cancelled = run(silent, {"stall_after": 2}, stalled=0.1, keep_alive=0.02)
    assert cancelled == ["x"]


def test_the_servers_own_end_is_not_swallowed() -> None:
    async def go() -> tuple[list[int], bool]:
        cancelled: list[int] = []
        wire = Wire()

        async def endless() -> AsyncIterator[bytes]:
            yield event(1)
            await asyncio.Event().wait()

        stream = EventStream(endless(), lambda: cancelled.append(1))
        task = asyncio.ensure_future(stream({}, wire.receive, wire.send))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait({task})
        return cancelled, task.cancelled()

    assert asyncio.run(go()) == ([1], True)


def test_a_broken_connection_cancels() -> None:
    async def go() -> list[int]:
        cancelled: list[int] = []

        async def send(message: dict[str, Any]) -> None:
            raise OSError("gone")

        await EventStream(two(), lambda: cancelled.append(1))({}, asyncio.Event().wait, send)
        return cancelled

    assert asyncio.run(go()) == [1]
