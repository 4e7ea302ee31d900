"""Preference pairs in their many spellings: a shared prompt and two continuations of it.

Accepted: chosen and rejected as text, as one message, as the answering messages, or as two whole
dialogues with a common beginning (MiniMind, UltraFeedback); the prompt as text, as messages, inside
the dialogues, in `conversations`, as an instruction with an input (Alpaca's rankings), or as the
transcripts of HH-RLHF ("\\n\\nHuman: ...").
"""

from __future__ import annotations

import re
from typing import Any

from kllm.data.messages import BadRow, Message, read_messages

_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")


def read_preference(
    obj: dict[str, Any],
) -> tuple[list[Message], list[Message], list[Message], list[Any] | None]:
    """(prompt, chosen, rejected, tools); chosen and rejected begin with an assistant message."""
    prompt, tools = _prompt(obj)
    chosen, rejected = (_side(obj[key], key) for key in ("chosen", "rejected"))
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise BadRow(f"{key} does not end with an answer of the assistant")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        # Whole dialogues: what both begin with is the prompt, up to the answer that differs.
        shared = _shared(chosen, rejected)
        head = chosen[:shared]
        prompt = prompt if prompt and head[: len(prompt)] != prompt and not _holds(head, prompt) else head
        chosen, rejected = chosen[shared:], rejected[shared:]
    if not prompt:
        raise BadRow("the pair has no prompt")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise BadRow("chosen and rejected do not continue the same prompt")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return prompt, chosen, rejected, tools


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    limit = min(len(chosen), len(rejected)) - 1
    count = 0
    while count < limit and chosen[count] == rejected[count]:
        count += 1
    return count


def _holds(head: list[Message], prompt: list[Message]) -> bool:
    """Whether the dialogue already says the prompt (often given once more as bare text)."""
    return bool(head) and head[-1]["content"].strip() == prompt[-1]["content"].strip()


def _prompt(obj: dict[str, Any]) -> tuple[list[Message], list[Any] | None]:
    names = ("prompt", "conversations", "messages", "question", "instruction")
    raw = next((obj[name] for name in names if obj.get(name)), None)
    if isinstance(raw, str) and raw == obj.get("instruction"):
        raw = "\n".join(part for part in (raw, obj.get("input")) if isinstance(part, str) and part.strip())
    tools = None
    if raw is None:
        messages: list[Message] = []
    elif isinstance(raw, list):
        messages, tools = read_messages(raw)
    elif isinstance(raw, str):
        turns = _transcript(raw) or [{"role": "user", "content": raw}]
        # HH-RLHF prompts end with an open "Assistant:"
        messages = turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    else:
        raise BadRow("prompt is neither text nor messages")
    system = obj.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages, tools


def _side(raw: Any, key: str) -> list[Message]:
    if isinstance(raw, str):
        raw = _transcript(raw) or [{"role": "assistant", "content": raw}]
    if isinstance(raw, dict):
        raw = [raw]
    try:
        return read_messages(raw)[0]
    except BadRow as error:
        raise BadRow(f"{key}: {error}") from None


def _transcript(text: str) -> list[Message] | None:
    """The turns of an HH-RLHF transcript, or None if the text is none."""
    if not text.startswith(("\n\nHuman:", "\n\nAssistant:")):
        return None
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[name], "content": said.strip()} for name, said in turns]
