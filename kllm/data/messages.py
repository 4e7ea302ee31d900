"""Messages of a conversation, from whatever a data set calls them to one shape.

The result is the OpenAI shape with lists and dicts, never JSON strings:
`{"role", "content", "reasoning_content"?, "tool_calls"?, "name"?, "tool_call_id"?}` with roles
system, user, assistant, tool. What cannot be understood raises BadRow with a reason.
"""

from __future__ import annotations

import json
from typing import Any

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "model": "assistant", "ai": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
SYSTEM_KEYS = ("system", "system_prompt")
_THINK, _UNTHINK = "<think>\n", "\n</think>\n\n"

Message = dict[str, Any]


class BadRow(Exception):
    """A record that cannot be used; the text says why."""


def read_messages(raw: Any) -> tuple[list[Message], list[Any] | None]:
    """Normalises a list of messages; also the tools that some dialects hang on a message.

    Consecutive messages of one role stay as they are; empty system messages are dropped.
    """
    if not isinstance(raw, list) or not raw:
        raise BadRow("the conversation is empty" if raw == [] else "the conversation is not a list")
    messages: list[Message] = []
    tools: list[Any] | None = None
    for number, item in enumerate(raw, start=1):
        if not isinstance(item, dict):
            raise BadRow(f"message {number} is {_kind(item)}, not an object")
        found = read_tools(_first(item, "tools", "functions"))
        tools = tools or found
        message = _message(item, number)
        if message["role"] != "system" or message["content"]:
            messages.append(message)
    return messages, tools


def read_tools(raw: Any) -> list[Any] | None:
    """Tool schemas from a list, one object, or a JSON string of either; None if there are none."""
    if isinstance(raw, str):
        raw = _parse(raw, "tools") if raw.strip() else None
    if isinstance(raw, dict):
        raw = [raw]
    if raw in (None, []):
        return None
    if not isinstance(raw, list):
        raise BadRow(f"tools is {_kind(raw)}, not a list")
    return [_tool(item) for item in raw]


def system_first(messages: list[Message], obj: dict[str, Any]) -> list[Message]:
    """The messages behind the system prompt that stands beside them in the record, if they have none."""
    given = (obj.get(key) for key in SYSTEM_KEYS)
    system = next((text for text in given if isinstance(text, str) and text.strip()), None)
    if system is None or not messages or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def instruction_prompt(obj: dict[str, Any], extra: str = "input") -> list[Message]:
    """The prompt of an Alpaca record: earlier turns, then the instruction with what it is about.

    Raises:
        BadRow: no instruction, or a history that is none.
    """
    messages: list[Message] = []
    for pair in obj.get("history") or []:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise BadRow("history is not a list of [question, answer] pairs")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    parts = [read_text(obj, "instruction", empty=True)]
    if obj.get(extra):
        parts.append(read_text(obj, extra, empty=True))
    asked = "\n".join(part for part in parts if part.strip())
    if not asked:
        raise BadRow("instruction is empty")
    return system_first(read_messages([*messages, {"role": "user", "content": asked}])[0], obj)


