"""What a load test's reader sees of one stream: its text, the time of each event, how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from kllm.http_client import Answer, Connection, Target


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
