"""A chat request: its fields, its checks, and what it is once it is ready for the engine."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kllm.engine.answer import Answer, Reading, no_calls
from kllm.errors import UserError
from kllm.serve.errors import ApiError, from_user_error, internal_error
from kllm.serve.fields import Flag, Integer, SamplingFields, room
from kllm.serve.logprobs import chat_entry
from kllm.serve.prompt import SECONDS, rendered
from kllm.serve.servertools import ServerToolFields
from kllm.serve.structured import Grammar, compiled
from kllm.serve.tools import ToolPlan, tool_plan
from kllm.serve.worker import TookTooLong, limited
from kllm.tokenizer.thinking import END_THINK

if TYPE_CHECKING:
    from kllm.engine.params import SamplingParams
    from kllm.serve.registry import Served
    from kllm.serve.settings import Settings
    from kllm.serve.stay import Stay
    from kllm.serve.ticket import Ticket
    from kllm.tokenizer.tokenizer import Tokenizer


class ChatRequest(SamplingFields, ServerToolFields):
    """A conversation, and how its next message is to be written."""

    max_tokens: Integer | None = Field(None, ge=1, description="Cut to what the context leaves.")
    max_completion_tokens: Integer | None = Field(None, ge=1, description="Goes before max_tokens.")
    parallel_tool_calls: Flag = True
    logprobs: Flag = False
    top_logprobs: Integer | None = Field(None, ge=0, le=20, description="Needs logprobs.")

    def check(self, max_n: int) -> None:
        """What several fields say together.

        Raises:
            ApiError: 400.
        """
        super().check(max_n)
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs: true", param="top_logprobs")


@dataclass(frozen=True)
class ChatJob:
    """A request that is checked and ready for the engine.

    Attributes:
        ids: the prompt's tokens.
        params: one per choice.
        reading: how the answers are read.
        reasoning_field: where thinking goes.
        logprobs: whether they were asked for.
        head: what the answer and every chunk begin with, but for `object`.
    """

    served: Served
    ids: list[int]
    params: list[SamplingParams]
    reading: Reading
    reasoning_field: str
    logprobs: bool
    head: dict[str, Any]

    def submit(self, stay: Stay | None = None) -> Ticket:
        """Admits it, or starts it as a round of a request that is admitted.

        Raises:
            ApiError: 429, 503.
        """
        return self.served.runtime.submit([self.ids] * len(self.params), self.params, stay=stay)

    def answers(self) -> list[Answer]:
        """A fresh one per choice."""
        return [Answer(self.reading) for _ in self.params]


async def prepared(body: ChatRequest, served: Served, settings: Settings) -> ChatJob:
    """Everything that can go wrong before the first token: checks, prompt, grammar, parameters.

    Raises:
        ApiError: 400.
    """
    body.check(settings.max_n)
    plan, grammar = await _restrictions(body)
    if plan.forced is not None and body.structured_outputs is not None:
        message = "structured_outputs and a tool_choice that forces a call exclude each other"
        raise ApiError(400, message, param="structured_outputs")
    runtime = served.runtime
    prompt = await rendered(body, runtime, settings)
    wanted = body.max_completion_tokens or body.max_tokens
    limit = room(runtime.max_context, len(prompt.ids), wanted)
    tokenizer = runtime.tokenizer
    assert tokenizer is not None  # it rendered the prompt
    reading = Reading(
        tokenizer,
        thinking=prompt.thinking,
        split=settings.reasoning_field != "none",
        parsed=plan.parsed,
        guaranteed=plan.forced is not None,
        several=plan.several,
        prompt=prompt.ids,
        constrained=grammar is not None and plan.forced is None,
        stop_ids=frozenset(
            (*tokenizer.stop_token_ids, *(body.stop_token_ids or ()), *_stop_tokens(body, tokenizer))
        ),
    )
    if plan.forced is not None:
        grammar = _tool_grammar(plan)
    after = END_THINK if prompt.thinking else None
    params = body.sampling(
        limit,
        vocab_size=runtime.engine.shape.vocab_size,
        defaults=served.generation_config,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=None if grammar is None else await compiled(runtime, grammar, after),
        shown=reading.shown(),
        banned=[token for token, _ in no_calls(tokenizer)] if plan.banned else [],
        adapter=served.adapter,
    )
    if plan.forced is not None:  # a stop string inside its JSON would cut the call
        params = [replace(one, stop=()) for one in params]
    try:
        runtime.engine.check(prompt.ids, params[0])
    except UserError as e:
        error = from_user_error(e)
        raise ApiError(
            400, error.message, param="messages" if error.param == "prompt" else error.param
        ) from None
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.model or served.name,
    }
    return ChatJob(served, prompt.ids, params, reading, settings.reasoning_field, body.logprobs, head)


async def _restrictions(body: ChatRequest) -> tuple[ToolPlan, Grammar | None]:
    """What tools and formats demand of the answer; large schemas take a while to check."""

    def both() -> tuple[ToolPlan, Grammar | None]:
        return tool_plan(body.tools, body.tool_choice, body.parallel_tool_calls), body.grammar()

    try:
        return await limited(SECONDS, both)
    except TookTooLong:
        raise ApiError(400, f"the schemas take longer than {SECONDS:g} s to check", param="tools") from None


def _stop_tokens(body: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """Stop strings that are control tokens: the engine stops at the token."""
    special = tokenizer.special_tokens
    return [special[stop] for stop in body.stop or () if stop in special]


def _tool_grammar(plan: ToolPlan) -> Grammar:
    forced, several = plan.forced or [], plan.several
    return Grammar(lambda compiler, after: compiler.tools(forced, repeat=several, after=after), "tools")


def chunks_of(job: ChatJob, index: int, answer: Answer, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chunks of one choice for what an event brought, but for the one that says that it has ended."""
    chunks = [chunk(index, delta) for delta in deltas]
    if chunks or answer.finish_reason:
        # The log-probabilities go with the last piece of the text that they belong to.
        logprobs = logprobs_of(job, answer)
        if logprobs is not None and logprobs["content"]:
            if not chunks:
                chunks.append(chunk(index, {"content": ""}))
            chunks[-1]["logprobs"] = logprobs
    return chunks


def chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """A choice as a stream's chunks have it."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def end_of(answer: Answer) -> str:
    """The reason why it has ended.

    Raises:
        ApiError: 500, it was given up.
    """
    if answer.finish_reason not in ("stop", "length", "tool_calls"):
        raise internal_error()
    return answer.finish_reason


def logprobs_of(job: ChatJob, answer: Answer) -> dict[str, Any] | None:
    """The object for what was given out since the last call; None where it was not asked for."""
    if not job.logprobs:
        return None
    shown, tokenizer = job.reading.shown(), job.reading.tokenizer
    content = [chat_entry(tokenizer, entry, shown=shown) for entry in answer.pop_entries()]
    if answer.overhang and content:
        text = bytes(content[-1]["bytes"]).decode("utf-8", "replace")
        content[-1]["bytes"] = list(text[: -answer.overhang].encode())
    return {"content": content, "refusal": None}
