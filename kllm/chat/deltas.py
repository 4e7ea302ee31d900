"""From the chunks of a chat completion to parts: every dialect of deltas that servers stream."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kllm.chat.model import Called, Said
from kllm.tokenizer.parts import Lexer, Mark, Part
from kllm.tokenizer.thinking import END_THINK, THINK, ThinkingSplitter

_LONE = re.compile("[\ud800-\udfff]")


class DeltaReader:
    """Reads one answer. `reason` is why it ended, as far as it was said."""

    def __init__(self) -> None:
        self.reason = "stop"
        self._usage: dict[str, Any] = {}
        self._texts = 0
        self._calls: list[_Call] = []
        self._there: dict[str, tuple[str, str]] = {}
        """Calls that the server runs itself: id -> (name, arguments)."""
        self._started = time.perf_counter()
        self._first = self._last = 0.0
        # Servers that do not tell thinking apart send its tags.
        self._lexer = Lexer({THINK: None, END_THINK: None})
        self._splitter: ThinkingSplitter | None = ThinkingSplitter(thinking=False)

    def take(self, chunk: dict[str, Any]) -> Iterator[Part | Called]:
        """What a chunk brings.

        Raises:
            ValueError, AttributeError, TypeError, LookupError: it is no chunk.
        """
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        for choice in (chunk.get("choices") or [])[:1]:
            parts = [*self._parts(choice.get("delta") or {})]
            if parts:
                self._last = time.perf_counter()
                self._first = self._first or self._last
                self._texts += 1
                yield from parts
            reason = choice.get("finish_reason")
            self.reason = reason if isinstance(reason, str) else self.reason

    def finish(self) -> Iterator[Part]:
        """What is held back, once no more comes."""
        for item in self._lexer.finish():
            yield from self._content(item)
        if self._splitter is not None:
            for left in self._splitter.finish():
                yield left if isinstance(left, Part) else Part("content", _text(left))

    def said(self) -> Said:
        """The figures; what the server does not count is counted by its chunks."""
        details = self._usage.get("prompt_tokens_details")
        end = self._last or time.perf_counter()
        first = self._first or end
        return Said(
            "tool_calls" if self._calls and self.reason == "stop" else self.reason,
            _count(self._usage.get("prompt_tokens")),
            _count(self._usage.get("completion_tokens")) or self._texts,
            first - self._started,
            end - first,
            _count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
        )

    def _parts(self, delta: dict[str, Any]) -> Iterator[Part | Called]:
        reasoning = _text(delta.get("reasoning_content") or delta.get("reasoning"))
        if reasoning:
            self._splitter = None  # the server tells thinking apart
            yield Part("reasoning", reasoning)
        content = _text(delta.get("content")) or _text(delta.get("refusal"))
        for item in self._lexer.feed(content) if self._splitter is not None else [content]:
            yield from self._content(item)
        for call in delta.get("tool_calls") or ():
            yield from self._call(call)
        for event in delta.get("tool_events") or ():
            yield from self._server_event(event)

    def _content(self, item: str | Mark) -> Iterator[Part]:
        items = [item] if self._splitter is None else self._splitter.feed(item)
        for one in items:
            part = (
                one if isinstance(one, Part) else Part("content", one.text if isinstance(one, Mark) else one)
            )
            if part.text:
                yield part

    def _call(self, delta: dict[str, Any]) -> Iterator[Part]:
        """A piece of a call. A new id is a new call; else the index or the order tells."""
        function = delta.get("function") or {}
        call = self._known(delta.get("id"), delta.get("index"))
        if call is None:
            call = _Call(delta.get("id"), delta.get("index"), number=len(self._calls))
            self._calls.append(call)
        call.name = call.name or str(function.get("name") or "")
        arguments = function.get("arguments")
        if arguments and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call.held += _text(arguments)
        yield from call.parts()

    def _known(self, number: Any, index: Any) -> _Call | None:
        if number:
            for call in self._calls:
                if call.id is None and index is not None and call.index == index:
                    call.id = number
                if call.id == number:
                    return call
            return None
        if index is not None:
            return next((call for call in reversed(self._calls) if call.index == index), None)
        return self._calls[-1] if self._calls else None

    def _server_event(self, event: dict[str, Any]) -> Iterator[Called]:
        number = str(event.get("id"))
        if event.get("type") == "call":
            self._there[number] = (_text(event.get("name")), _text(event.get("arguments")))
        elif event.get("type") == "result":
            name, arguments = self._there.pop(number, (_text(event.get("name")), ""))
            seconds = event.get("seconds")
            seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
            text = _text(event.get("content"))
            yield Called(name, arguments, text, bool(event.get("is_error")), seconds, there=True)


@dataclass
class _Call:
    """A call while it comes; nothing goes out before its name is there."""

    id: Any
    index: Any
    number: int
    name: str = ""
    held: str = ""
    begun: bool = field(default=False)

    def parts(self) -> Iterator[Part]:
        if not self.name:
            return
        if not self.begun:
            self.begun = True
            yield Part("call", "", self.number, str(self.id or f"call_{self.number}"), _text(self.name))
        if self.held:
            yield Part("arguments", self.held, self.number)
            self.held = ""


def _text(value: Any) -> str:
    """Text, or the texts of parts; half a character, which JSON can spell, is replaced."""
    if isinstance(value, list):
        value = "".join(
            str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in value
        )
    return _LONE.sub("\ufffd", value) if isinstance(value, str) else ""


def _count(value: Any) -> int:
    sound = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return int(value) if sound else 0


def as_chunk(whole: dict[str, Any]) -> dict[str, Any]:
    """A whole answer, of a server that does not stream, as one chunk."""
    choice = whole["choices"][0]
    delta = dict(choice.get("message") or {})
    delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta.get("tool_calls") or ())]
    reason = choice.get("finish_reason") or "stop"
    return {"choices": [{"delta": delta, "finish_reason": reason}], "usage": whole.get("usage")}
