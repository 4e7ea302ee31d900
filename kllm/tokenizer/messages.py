"""Conversations as data: one form for the template, and no control token in anybody's words.

A template joins strings, so afterwards nobody knows whose `<|im_end|>` it was. Before rendering, every
added token's text inside users', tools' and system words gets a private-use character after its first
letter; what then still looks like an added token was written by the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kllm.errors import UserError

_REASONING = ("reasoning_content", "reasoning", "thinking")
_OWN_TAGS = re.compile(r"</?(think|answer|tool_call)>")
_THINK_TAGS = ("<think>", "</think>")


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the one form that templates are given.

    `content` is a string (None is empty; text parts are joined); `reasoning_content` holds the reasoning
    under whatever name it came; `tool_calls` is a list, its JSON-string form parsed, and arguments that are
    a JSON object in a string become that object. Empty optional fields go.

    Raises:
        UserError: no messages, a message without a role, content that is not text, broken tool calls.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("a conversation needs at least one message", where="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def normalise_tools(tools: Any, messages: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """The function schemas, from a list, a JSON string, or the first message's `tools` field."""
    if not tools:
        first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
        tools = first.get("tools") if first.get("role") in ("system", "developer") else None
    tools = _parsed(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError("not a list of function schemas", where="tools")
    return tools


def _parsed(value: Any, where: str) -> Any:
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except json.JSONDecodeError as e:
            raise UserError(f"broken JSON: {e.msg}", where=where) from e
    return None if isinstance(value, str) else value


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError("a message needs a role", where=where, hint='{"role": "user", "content": "..."}')
    apart = (*_REASONING, "tools", "tool_calls")
    rest = {k: v for k, v in message.items() if v is not None and k not in apart}
    rest["content"] = _content(message.get("content"), f"{where}.content")
    reasoning = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    if reasoning is not None:
        rest["reasoning_content"] = _content(reasoning, f"{where}.reasoning_content")
    calls = _parsed(message.get("tool_calls"), f"{where}.tool_calls")
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        rest["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return rest


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else part.get("text") for part in content if part]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise UserError(f"not text: {type(content).__name__}", where=where, hint="only text is supported")


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise UserError("not a tool call", where=where, hint='{"name": "f", "arguments": {...}}')
    function = call.get("function")
    inner: Mapping[str, Any] = function if isinstance(function, Mapping) else call
    if not isinstance(inner.get("name"), str):
        raise UserError("a tool call needs a name", where=where)
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    inner = {**inner, "arguments": {} if arguments is None else arguments}
    return {**call, "function": inner} if "function" in call else inner


def wire(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the protocol has it: no reasoning of earlier turns, arguments of tool calls as text."""
    message = {k: v for k, v in message.items() if k != "reasoning_content"}  # DeepSeek refuses it
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = call["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{number}", **call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


class Neutraliser:
    """Breaks the texts of added tokens in words that are not the template's.

    Args:
        control: all added tokens that mean something.
        special: those of them that are control tokens proper.
    """

    def __init__(self, control: Iterable[str], special: Iterable[str]) -> None:
        control = set(control)
        turns = {token for token in special if token in control and not _OWN_TAGS.fullmatch(token)}
        self._all = _first_letters(control)
        self._turns = _first_letters(turns)
        self._reasoning = _first_letters(turns | (control & set(_THINK_TAGS)))

    def message(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """A message whose words cannot be taken for the template's; the assistant may think and call."""
        if message["role"] != "assistant":
            return self.plain(message, mark)
        own = ("content", "reasoning_content")
        out = self.plain({k: v for k, v in message.items() if k not in own}, mark)
        out["content"] = _broken(message["content"], self._turns, mark)
        if "reasoning_content" in message:
            out["reasoning_content"] = _broken(message["reasoning_content"], self._reasoning, mark)
        return out

    def plain(self, value: Any, mark: str) -> Any:
        """The same data with every added token's text broken, keys included."""
        if isinstance(value, str):
            return _broken(value, self._all, mark)
        if isinstance(value, Mapping):
            return {self.plain(k, mark): self.plain(v, mark) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.plain(v, mark) for v in value]
        return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _first_letters(tokens: set[str]) -> re.Pattern[str] | None:
    """Matches the first letter of every occurrence, overlapping ones too."""
    parts = [f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in sorted(tokens) if t]
    return re.compile("|".join(parts)) if parts else None


def _broken(text: str, pattern: re.Pattern[str] | None, mark: str) -> str:
    return pattern.sub(lambda m: m[0] + mark, text) if pattern else text


def private_characters(avoid: str, extra: str = "", count: int = 3) -> list[str]:
    """`count` private-use characters that occur in neither text."""
    found: list[str] = []
    for char in _candidates():
        if char not in avoid and char not in extra:
            found.append(char)
            if len(found) == count:
                return found
    raise UserError("the conversation uses every private-use character", where="messages")


def _candidates() -> Iterator[str]:
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        yield from map(chr, range(first, last + 1))
