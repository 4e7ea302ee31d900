"""The messages of a request, checked: what each role may say, and where exactly one is wrong."""

from __future__ import annotations

import json
from typing import Any

from kllm.serve.body import MAX_DEPTH, nesting
from kllm.serve.errors import ApiError, shown

MAX_MESSAGES = 2048
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_REASONING = ("reasoning_content", "reasoning")

_PART: dict[str, Any] = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_CALL: dict[str, Any] = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}, "arguments": {"type": ["string", "object"]}},
        },
    },
}
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": list(_ROLES)},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART}]},
            "name": {"type": ["string", "null"]},
            "reasoning_content": {"type": ["string", "null"]},
            "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
            "tool_call_id": {"type": ["string", "null"]},
        },
    },
}


def checked_messages(messages: list[Any], param: str = "messages") -> list[dict[str, Any]]:
    """Messages as the chat template gets them: known fields, plain text, `developer` as `system`.

    Raises:
        ApiError: 400; `param` is the path of what is wrong, e.g. `messages[1].content[0].type`.
    """
    if not messages:
        raise ApiError(400, "messages must not be empty", param=param)
    if len(messages) > MAX_MESSAGES:
        raise ApiError(400, f"{len(messages)} messages; at most {MAX_MESSAGES} are allowed", param=param)
    return [_message(message, f"{param}[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, at: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"a message must be an object, not {shown(message)}", param=at)
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        message = f"role must be one of {', '.join(_ROLES)}, not {shown(given)}"
        raise ApiError(400, message, param=f"{at}.role")
    out: dict[str, Any] = {"role": role}
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            out[key] = _string(message[key], f"{at}.{key}")
    silent = False
    if role == "assistant":
        silent = _assistant(message, out, at)
    out["content"] = _content(message.get("content"), f"{at}.content", silent)
    return out


def _assistant(message: dict[str, Any], out: dict[str, Any], at: str) -> bool:
    """Adds reasoning and tool calls; whether the message may do without content."""
    for key in _REASONING:
        if message.get(key) is not None:
            out["reasoning_content"] = _string(message[key], f"{at}.{key}")
            break
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise ApiError(400, f"tool_calls must be a list, not {shown(calls)}", param=f"{at}.tool_calls")
    if calls:
        out["tool_calls"] = [_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return bool(calls) or "reasoning_content" in out or isinstance(message.get("refusal"), str)


def _content(content: Any, at: str, silent: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None or content == []:
        if silent:
            return ""
        message = "content must be a string or a list of text parts"
        raise ApiError(400, f"{message}; null is for an assistant's tool_calls", param=at)
    if not isinstance(content, list):
        message = f"content must be a string or a list of text parts, not {shown(content)}"
        raise ApiError(400, message, param=at)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            message = f"a content part must be an object, not {shown(part)}"
            raise ApiError(400, message, param=f"{at}[{i}]")
        if part.get("type") != "text":
            message = f"only text parts are supported, not {shown(part.get('type'))}"
            raise ApiError(400, message, param=f"{at}[{i}].type")
        texts.append(_string(part.get("text"), f"{at}[{i}].text"))
    return "".join(texts)


def _call(call: Any, at: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ApiError(400, f"a tool call must be an object, not {shown(call)}", param=at)
    if call.get("type", "function") not in ("function", None):
        raise ApiError(400, 'the type of a tool call must be "function"', param=f"{at}.type")
    function = call.get("function")
    if not isinstance(function, dict):
        raise ApiError(400, "a tool call needs a function: name and arguments", param=f"{at}.function")
    name = _string(function.get("name"), f"{at}.function.name")
    arguments = _arguments(function.get("arguments"), f"{at}.function.arguments")
    out: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        out["id"] = _string(call["id"], f"{at}.id")
    return out


def _arguments(arguments: Any, at: str) -> Any:
    """Arguments as an object; a string that holds none stays: a model may have broken it."""
    if arguments is None:
        return {}
    if isinstance(arguments, dict):
        return arguments
    text = _string(arguments, at)
    if nesting(text.encode("utf-8", "replace")) > MAX_DEPTH:
        raise ApiError(400, f"arguments are nested deeper than {MAX_DEPTH}", param=at)
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _string(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise ApiError(400, f"must be a string, not {shown(value)}", param=at)
    return value