def read_text(obj: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """A field that is text, or a number as text.

    Raises:
        BadRow: it is something else, or, unless it may be, empty.
    """
    value = obj.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRow(f"{key} is not text")
    if not value.strip() and not empty:
        raise BadRow(f"{key} is empty")
    return value


def split_reasoning(content: str) -> tuple[str | None, str]:
    """Takes a leading think block out of an answer: (reasoning or None, rest).

    Only the exact form that a chat template writes back is taken (<think>, newline, words, newline,
    </think>, blank line), so that rendering gives the same text; any other form stays in the content.
    """
    if not content.startswith(_THINK):
        return None, content
    inner, found, rest = content[len(_THINK) :].partition(_UNTHINK)
    if not found or not inner or inner != inner.strip("\n") or rest != rest.lstrip("\n") or not rest:
        return None, content
    return inner, rest


def join_reasoning(messages: list[Message]) -> list[Message]:
    """The inverse, for chat templates that do not know reasoning_content and would drop it silently."""
    joined = []
    for message in messages:
        if "reasoning_content" in message:
            message = dict(message)
            reasoning = message.pop("reasoning_content").strip("\n")
            message["content"] = f"{_THINK}{reasoning}{_UNTHINK}{message['content']}"
        joined.append(message)
    return joined


def _message(item: dict[str, Any], number: int) -> Message:
    name = _first(item, "role", "from")
    if not isinstance(name, str):
        raise BadRow(f"message {number} has no role")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise BadRow(f"message {number} has the unknown role {name!r} (known: system user assistant tool)")
    calls = _first(item, "tool_calls", "function_call")
    content = _first(item, "content", "value", "text")
    if name == "function_call" and calls is None:
        calls, content = content, ""
    message: Message = {"role": role, "content": ""}
    tool_calls = read_tool_calls(calls, number) if role == "assistant" else None
    reasoning = _first(item, "reasoning_content", "reasoning", "thinking")
    has_more = bool(tool_calls) or (isinstance(reasoning, str) and bool(reasoning.strip()))
    message["content"] = _content(content, role, number, may_lack=has_more)
    if role == "assistant":
        if isinstance(reasoning, str) and reasoning.strip():
            message["reasoning_content"] = reasoning
        else:
            reasoning, message["content"] = split_reasoning(message["content"])
            if reasoning is not None:
                message["reasoning_content"] = reasoning
        if not message["content"].strip() and not has_more:
            raise BadRow(f"message {number}: the assistant's answer is empty")
    if tool_calls:
        message["tool_calls"] = tool_calls
    for key in ("name", "tool_call_id"):
        if isinstance(item.get(key), str):
            message[key] = item[key]
    return message


def _content(raw: Any, role: str, number: int, *, may_lack: bool) -> str:
    if isinstance(raw, str):
        return raw
    if raw is None:
        if may_lack:
            return ""
        raise BadRow(f"message {number} ({role}) has no content")
    if isinstance(raw, list) and all(isinstance(part, (dict, str)) for part in raw) and role != "tool":
        return "".join(_part(part, number) for part in raw)
    if role == "tool" and isinstance(raw, (dict, list, int, float)):
        return json.dumps(raw, ensure_ascii=False)
    raise BadRow(f"message {number}: the content is {_kind(raw)}, not text")


def _part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part.get("text"), str):
        return str(part["text"])
    raise BadRow(f"message {number} has a part of type {part.get('type')!r}; only text can be learned")


def read_tool_calls(raw: Any, number: int) -> list[dict[str, Any]] | None:
    """Calls from a list, one object, or a JSON string of either, arguments as objects."""
    if isinstance(raw, str):
        raw = _parse(raw, f"message {number}: tool_calls") if raw.strip() else None
    if isinstance(raw, dict):
        raw = [raw]
    if raw in (None, []):
        return None
    if not isinstance(raw, list):
        raise BadRow(f"message {number}: tool_calls is {_kind(raw)}, not a list")
    return [_call(item, number) for item in raw]


def _call(item: Any, number: int) -> dict[str, Any]:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"message {number}: a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        # A model may have written arguments that are no JSON: they stay as the text they are.
        arguments = parsed if isinstance(parsed, dict) else arguments
    call: dict[str, Any] = {"type": "function"}
    if isinstance(item.get("id"), str):
        call["id"] = item["id"]
    call["function"] = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return call


def _tool(item: Any) -> dict[str, Any]:
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        return item
    if isinstance(item, dict) and isinstance(item.get("name"), str):
        return {"type": "function", "function": item}
    raise BadRow("a tool has no name")


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} is a string that is not JSON: {error}") from None


def _first(item: dict[str, Any], *keys: str) -> Any:
    for key in keys:
        if item.get(key) is not None:
            return item[key]
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
