"""POST /v1/responses: the stateless part of OpenAI's Responses API, on top of the chat machinery."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, WithJsonSchema
from starlette.responses import JSONResponse

from kllm.engine.answer import Answer, usage_of
from kllm.serve.body import parsed, validated
from kllm.serve.errors import ApiError, internal_error
from kllm.serve.fields import Fields, Flag, Integer, Number, Text
from kllm.serve.job import ChatJob, ChatRequest, prepared
from kllm.serve.messages import MAX_MESSAGES
from kllm.serve.openapi import described
from kllm.serve.response_input import (
    format_of,
    messages_of,
    tool_choice_of,
    tools_of,
    translated,
    unsupported,
)
from kllm.serve.response_output import OutputWriter, new_id
from kllm.serve.runtime import until_disconnect
from kllm.serve.sse import EventStream, event

if TYPE_CHECKING:
    from kllm.serve.registry import Served
    from kllm.serve.settings import Settings
    from kllm.serve.ticket import Ticket

router = APIRouter()

_ITEMS = {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": {"type": "object"}}
_INPUT_SCHEMA = {"anyOf": [{"type": "string"}, _ITEMS]}
_LOGPROBS = "message.output_text.logprobs"


class Reasoning(Fields):
    """How much to think: effort `none` switches it off."""

    effort: Text | None = None


class TextOptions(Fields):
    """What the text must be: `format` is of type text, json_object or json_schema."""

    format: dict[str, Any] | None = None


class ResponseRequest(Fields):
    """A request without memory: all that the model is to know is in it."""

    model: Text | None = Field(None, description="A name from /v1/models; the first one if absent.")
    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="A user's words, or messages, function calls, their outputs and reasoning."
    )
    instructions: Text | None = Field(None, description="Goes first, as a system message.")
    max_output_tokens: Integer | None = Field(None, ge=1, description="Cut to what the context leaves.")
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, ge=0, le=1, description="0 is greedy.")
    seed: Integer | None = None
    tools: list[Any] | None = Field(None, description="Functions only.")
    tool_choice: Any = None
    parallel_tool_calls: Flag = True
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = Field(None, description="Comes back as it is.")
    stream: Flag = False
    store: Flag = Field(False, description="Only false is supported.")
    background: Flag = Field(False, description="Only false is supported.")
    previous_response_id: Text | None = Field(None, description="Not supported.")
    conversation: Any = Field(None, description="Not supported.")
    prompt: Any = Field(None, description="Not supported.")
    truncation: Text | None = Field(None, description="Only disabled is supported.")
    top_logprobs: Integer | None = Field(None, description="Only 0 is supported.")
    include: list[Any] | None = None

    def check(self) -> None:
        """Refuses what needs memory, and other parts of the API that are not there.

        Raises:
            ApiError: 400 `unsupported`.
        """
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                raise unsupported(name, name)
        for name in ("background", "store"):
            if getattr(self, name):
                raise unsupported(f"{name}: true", name)
        if self.truncation not in (None, "disabled"):
            raise unsupported("truncation other than disabled", "truncation")
        if self.top_logprobs or _LOGPROBS in (self.include or ()):
            raise unsupported("logprobs", "top_logprobs" if self.top_logprobs else "include")
        if not isinstance(self.input, (str, list)) or self.input == []:
            raise ApiError(400, "input must be a string or a list of items, not empty", param="input")

    def chat(self) -> ChatRequest:
        """The chat request that means the same.

        Raises:
            ApiError: 400.
        """
        fields = {
            "model": self.model,
            "messages": messages_of(self.instructions, self.input),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "tools": tools_of(self.tools),
            "tool_choice": tool_choice_of(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = format_of(self.text.format)
        return validated(fields, ChatRequest)


class ResponseAnswer(BaseModel):
    """The whole answer; more fields than these repeat the request."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


@router.post("/v1/responses", **described(ResponseRequest, ResponseAnswer, stream=True))
async def responses(request: Request) -> Any:
    """The model's next turn."""
    body = await parsed(request, ResponseRequest)
    body.check()
    state = request.app.state
    served: Served = state.registry.get(body.model)
    try:
        job = await prepared(body.chat(), served, state.settings)
        ticket = job.submit()
    except ApiError as e:
        raise translated(e) from None
    writer = ResponseWriter(body, job, state.settings)
    if body.stream:
        events = _stream(writer, ticket)
        return EventStream(events, ticket.cancel, done=False, failed=writer.failed)
    return JSONResponse(await until_disconnect(request, _whole(writer, ticket), ticket))


class ResponseWriter:
    """The response object and the numbered events of one request.

    Args:
        body: what was asked.
        job: the same, ready for the engine.
        settings: of the server.
    """

    def __init__(self, body: ResponseRequest, job: ChatJob, settings: Settings) -> None:
        self.answer: Answer = job.answers()[0]
        self.output = OutputWriter()
        self._job = job
        self._number = 0
        form = body.text.format if body.text else None
        params = job.params[0]
        self._head = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": job.head["created"],
            "model": job.head["model"],
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_p": params.top_p,
            "truncation": "disabled",
        }

    def events(self, batch: Iterable[tuple[int, Any]]) -> list[dict[str, Any]]:
        """The output's events for a batch of the engine's."""
        found: list[dict[str, Any]] = []
        for _, news in batch:
            found += self.output.take(self.answer.take(news))
        reason = self.answer.finish_reason
        if reason is not None:
            if reason not in ("stop", "length", "tool_calls"):
                raise internal_error()
            found += self.output.finish(reason != "length")
        return found

    def response(self, *, ended: bool) -> dict[str, Any]:
        """The response object, as it stands or at the end."""
        status, usage, cut = "in_progress", None, None
        if ended:
            length = self.answer.finish_reason == "length"
            status, cut = ("incomplete", {"reason": "max_output_tokens"}) if length else ("completed", None)
            usage = _usage(usage_of(len(self._job.ids), [self.answer]))
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": list(self.output.items) if ended else [],
            "usage": usage,
        }

    def lifecycle(self, kind: str, *, ended: bool = False) -> dict[str, Any]:
        """`response.created` and the like."""
        return {"type": f"response.{kind}", "response": self.response(ended=ended)}

    def encoded(self, data: dict[str, Any]) -> bytes:
        """An event with its number, as it is sent."""
        number, self._number = self._number, self._number + 1
        return event({"type": data["type"], "sequence_number": number, **data}, data["type"])

    def failed(self, error: ApiError) -> bytes:
        """The event for what goes wrong in mid-stream."""
        plain = {"code": error.code, "message": error.message, "param": error.param}
        return self.encoded({"type": "error", **plain, **error.body()})


async def _whole(writer: ResponseWriter, ticket: Ticket) -> dict[str, Any]:
    async for batch in ticket.batches():
        writer.events(batch)
    return writer.response(ended=True)


async def _stream(writer: ResponseWriter, ticket: Ticket) -> AsyncIterator[bytes]:
    begun = False
    async for batch in ticket.batches():
        news = [] if begun else [writer.lifecycle("created"), writer.lifecycle("in_progress")]
        begun = True
        news += writer.events(batch)
        yield b"".join(map(writer.encoded, news))
    last = writer.response(ended=True)
    yield writer.encoded({"type": f"response.{last['status']}", "response": last})


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Chat's figures under this API's names."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
