"""A chat request that the model and the server's tools answer together.

Ask; run what the answer calls; ask again with the results; at the latest when the limits are reached a
last time with calls banned. To the client it is one answer: its text is the rounds' texts, its usage the
sum of what the rounds took, its reason the last round's. What was called and what came of it is told in
`tool_events`, an extension that no client mistakes for calls that it should run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from kllm.engine.answer import Answer, delta_of, message_of, usage_of
from kllm.serve.errand import Errand, ServerBox
from kllm.serve.errors import ApiError
from kllm.serve.job import ChatJob, ChatRequest, chunk, chunks_of, end_of, prepared
from kllm.serve.sse import event
from kllm.serve.thread import soon
from kllm.serve.worker import TookTooLong
from kllm.tokenizer.parts import Part
from kllm.tools.loop import SECONDS, Result, ToolLoop

if TYPE_CHECKING:
    from kllm.serve.registry import Served
    from kllm.serve.servertools import ServerTools
    from kllm.serve.settings import Settings
    from kllm.serve.stay import Stay
    from kllm.serve.ticket import Ticket
    from kllm.tools.tool import Tool

_BETWEEN = "\n\n"  # the texts of two rounds
_LATE = 2.0  # seconds after the time for tools in which the loop itself should say that it is over
_UNKNOWN = "unknown"  # the label of tools that a model made up


class Rounds:
    """One request that is admitted: `begin` makes it, `whole` or `stream` gives its answer.

    Args:
        body: the request, with the tools that it gets.
        job: its first round.
        settings: of the server.
        tools: of the server.
        box: those of the request.
        stay: its place.
    """

    def __init__(
        self,
        body: ChatRequest,
        job: ChatJob,
        settings: Settings,
        tools: ServerTools,
        box: ServerBox,
        stay: Stay,
    ) -> None:
        self._body, self._job, self._settings = body, job, settings
        self._tools, self._box, self._stay = tools, box, stay
        self._head = job.head
        self._budget = body.max_completion_tokens or body.max_tokens
        self._loop = ToolLoop(box)
        self._errand: Errand | None = None
        self._has_place = False  # for a sandbox
        self._spent = 0.0  # seconds in tools
        self._answers: list[Answer] = []
        self._prompt_tokens = 0
        self._last_said: dict[str, int] = {}  # field of the message -> round
        self._ticket = self._ask(job)

    @classmethod
    async def begin(
        cls, body: ChatRequest, served: Served, settings: Settings, tools: ServerTools, chosen: list[Tool]
    ) -> Rounds:
        """Checks and admits a request that brings no tools; `chosen` are those it gets.

        Raises:
            ApiError: 400, 429, 503.
        """
        body = body.model_copy(update={"tools": [tool.schema() for tool in chosen]})
        job = await prepared(body, served, settings)
        stay = served.runtime.admit(served.adapter)
        try:
            box = ServerBox(chosen, tools.unsafe_python, lambda: stay.ended)
            return cls(body, job, settings, tools, box, stay)
        except BaseException:
            stay.cancel()
            raise

    def cancel(self) -> None:
        """Stops the model and the tools."""
        self._stay.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer."""
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        logprobs: list[Any] = []
        reason = None
        async with aclosing(self._chunks()) as batches:
            async for chunks in batches:
                for one in chunks:
                    for key, value in one["delta"].items():  # texts, and lists of tool events
                        message[key] = message[key] + value if key in message else value
                    logprobs += (one["logprobs"] or {}).get("content", [])
                    reason = one["finish_reason"] or reason
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": logprobs, "refusal": None} if self._job.logprobs else None,
            "finish_reason": reason,
        }
        fingerprint = self._job.served.fingerprint
        return {**self._head, "choices": [choice], "usage": self.usage(), "system_fingerprint": fingerprint}

    async def stream(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The same as events."""
        head = {**self._head, "object": "chat.completion.chunk"}
        head["system_fingerprint"] = self._job.served.fingerprint
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        first = [chunk(0, {"role": "assistant", "content": ""})]
        async with aclosing(self._chunks()) as batches:
            async for chunks in batches:
                if first or chunks:
                    yield b"".join(event({**head, "choices": [one], **usage}) for one in first + chunks)
                first = []
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage()})

    def usage(self) -> dict[str, Any]:
        """The sums over the rounds so far, of the prompts too: each was read, most of it from the cache."""
        usage = usage_of(self._prompt_tokens, self._answers)
        cached = sum(answer.cached_tokens for answer in self._answers)
        return {**usage, "prompt_tokens_details": {"cached_tokens": cached}}

    async def _chunks(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The chunks of the choice as they come, the last with the reason."""
        try:
            while True:
                answer, parts = self._answers[-1], list[Part]()
                async with aclosing(self._ticket.batches()) as batches:
                    async for batch in batches:
                        fresh = [part for _, news in batch for part in answer.take(news)]
                        parts += fresh
                        yield chunks_of(self._job, 0, answer, self._deltas(fresh))
                reason = end_of(answer)
                message = message_of(parts, "reasoning_content")
                if "tool_calls" not in message:
                    break
                async with aclosing(self._results(message["tool_calls"])) as results:
                    told = []
                    async for result in results:
                        told.append(result.message())
                        yield [chunk(0, {"tool_events": [_event(result)]})]
                if not await self._go_on([message, *told]):
                    reason = "length"
                    break
            yield [chunk(0, {}, reason)]
        finally:
            self._stay.cancel()
            self._leave_tools()

    def _ask(self, job: ChatJob) -> Ticket:
        ticket = job.submit(self._stay)
        self._job = job
        self._answers += job.answers()
        self._prompt_tokens += len(job.ids)
        return ticket

    async def _go_on(self, messages: list[dict[str, Any]]) -> bool:
        """Begins the next round, after the last one's `messages`; whether there is room for its answer."""
        changes: dict[str, Any] = {"messages": [*self._body.messages, *messages]}
        left = self._left()
        if left is not None:
            if left < 1:
                return False
            changes["max_completion_tokens"] = left
        if self._loop.ended is not None:
            changes["tool_choice"] = "none"
        self._body = self._body.model_copy(update=changes)
        try:
            self._ticket = self._ask(await prepared(self._body, self._job.served, self._settings))
        except ApiError as error:
            if error.code == "context_length_exceeded":
                return False
            raise
        return True

    def _left(self) -> int | None:
        """How many tokens the rounds to come may have together."""
        return None if self._budget is None else self._budget - sum(one.tokens for one in self._answers)

    def _deltas(self, parts: list[Part]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if part.kind == "call":
                call = {"type": "call", "id": part.id, "name": part.name, "arguments": ""}
                deltas.append({"tool_events": [call]})
            elif part.kind == "arguments":  # they come with the call, which nothing but its text vouches for
                deltas[-1]["tool_events"][0]["arguments"] += part.text
            else:
                deltas.append(self._text(delta_of(part, self._job.reasoning_field)))
        return deltas

    def _text(self, delta: dict[str, Any]) -> dict[str, Any]:
        """The delta, set off from what an earlier round said."""
        ((field, text),) = delta.items()
        now = len(self._answers)
        before = self._last_said.get(field, now)
        self._last_said[field] = now
        return {field: _BETWEEN + text} if before < now else delta

    async def _results(self, calls: list[dict[str, Any]]) -> AsyncGenerator[Result, None]:
        """Runs the calls; each gets a result."""
        left = self._left()
        waiting = {call["id"]: call["function"]["name"] for call in calls}
        if left is not None and left < 1:
            why = "the answer has no tokens left"
        else:
            await self._take_place(calls)
            self._errand = Errand(self._loop, calls)
            patience = max(SECONDS - self._spent, 0.0) + _LATE
            try:
                async with aclosing(self._errand.results(self._stay, patience)) as results:
                    async for result, outcome in results:
                        self._spent += result.seconds
                        self._count(waiting.pop(result.id), outcome)
                        yield result
            except TookTooLong:
                self._loop.ended = f"the tools took more than {SECONDS:g} s"
                self._leave_tools()
            why = self._loop.ended or "the tools ended"
        for number, name in waiting.items():
            self._count(name, "not_run")
            yield Result(number, name, f"error: not finished: {why}", True, 0.0)

    def _count(self, name: str, outcome: str) -> None:
        tool = name if name in self._box.tools else _UNKNOWN
        self._job.served.metrics.tool_calls[tool, outcome] += 1

    async def _take_place(self, calls: list[dict[str, Any]]) -> None:
        """Waits until one more sandbox is allowed, if the calls need the request's first."""
        if self._has_place or not self._box.needs_sandbox(calls):
            return
        places = self._tools.places
        taken = asyncio.ensure_future(places.acquire())
        try:
            await self._stay.wait(taken)
            self._has_place = True
        finally:
            if not self._has_place and taken.done() and not taken.cancelled():
                places.release()

    def _leave_tools(self) -> None:
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


def _event(result: Result) -> dict[str, Any]:
    told = {"id": result.id, "name": result.name, "content": result.text, "is_error": result.error}
    return {"type": "result", **told, "seconds": round(result.seconds, 3)}
