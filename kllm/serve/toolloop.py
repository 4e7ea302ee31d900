"""A chat request that the model and the server's tools answer together.

Ask; run what the answer calls; ask again with the results; at the latest when the limits are reached a
last time with calls banned. To the client it is one answer: its text is the rounds' texts, its usage the
sum of what the rounds took, its reason the last round's. What was called and what came of it is told in
`tool_events`, an extension that no client mistakes for calls that it should run.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kllm.engine.answer import delta_of, message_of, usage_of
from kllm.serve.calling import Caller
from kllm.serve.errand import ServerBox, too_deep
from kllm.serve.errors import ApiError, ClientGone
from kllm.serve.job import ChatJob, ChatRequest, chunk, chunks_of, end_of, prepared
from kllm.serve.roundanswer import RoundAnswer, taken, without_stops
from kllm.serve.sse import event
from kllm.tokenizer.parts import Part
from kllm.tools.loop import Result

if TYPE_CHECKING:
    from kllm.serve.registry import Served
    from kllm.serve.servertools import ServerTools
    from kllm.serve.settings import Settings
    from kllm.serve.stay import Stay
    from kllm.serve.ticket import Ticket
    from kllm.tools.tool import Tool

_BETWEEN = "\n\n"  # the texts of two rounds
log = logging.getLogger("kllm.serve")


class Rounds:
    """One request that is admitted: `begin` makes it, `whole` or `stream` gives its answer.

    Args:
        body: the request, with the tools that it gets.
        job: its first round.
        settings: of the server.
        caller: runs the calls.
        stay: its place.
    """

    def __init__(
        self, body: ChatRequest, job: ChatJob, settings: Settings, caller: Caller, stay: Stay
    ) -> None:
        self._body, self._job, self._settings, self._stay = body, job, settings, stay
        self._head = job.head
        self._budget = body.max_completion_tokens or body.max_tokens
        self._caller = caller
        self._answers: list[RoundAnswer] = []
        self._prompt_tokens = 0
        self._last_said: dict[str, int] = {}  # field of the message -> round
        self._ticket = self._ask(job)

    @classmethod
    async def begin(
        cls, body: ChatRequest, served: Served, settings: Settings, tools: ServerTools, chosen: list[Tool]
    ) -> Rounds:
        """Checks and admits a request that has `chosen` of the server's tools.

        Raises:
            ApiError: 400, 429, 503.
        """
        job = await prepared(body, served, settings)
        stay = served.runtime.admit(served.adapter)
        try:
            box = ServerBox(chosen, tools.unsafe_python, lambda: stay.ended)
            return cls(body, job, settings, Caller(box, tools, stay, served.metrics), stay)
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
                        fresh = taken(answer, batch)
                        parts += fresh
                        yield chunks_of(self._job, 0, answer, self._deltas(fresh))
                        if answer.stopped:
                            break
                reason = end_of(answer)
                message = message_of(parts, "reasoning_content")
                if "tool_calls" not in message:
                    break
                refusal = self._refusal(answer)
                async with aclosing(self._caller.results(message["tool_calls"], refusal)) as results:
                    told = []
                    async for result in results:
                        told.append(result.message())
                        yield [chunk(0, {"tool_events": [_event(result)]})]
                if answer.stopped:
                    reason = "stop"
                    break
                if not await self._go_on([_acceptable(message), *told]):
                    reason = "length"
                    break
            self._stay.reason = reason
            yield [chunk(0, {}, reason)]
        except Exception as error:
            if not isinstance(error, ClientGone) and getattr(error, "status", 500) == 500:
                self._stay.reason = "error"
            raise
        finally:
            self._stay.cancel()
            self._caller.leave()

    def _ask(self, job: ChatJob) -> Ticket:
        params, answer = without_stops(job.params[0], job.reading)
        self._job = job = replace(job, params=[params])
        ticket = job.submit(self._stay)
        self._answers.append(answer)
        self._prompt_tokens += len(job.ids)
        return ticket

    async def _go_on(self, messages: list[dict[str, Any]]) -> bool:
        """Begins the next round, after the last one's `messages`; False if there can be none.

        Raises:
            ApiError, ClientGone: the request has ended.
        """
        changes: dict[str, Any] = {"messages": [*self._body.messages, *messages]}
        left = self._left()
        if left is not None:
            if left == 0:
                return False
            changes["max_completion_tokens"] = left
        if self._caller.ended:
            changes["tool_choice"] = "none"
        self._body = self._body.model_copy(update=changes)
        try:
            self._ticket = self._ask(await prepared(self._body, self._job.served, self._settings))
        except ApiError as error:
            if error.status != 400:
                raise
            # The client's messages were fine: what is wrong is what the model and its tools made of them.
            if error.code != "context_length_exceeded":
                log.warning("an answer ends after its calls: %s", error.message)
            return False
        return True

    def _refusal(self, answer: RoundAnswer) -> str | None:
        """Why its calls are not run; None if they are."""
        if answer.stopped:
            return "not run: the answer has ended"
        return "not finished: the answer has no tokens left" if self._left() == 0 else None

    def _left(self) -> int | None:
        """How many tokens the rounds to come may have together."""
        if self._budget is None:
            return None
        return max(0, self._budget - sum(one.tokens for one in self._answers))

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


def _acceptable(message: dict[str, Any]) -> dict[str, Any]:
    """The model's message as one that may be among a request's: what was too deep to be run is left out."""
    calls = [
        {**call, "function": {**call["function"], "arguments": "{}"}}
        if too_deep(call["function"]["arguments"])
        else call
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _event(result: Result) -> dict[str, Any]:
    told = {"id": result.id, "name": result.name, "content": result.text, "is_error": result.error}
    return {"type": "result", **told, "seconds": round(result.seconds, 3)}
