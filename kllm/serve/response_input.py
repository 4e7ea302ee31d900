"""A /v1/responses request as the chat request that means the same."""

from __future__ import annotations

import re
from typing import Any

from kllm.serve.errors import ApiError, shown

_ROLES = ("system", "developer", "user", "assistant")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def unsupported(what: str, param: str) -> ApiError:
    """400 for a part of the Responses API that this server has not."""
    return ApiError(400, f"{what} is not supported by this server.", param=param, code="unsupported")


def messages_of(instructions: str | None, items: str | list[Any]) -> list[dict[str, Any]]:
    """Chat messages of `instructions` and `input`.

    Reasoning, an answer's text and function calls that follow each other are one assistant message.

    Raises:
        ApiError: 400, an item is malformed, or of a kind that is not supported.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for index, item in enumerate(items):
        _add(messages, item, f"input[{index}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Any, at: str) -> None:
    if not isinstance(item, dict):
        raise ApiError(400, f"an input item must be an object, not {shown(item)}", param=at)
    kind = item.get("type") or "message"
    if kind == "message":
        _add_message(messages, item, at)
    elif kind == "function_call":
        function = {
            "name": _string(item, "name", at),
            "arguments": _string(item, "arguments", at),
        }
        call = {"id": _string(item, "call_id", at), "type": "function", "function": function}
        _assistant(messages, "tool_calls").setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = _text(item.get("output"), f"{at}.output")
        messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", at), "content": content})
    elif kind == "reasoning":
        text = _text(item.get("content") or item.get("summary") or "", f"{at}.content")
        if text:  # else it is encrypted by another server
            _assistant(messages, "reasoning_content")["reasoning_content"] = text
    else:
        raise unsupported(f"An input item of type {shown(kind)}", f"{at}.type")


def _add_message(messages: list[dict[str, Any]], item: dict[str, Any], at: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise ApiError(400, f"role must be one of {', '.join(_ROLES)}, not {shown(role)}", param=f"{at}.role")
    content = _text(item.get("content"), f"{at}.content")
    if role == "assistant":
        _assistant(messages, "content")["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _assistant(messages: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The assistant message that a new `key` belongs to: the last one, unless it is past that point."""
    order = ("reasoning_content", "content", "tool_calls")
    last = messages[-1] if messages else {}
    later = order[order.index(key) :] if key != "tool_calls" else ()
    if last.get("role") != "assistant" or any(last.get(name) is not None for name in later):
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _string(item: dict[str, Any], key: str, at: str) -> str:
    if not isinstance(item.get(key), str):
        raise ApiError(400, f"{key} must be a string, not {shown(item.get(key))}", param=f"{at}.{key}")
    return str(item[key])


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"must be a string or a list of text parts, not {shown(content)}", param=at)
    texts = []
    for index, part in enumerate(content):
        where = f"{at}[{index}]"
        if not isinstance(part, dict):
            raise ApiError(400, f"a content part must be an object, not {shown(part)}", param=where)
        if part.get("type") == "refusal":
            texts.append(_string(part, "refusal", where))
        elif part.get("type") in _TEXTS:
            texts.append(_string(part, "text", where))
        else:
            raise unsupported(f"A content part of type {shown(part.get('type'))}", f"{where}.type")
    return "".join(texts)


def tools_of(tools: list[Any] | None) -> list[Any] | None:
    """Chat's form of the tools: what a function is called and takes goes one level down.

    Raises:
        ApiError: 400 `unsupported` for tools that are no functions.
    """
    if tools is None:
        return None
    found = []
    for index, tool in enumerate(tools):
        at = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise ApiError(400, f"a tool must be an object, not {shown(tool)}", param=at)
        if tool.get("type") != "function":
            raise unsupported(f"A tool of type {shown(tool.get('type'))}", f"{at}.type")
        function = {key: value for key, value in tool.items() if key != "type" and value is not None}
        found.append({"type": "function", "function": function})
    return found


def tool_choice_of(choice: Any) -> Any:
    """Chat's form of the choice.

    Raises:
        ApiError: 400 `unsupported` for choices among tools that are no functions.
    """
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise unsupported(f"A tool_choice of type {shown(choice.get('type'))}", "tool_choice.type")
    return {"type": "function", "function": {"name": choice.get("name")}}


def format_of(wanted: dict[str, Any]) -> dict[str, Any]:
    """Chat's `response_format` of a `text.format`."""
    if wanted.get("type") != "json_schema":
        return wanted
    return {
        "type": "json_schema",
        "json_schema": {key: value for key, value in wanted.items() if key != "type"},
    }


_PARAMS = (
    (r"tools\[(\d+)\]\.function\b", r"tools[\1]"),
    (r"tool_choice\.function\b", "tool_choice"),
    (r"response_format\.json_schema\b", "text.format"),
    (r"response_format\b", "text.format"),
    (r"max_(completion_)?tokens", "max_output_tokens"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"messages\b.*", "input"),
)


def translated(error: ApiError) -> ApiError:
    """An error about the chat request as one about the request that was sent."""
    return ApiError(
        error.status,
        error.message,
        type=error.type,
        param=None if error.param is None else _translated(error.param),
        code=error.code,
        headers=error.headers,
    )


def _translated(param: str) -> str:
    for pattern, replacement in _PARAMS:
        if re.match(pattern, param):
            return re.sub(f"^{pattern}", replacement, param)
    return param
