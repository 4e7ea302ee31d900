"""Messages as servers and templates take them: calls answered, roles in turn, and results that fit."""

from __future__ import annotations

import itertools

from kllm.chat.model import Message
from kllm.tools.text import clipped

_SHORT = 400  # bytes of a result that did not fit


def settled(messages: list[Message]) -> list[Message]:
    """Messages without calls that have no result behind them: servers and templates refuse those."""
    out: list[Message] = []
    for at, message in enumerate(messages):
        kept = message
        if message.get("tool_calls"):
            results = itertools.takewhile(lambda m: m["role"] == "tool", messages[at + 1 :])
            answered = {result.get("tool_call_id") for result in results}
            calls = [call for call in message["tool_calls"] if call.get("id") in answered]
            kept = {k: v for k, v in message.items() if k != "tool_calls"}
            kept["content"] = message.get("content") or (None if calls else "")
            if calls:
                kept["tool_calls"] = calls
        out.append(kept)
    return out


def alternating(messages: list[Message]) -> list[Message]:
    """Neighbours of the user joined: what code printed last, and the next question."""
    out: list[Message] = []
    for message in messages:
        if out and message["role"] == out[-1]["role"] == "user":
            out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n\n{message['content']}"}
        else:
            out.append(message)
    return out


def shorten(messages: list[Message]) -> bool:
    """Cuts what tools or code gave since the last answer, in place; whether there was anything to cut."""
    changed = False
    for message in reversed(messages[1:]):
        if message["role"] == "assistant":
            break
        short = clipped(message["content"], _SHORT)
        changed = changed or len(short) < len(message["content"])
        message["content"] = min(short, message["content"], key=len)
    return changed
