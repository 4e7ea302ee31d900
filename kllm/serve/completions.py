"""POST /v1/completions: raw text in, text out, with everything lm-evaluation-harness reads."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from starlette.responses import JSONResponse

from kllm.serve.body import parsed
from kllm.serve.errors import ApiError
from kllm.serve.fields import MAX_STOP_CHARS, Flag, Integer, SamplingFields, Text, refused, room
from kllm.serve.inputs import Item, TextOrTokens, encoded, tokenizer_of
from kllm.serve.logprobs import CompletionLogprobs, continuation, joined
from kllm.serve.openapi import described
from kllm.serve.runtime import until_disconnect
from kllm.serve.sse import EventStream, event
from kllm.serve.structured import StructuredFields, compiled

if TYPE_CHECKING:
    from kllm.engine.grammar import Constraint
    from kllm.engine.params import Event, SamplingParams, TokenLogprob
    from kllm.serve.registry import Served
    from kllm.serve.runtime import Ticket
    from kllm.tokenizer.tokenizer import Tokenizer

MAX_STOPS = 64  # evaluation tasks list more of them than chat clients do

router = APIRouter()


def _stops(value: Any) -> list[str]:
    given = value if isinstance(value, list) else [value]
    stops = [stop for stop in given if stop is not None]
    if not all(isinstance(stop, str) for stop in stops):
        raise refused("stop must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise refused(f"stop holds {len(stops)} strings; at most {MAX_STOPS} are allowed")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise refused(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return stops


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOPS_SCHEMA = {"anyOf": [_STOP, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP}]}


class CompletionRequest(SamplingFields, StructuredFields):
    """A request for text that continues each prompt."""

    prompt: TextOrTokens = Field(description="Control tokens that a text spells out are read as such.")
    max_tokens: Integer = Field(16, ge=0, description="0 is allowed with echo.")
    echo: Flag = Field(False, description="Put the prompt in front of the text.")
    logprobs: Integer | None = Field(None, ge=0, le=20)
    stop: Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(_STOPS_SCHEMA)] | None = None
    suffix: Text | None = Field(None, description="Not supported.")
    best_of: Integer | None = Field(None, ge=1, description="Must equal n.")
    add_special_tokens: Flag = True
    return_tokens_as_token_ids: Flag = Field(False, description="Name tokens token_id:7 in logprobs.")

    def check(self, max_n: int) -> None:
        """What several fields say together.

        Raises:
            ApiError: 400.
        """
        super().check(max_n)
        if self.suffix:
            raise ApiError(400, "suffix is not supported: these models write forward only", param="suffix")
        if self.best_of is not None and self.best_of != self.n:
            raise ApiError(400, f"best_of must equal n ({self.n}), or be left out", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be at least 1, or 0 with echo: true", param="max_tokens")


class CompletionAnswer(BaseModel):
    """The whole answer."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    system_fingerprint: str | None


