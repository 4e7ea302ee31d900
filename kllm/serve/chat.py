"""POST /v1/chat/completions: a conversation in, the assistant's next message out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse

from kllm.engine.answer import delta_of, message_of, usage_of
from kllm.serve.body import parsed
from kllm.serve.job import ChatJob, ChatRequest, chunk, chunks_of, end_of, logprobs_of, prepared
from kllm.serve.openapi import described
from kllm.serve.runtime import until_disconnect
from kllm.serve.sse import EventStream, event
from kllm.serve.toolloop import Rounds
from kllm.tokenizer.parts import Part

if TYPE_CHECKING:
    from kllm.serve.ticket import Ticket

router = APIRouter()


class ChatAnswer(BaseModel):
    """The whole answer. Where the server ran tools, the message has `tool_events` too."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    system_fingerprint: str | None


@router.post("/v1/chat/completions", **described(ChatRequest, ChatAnswer, stream=True))
async def chat_completions(request: Request) -> Any:
    """The assistant's next message."""
    body = await parsed(request, ChatRequest)
    state = request.app.state
    served = state.registry.get(body.model)
    tools = state.tools.shown_to(body)
    body = state.tools.added_to(body)
    if tools and body.tool_choice != "none":
        rounds = await Rounds.begin(body, served, state.settings, state.tools, tools)
        if body.stream:
            return EventStream(rounds.stream(body.include_usage), rounds.cancel)
        return JSONResponse(await until_disconnect(request, rounds.whole(), rounds))
    job = await prepared(body, served, state.settings)
    ticket = job.submit()
    if body.stream:
        return EventStream(_stream(job, ticket, body.include_usage), ticket.cancel)
    return JSONResponse(await until_disconnect(request, _whole(job, ticket), ticket))


async def _whole(job: ChatJob, ticket: Ticket) -> dict[str, Any]:
    answers = job.answers()
    parts: list[list[Part]] = [[] for _ in answers]
    async for batch in ticket.batches():
        for index, news in batch:
            parts[index] += answers[index].take(news)
    choices = [
        {
            "index": index,
            "message": message_of(parts[index], job.reasoning_field),
            "logprobs": logprobs_of(job, answer),
            "finish_reason": end_of(answer),
        }
        for index, answer in enumerate(answers)
    ]
    usage = usage_of(len(job.ids), answers)
    return {**job.head, "choices": choices, "usage": usage, "system_fingerprint": job.served.fingerprint}


async def _stream(job: ChatJob, ticket: Ticket, include_usage: bool) -> AsyncIterator[bytes]:
    answers = job.answers()
    head = {**job.head, "object": "chat.completion.chunk", "system_fingerprint": job.served.fingerprint}
    usage: dict[str, Any] = {"usage": None} if include_usage else {}
    begun: set[int] = set()
    async for batch in ticket.batches():
        chunks: list[dict[str, Any]] = []
        for index, news in batch:
            answer = answers[index]
            if index not in begun:
                begun.add(index)
                chunks.append(chunk(index, {"role": "assistant", "content": ""}))
            deltas = [delta_of(part, job.reasoning_field) for part in answer.take(news)]
            chunks += chunks_of(job, index, answer, deltas)
            if answer.finish_reason:
                chunks.append(chunk(index, {}, end_of(answer)))
        if chunks:
            yield b"".join(event({**head, "choices": [one], **usage}) for one in chunks)
    if include_usage:
        yield event({**head, "choices": [], "usage": usage_of(len(job.ids), answers)})
