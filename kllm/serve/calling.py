"""The calls of one request's answers: run within limits of time, of sandboxes and of threads, and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from kllm.serve.errand import Errand, ServerBox
from kllm.serve.thread import soon
from kllm.serve.worker import TookTooLong
from kllm.tools.loop import SECONDS, Result, ToolLoop

if TYPE_CHECKING:
    from kllm.serve.metrics import ModelMetrics
    from kllm.serve.servertools import ServerTools
    from kllm.serve.stay import Stay

_LATE = 2.0  # seconds after the time for tools in which the loop itself should say that it is over
_BURST = 2.0  # seconds to wait for a thread: many answers may end in the same step of the engine
_UNKNOWN = "unknown"  # the label of tools that a model made up


class Caller:
    """Runs the calls of a request, round by round; `leave` ends it.

    All methods belong to the event loop.

    Args:
        box: the request's tools.
        tools: the server's.
        stay: the request's place; when it has ended nothing more is run.
        metrics: count the calls.
    """

    def __init__(self, box: ServerBox, tools: ServerTools, stay: Stay, metrics: ModelMetrics) -> None:
        self._box, self._tools, self._stay, self._metrics = box, tools, stay, metrics
        self._loop = ToolLoop(box)
        self._errand: Errand | None = None
        self._has_place = False  # for a sandbox
        self._patience = SECONDS  # left to wait for that
        self._spent = 0.0  # seconds in tools

    @property
    def ended(self) -> bool:
        """No more calls are run: the model must not make any."""
        return self._loop.ended is not None

    async def results(
        self, calls: list[dict[str, Any]], refusal: str | None = None
    ) -> AsyncGenerator[Result, None]:
        """Runs a message's `tool_calls`; each gets a result, with `refusal` an error that says so.

        Raises:
            ApiError, ClientGone: the request has ended.
        """
        waiting = {call["id"]: call["function"]["name"] for call in calls}
        why = refusal
        try:
            if why is None:
                await self._take_place(calls)
                if await self._taken(self._tools.threads, _BURST):
                    async with aclosing(self._run(calls)) as results:
                        async for result, outcome in results:
                            self._count(waiting.pop(result.id), outcome)
                            yield result
                    why = f"not finished: {self._loop.ended or 'the tools ended'}"
                else:
                    why = "not run: the tools are busy"
            for call in calls:
                if (name := waiting.pop(call["id"], None)) is not None:
                    self._count(name, "not_run")
                    yield Result(call["id"], name, f"error: {why}", True, 0.0)
        finally:
            for name in waiting.values():
                self._count(name, "abandoned")

    def leave(self) -> None:
        """Ends what runs; once it has, the sandbox is gone and its place free. No call is run any more."""
        self._box.stopped = True
        errand, self._errand = self._errand, None
        has_place, self._has_place = self._has_place, False
        places, events = self._tools.places, asyncio.get_running_loop()

        def end() -> None:
            self._box.close()
            if has_place:
                soon(events, places.release)

        if errand is not None:
            errand.leave(end)
        elif has_place:
            places.release()

    async def _run(self, calls: list[dict[str, Any]]) -> AsyncGenerator[tuple[Result, str], None]:
        """The results as they come, until the time is over; a thread for them is ours."""
        self._errand = Errand(self._loop, self._box, calls, self._tools.threads.release)
        patience = max(SECONDS - self._spent, 0.0) + _LATE
        try:
            async with aclosing(self._errand.results(self._stay, patience)) as results:
                async for result, outcome in results:
                    self._spent += result.seconds
                    yield result, outcome
        except TookTooLong:
            self._loop.ended = f"the tools took more than {SECONDS:g} s"
            self.leave()

    def _count(self, name: str, outcome: str) -> None:
        tool = name if name in self._box.tools else _UNKNOWN
        self._metrics.tool_calls[tool, outcome] += 1

    async def _take_place(self, calls: list[dict[str, Any]]) -> None:
        """Waits until one more sandbox is allowed, if the calls need the request's first; not for ever."""
        if self._has_place or not self._box.needs_sandbox(calls):
            return
        began = time.monotonic()
        self._has_place = await self._taken(self._tools.places, self._patience)
        self._patience = max(0.0, self._patience - (time.monotonic() - began))
        self._box.python_busy = not self._has_place

    async def _taken(self, places: asyncio.Semaphore, seconds: float) -> bool:
        """Whether one of them got free in time: it is ours."""
        ours = False
        taken = asyncio.ensure_future(places.acquire())
        try:
            await self._stay.wait(taken, seconds)
            ours = True
        except TookTooLong:
            pass
        finally:
            if not ours and taken.done() and not taken.cancelled():
                places.release()
        return ours