@dataclass
class Usage:
    """Tokens of one request; `prompt` is counted once for all its choices."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def json(self) -> dict[str, Any]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Choice:
    """One answer while it is written: turns the engine's events into parts to send.

    Whole answers and streams are both the sum of these parts.
    """

    index: int
    tokenizer: Tokenizer
    prompt: str
    """What is echoed, "" for nothing."""
    prompt_ids: list[int]
    logprobs: CompletionLogprobs | None
    echo: bool
    _begun: bool = False
    _spoken: bool = False
    _sent: int = 0
    _held: list[TokenLogprob] = field(default_factory=list)
    _first: list[int] = field(default_factory=list)  # tokens before the first text

    def take(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """The parts that `events` complete: none, one, or the echoed prompt and one."""
        parts = []
        if not self._begun:
            self._begun = True
            if self.echo:
                parts.append(self._part(self.prompt, self._prompt_logprobs(events[0]), None))
        text = self._continued("".join(e.text for e in events), events)
        reason = next((e.finish_reason for e in events if e.finish_reason), None)
        for e in events:
            self._held += e.logprobs
        if text or reason:
            # Tokens of half a character or of a possible stop string wait for the text they belong to.
            logprobs = self.logprobs.add(self._held) if self.logprobs else None
            self._held = []
            parts.append(self._part(text, logprobs, reason))
        return parts

    def _continued(self, text: str, events: Sequence[Event]) -> str:
        """`text` with the space that SentencePiece drops at the start of a text: this is not its start."""
        if self._spoken:
            return text
        self._first += [token for e in events for token in e.token_ids]
        self._spoken = bool(text)
        if not text or text.startswith(" "):
            return text
        decoder = continuation(self.tokenizer, self.prompt_ids)
        lost = "".join(map(decoder.put, self._first)).startswith(" ")
        return " " + text if lost else text

    def _prompt_logprobs(self, first: Event) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        entries = first.prompt_logprobs or (None,) * len(self.prompt_ids)
        return self.logprobs.prompt(self.prompt_ids, entries, self.prompt)

    def _part(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        self._sent += len(text)
        if logprobs and reason:  # tokens of a stop string lie behind the text's end
            logprobs["text_offset"] = [min(at, self._sent) for at in logprobs["text_offset"]]
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


@router.post("/v1/completions", **described(CompletionRequest, CompletionAnswer, stream=True))
async def completions(request: Request) -> Any:
    """Continues each prompt; choice index = prompt × n + k."""
    body = await parsed(request, CompletionRequest)
    served: Served = request.app.state.registry.get(body.model)
    body.check(request.app.state.settings.max_n)
    engine = served.runtime.engine
    prompts = await encoded(
        body.prompt,
        engine,
        param="prompt",
        spare=1 if body.max_tokens else 0,
        add_special_tokens=body.add_special_tokens,
        keep=body.truncate_prompt_tokens,
    )
    grammar = await asyncio.to_thread(body.grammar)
    constraint = None if grammar is None else await compiled(served.runtime, grammar, None)
    each, params = _requests(body, served, prompts, constraint)
    choices = await asyncio.to_thread(_choices, body, tokenizer_of(engine), prompts)
    ticket = served.runtime.submit(each, params)
    usage = Usage(prompt=sum(map(len, prompts)))
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model or served.name,
        "system_fingerprint": served.fingerprint,
    }
    if body.stream:
        return EventStream(_stream(body, head, choices, usage, ticket), ticket.cancel)
    return await until_disconnect(request, _whole(head, body.n, choices, usage, ticket), ticket)


def _requests(
    body: CompletionRequest, served: Served, prompts: list[list[int]], constraint: Constraint | None
) -> tuple[list[list[int]], list[SamplingParams]]:
    """One engine request per choice: its prompt and its parameters."""
    engine = served.runtime.engine
    each: list[list[int]] = []
    params: list[SamplingParams] = []
    for ids in prompts:
        limit = room(engine.max_context, len(ids), body.max_tokens, what="prompt") if body.max_tokens else 0
        params += body.sampling(
            limit,
            vocab_size=engine.shape.vocab_size,
            defaults=served.generation_config,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            constraint=constraint,
            adapter=served.adapter,
        )
        each += [ids] * body.n
    return each, params


def _choices(body: CompletionRequest, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[Choice]:
    choices: list[Choice] = []
    for item, ids in zip(body.prompt, prompts, strict=True):
        echoed = _echoed(body, tokenizer, item, ids) if body.echo else ""
        for _ in range(body.n):
            writer = None
            if body.logprobs is not None:
                as_ids = body.return_tokens_as_token_ids
                writer = CompletionLogprobs(tokenizer, as_ids=as_ids, prompt=ids, start=len(echoed))
            choices.append(Choice(len(choices), tokenizer, echoed, ids, writer, body.echo))
    return choices


def _echoed(body: CompletionRequest, tokenizer: Tokenizer, item: Item, ids: list[int]) -> str:
    """The prompt as it is sent back: the text as it came, or what the ids stand for."""
    if isinstance(item, str) and body.truncate_prompt_tokens is None:
        return item
    return tokenizer.decode(ids, skip_special_tokens=False)


def _count(usage: Usage, n: int, index: int, events: Iterable[Event]) -> None:
    for e in events:
        usage.completion += len(e.token_ids)
        usage.cached += e.cached_tokens if index % n == 0 else 0


def _by_choice(batch: Iterable[tuple[int, Event]]) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for index, one in batch:
        found.setdefault(index, []).append(one)
    return found


async def _whole(
    head: dict[str, Any], n: int, choices: list[Choice], usage: Usage, ticket: Ticket
) -> JSONResponse:
    news = [item async for batch in ticket.batches() for item in batch]
    if choices[0].logprobs is None:
        return _assembled(head, n, choices, usage, news)
    # Twenty alternatives for each token of a long prompt are a second's work.
    return await asyncio.to_thread(_assembled, head, n, choices, usage, news)


def _assembled(
    head: dict[str, Any], n: int, choices: list[Choice], usage: Usage, news: list[tuple[int, Event]]
) -> JSONResponse:
    answers = []
    for index, events in sorted(_by_choice(news).items()):
        _count(usage, n, index, events)
        first, *rest = choices[index].take(events)
        for part in rest:
            first["text"] += part["text"]
            first["finish_reason"] = part["finish_reason"]
            if first["logprobs"] is not None:
                first["logprobs"] = joined(first["logprobs"], part["logprobs"])
        answers.append(first)
    return JSONResponse({**head, "choices": answers, "usage": usage.json()})


async def _stream(
    body: CompletionRequest, head: dict[str, Any], choices: list[Choice], usage: Usage, ticket: Ticket
) -> AsyncIterator[bytes]:
    extra = {"usage": None} if body.include_usage else {}
    async for batch in ticket.batches():
        chunks = []
        for index, news in batch:
            _count(usage, body.n, index, [news])
            parts = choices[index].take([news])
            chunks += [event({**head, "choices": [part], **extra}) for part in parts]
        if chunks:
            yield b"".join(chunks)
    if body.include_usage:
        yield event({**head, "choices": [], "usage": usage.json()})
