"""A model behind an OpenAI-compatible address: a chat completion's stream as the events of a conversation."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from kllm.chat.background import Background
from kllm.chat.deltas import DeltaReader, as_chunk
from kllm.chat.model import NEVER, Called, ContextFull, Message, Said, Settings
from kllm.errors import KllmError, UserError
from kllm.http_client import Connection, Target, error_of, no_answer, request
from kllm.tokenizer.messages import wire
from kllm.tokenizer.parts import Part

T = TypeVar("T")

_PROBE_SECONDS = 15.0
_SILENCE = 600.0  # seconds without a byte: a large model reads a long prompt
_MALFORMED = (ValueError, AttributeError, TypeError, LookupError, RecursionError)
_FULL = re.compile(r"context_length_exceeded|exceed_context_size|context (length|size|window)", re.I)


class RemoteModel:
    """Talks to a server.

    Args:
        url: base URL, with or without `/v1` (or another version) or `/chat/completions`.
        key: sent as a bearer token.
        model: its name at the server; None takes the only one that is listed.

    Raises:
        UserError: no such address, a wrong key, no model of that name or several to choose from.
        KllmError: nobody answers there.
    """

    def __init__(self, url: str, *, key: str | None = None, model: str | None = None) -> None:
        self._target = Target.parse(url, key, where="flag --base-url").versioned()
        self.context: int | None = None
        rows = self._listed()
        self.names = tuple(rows)
        self.name = model or self._only(list(rows))
        if rows and self.name not in rows:
            hint = f"it lists {_some(list(rows))}"
            raise UserError(f"no model named {self.name!r}", where=self._target.url, hint=hint)
        row = rows.get(self.name, {})
        self._runs_tools = row.get("owned_by") == "kllm"  # other servers refuse fields that they do not know
        limit = row.get("max_model_len")
        self.context = limit if isinstance(limit, int) else None

    def describe(self) -> str:
        """Where it is."""
        context = f", context {self.context:,}" if self.context else ""
        return f"at {self._target.url}{context}"

    def shows(self, tools: list[dict[str, Any]]) -> bool:
        """See `ChatModel.shows`: its server's affair."""
        return True

    def close(self) -> None:
        """Every question has a connection of its own."""

    def prompt(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, settings: Settings
    ) -> str:
        """See `ChatModel.prompt`. kllm's and vLLM's servers tell it."""
        status, _, raw = _wait(
            request(
                self._target,
                "POST",
                "/chat/completions/render",
                self._body(messages, tools, settings, True),
                _PROBE_SECONDS,
            )
        )
        try:
            found = json.loads(raw)
            text = found.get("prompt") if status == 200 else None
        except (ValueError, AttributeError):
            text = None
        if not isinstance(text, str):
            raise UserError("this server does not show its prompts", where=self._target.url)
        return text

    def ask(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        settings: Settings,
        *,
        calls: bool = True,
        interrupted: Callable[[], bool] = NEVER,
    ) -> Iterator[Part | Called | Said]:
        """See `ChatModel.ask`."""
        body = self._body(messages, tools, settings, calls)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        reader = DeltaReader()
        with Background(self._stream(body)) as chunks:
            for chunk in chunks:
                if chunk is not None:
                    try:
                        parts = [*reader.take(chunk)]
                    except _MALFORMED as error:
                        raise self._malformed(error) from None
                    yield from parts
                if interrupted():
                    reader.reason = "cancelled"
                    break
        yield from reader.finish()
        yield reader.said()

    def _body(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        settings: Settings,
        calls: bool,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.name, "messages": [wire(message) for message in messages]}
        body |= {name: value for name, value in settings.sampling.items() if value is not None}
        if tools:
            body["tools"] = tools
            if not calls:
                body["tool_choice"] = "none"
        elif not calls and self._runs_tools:
            body["server_tools"] = False
        if settings.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
        return body

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        connection = Connection(self._target, "POST", "/chat/completions", body, patience=_SILENCE)
        where = f"{self._target.url}/chat/completions"
        ended = False
        try:
            async with connection as answer:
                if answer.status != 200 or "event-stream" not in answer.headers.get("content-type", ""):
                    raw = b"".join([piece async for piece in answer.pieces()])
                    if answer.status != 200:
                        raise self._refusal(answer.status, raw)
                    whole = json.loads(raw)
                    if not whole.get("choices") and whole.get("error"):
                        raise KllmError(f"the server gave up: {error_of(raw)[0]}", where=self._target.url)
                    yield as_chunk(whole)
                    return
                async for data in answer.events(connection.touch):
                    if data == b"[DONE]":
                        return
                    chunk = json.loads(data)
                    if error := chunk.get("error"):
                        words = error.get("message") if isinstance(error, dict) else error
                        raise KllmError(f"the server gave up: {words}", where=self._target.url)
                    ended = ended or any(c.get("finish_reason") for c in chunk.get("choices") or ())
                    yield chunk
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            if ended:  # some servers hang up without a last word
                return
            raise no_answer(error, self._target, where, _SILENCE if connection.starved else None) from None
        except _MALFORMED as error:
            raise self._malformed(error) from None
        if not ended:
            raise KllmError("the answer was cut off", where=where)

    def _malformed(self, error: Exception) -> KllmError:
        return KllmError(
            f"not a chat completion: {error!r:.100}", where=f"{self._target.url}/chat/completions"
        )

    def _refusal(self, status: int, raw: bytes) -> KllmError:
        message, code = error_of(raw)
        where = self._target.url
        if status in (401, 403):
            what = "wrong key" if self._target.key else "it wants a key"
            return UserError(
                f"{what} (http {status})", where=where, hint="set KLLM_API_KEY or --api-key-file"
            )
        said = f": {message}" if message else ""
        if status in (400, 413) and _FULL.search(f"{code} {raw[:4000]!r}"):
            return ContextFull(message, where=where)
        if 300 <= status < 400:
            return UserError(f"it has moved (http {status})", where=where, hint="give the new address")
        if status in (404, 405):
            return UserError(f"no such model or address (http {status}{said})", where=where)
        return KllmError(f"http {status}{said}", where=where)

    def _listed(self) -> dict[str, dict[str, Any]]:
        """The server's models by name; {} if it does not say."""
        status, _, raw = _wait(request(self._target, "GET", "/models", None, _PROBE_SECONDS))
        if status in (401, 403) or 300 <= status < 400 or status >= 500:
            raise self._refusal(status, raw)
        if status != 200:
            return {}  # some servers list nothing
        try:
            return {str(row["id"]): row for row in json.loads(raw)["data"]}
        except (ValueError, LookupError, TypeError):
            hint = "is the address right?"
            raise UserError("it is no OpenAI-compatible server", where=self._target.url, hint=hint) from None

    def _only(self, names: list[str]) -> str:
        if len(names) == 1:
            return names[0]
        if not names:
            raise UserError(
                "it lists no models", where=self._target.url, hint="name one: kllm chat NAME --base-url URL"
            )
        hint = f"kllm chat NAME --base-url URL; it lists {_some(names)}"
        raise UserError("which of its models?", where=self._target.url, hint=hint)


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"


def _wait(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)
