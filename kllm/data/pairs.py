"""Preference pairs in their many spellings: a shared prompt and two continuations of it.

Accepted: chosen and rejected as text, as one message, as the answering messages, or as two whole
dialogues with a common beginning (MiniMind, UltraFeedback); the prompt as text, as messages, inside
the dialogues, in `conversations`, as an instruction with an input (Alpaca's rankings), or as the
transcripts of HH-RLHF ("\\n\\nHuman: ...").
"""

from __future__ import annotations

import re
from typing import Any

from kllm.data.messages import BadRow, Message, instruction_prompt, read_messages, system_first

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def read_preference(
    obj: dict[str, Any],
) -> tuple[list[Message], list[Message], list[Message], list[Any] | None]:
    """(prompt, chosen, rejected, tools); chosen and rejected begin with an assistant message."""
    prompt, tools, transcript = _prompt(obj)
    chosen, rejected = (_side(obj[key], key, transcript) for key in ("chosen", "rejected"))
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise BadRow(f"{key} does not end with an answer of the assistant")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        # Whole dialogues: what both begin with is the prompt, up to the answer that differs.
        shared = _shared(chosen, rejected)
        prompt = _joined(prompt, chosen[:shared])
        chosen, rejected = chosen[shared:], rejected[shared:]
    else:
        prompt = _open(prompt)
    if not prompt:
        raise BadRow("the pair has no prompt")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise BadRow("chosen and rejected do not continue the same prompt")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return system_first(prompt, obj), chosen, rejected, tools


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    limit = min(len(chosen), len(rejected)) - 1
    count = 0
    while count < limit and chosen[count] == rejected[count]:
        count += 1
    return count


def _open(prompt: list[Message]) -> list[Message]:
    """The prompt without the answer that it ends with: some rows carry one beside the two of the pair."""
    return prompt[:-1] if prompt and prompt[-1]["role"] == "assistant" else prompt


def _joined(prompt: list[Message], head: list[Message]) -> list[Message]:
    """The whole prompt, from the one that is given and what both dialogues begin with.

    The dialogues may say all of it, its last turns only, or go on from its first ones.

    Raises:
        BadRow: the one does not continue the other.
    """
    if not prompt or not head:
        return prompt or head
    for given in (_open(prompt), prompt):
        if any(_same(given, head[at : at + len(given)]) for at in range(len(head) - len(given) + 1)):
            return head
        for size in range(min(len(given), len(head)), 0, -1):
            if _same(given[-size:], head[:size]):
                return [*given, *head[size:]]
    if prompt[-1]["role"] in ("system", "assistant") and head[0]["role"] != "system":
        return [*prompt, *head]
    raise BadRow("chosen and rejected begin with other words than the prompt")


def _same(some: list[Message], others: list[Message]) -> bool:
    """Bare text and messages of one dialogue differ in the space around the words."""
    return [(m["role"], m["content"].strip()) for m in some] == [
        (m["role"], m["content"].strip()) for m in others
    ]


def _prompt(obj: dict[str, Any]) -> tuple[list[Message], list[Any] | None, bool]:
    """(messages, tools, whether they were a transcript)."""
    names = ("prompt", "conversations", "messages", "question", "instruction")
    raw = next((obj[name] for name in names if obj.get(name)), None)
    if raw is None:
        return [], None, False
    if isinstance(raw, list):
        return *read_messages(raw), False
    if not isinstance(raw, str):
        raise BadRow("prompt is neither text nor messages")
    if raw == obj.get("instruction"):
        return instruction_prompt(obj), None, False
    turns = _transcript(raw)
    if turns is None:
        return [{"role": "user", "content": raw}], None, False
    # HH-RLHF prompts end with an open "Assistant:"
    return (turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns), None, True


def _side(raw: Any, key: str, transcript: bool) -> list[Message]:
    if isinstance(raw, str):
        said = raw.strip() if transcript else raw
        raw = _transcript(raw) or [{"role": "assistant", "content": said}]
    if isinstance(raw, dict):
        raw = [raw]
    try:
        return read_messages(raw)[0]
    except BadRow as error:
        raise BadRow(f"{key}: {error}") from None


def _transcript(text: str) -> list[Message] | None:
    """The turns of an HH-RLHF transcript, or None if the text is none."""
    text = text.replace("\r\n", "\n")
    words = text.lstrip("\n")
    if not words.startswith(("Human:", "Assistant:")):
        return None
    if words == text and not (words.startswith("Human:") and "\n\nAssistant:" in words):
        return None  # somebody's sentence that begins so
    parts = _TURN.split(words)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[name], "content": said.strip()} for name, said in turns]
