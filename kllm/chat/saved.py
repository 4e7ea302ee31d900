"""Conversations as files: one line of JSON with OpenAI's messages, which the page and training read too."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kllm.chat.conversation import Conversation, Turn
from kllm.chat.model import Message, Settings
from kllm.config.parts import SamplingSection
from kllm.data.formats import ChatRecord, PromptRecord, normalise
from kllm.data.messages import BadRow
from kllm.errors import UserError
from kllm.files import new_file

_OUTPUT = "Output:"


def save(chat: Conversation, path: Path) -> int:
    """Writes the conversation, whole or not at all; the number of messages.

    Raises:
        KllmError: the file cannot be written.
    """
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    messages = [*system, *(m for turn in chat.turns for m in turn.messages)]
    row: dict[str, Any] = {"messages": messages}
    if chat.tools:
        row["tools"] = chat.tools
    thinking = {} if chat.settings.thinking is None else {"thinking": chat.settings.thinking}
    row["settings"] = {**chat.settings.sampling, **thinking}
    row["model"] = chat.model.name
    row["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with new_file(path) as aside:
        aside.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(messages)


def load(chat: Conversation, path: Path) -> list[str]:
    """Takes the conversation of a file in place of the one there is; what is to be said about it.

    Any dialect of conversations that training reads will do; of several the first is taken.

    Raises:
        UserError: no such file, or no conversation in it. The present one stays as it was.
    """
    rows = _rows(path)
    record, settings = _record(rows[0], path)
    system, turns = _turns(record.messages)
    chat.system = system
    chat.turns[:] = turns
    chat.unanswered = None
    notes = [f"{len(rows) - 1} more conversations in the file were left out"] if len(rows) > 1 else []
    if chat.turns and len(chat.turns[-1].messages) == 1:  # a question that waits for its answer
        chat.unanswered = chat.turns.pop().question
        notes.append("it ends with a question: /retry answers it")
    if settings:
        notes.append(_take_settings(chat, settings))
    return notes


def _take_settings(chat: Conversation, given: dict[str, Any]) -> str:
    """Takes over what is valid; says what."""
    thinking = given.pop("thinking", chat.settings.thinking)
    try:
        kept = SamplingSection.model_validate(given).model_dump(include=set(given))
    except ValidationError:
        return "its settings are not valid and were left out"
    chat.settings = Settings(kept, thinking if isinstance(thinking, bool) else None)
    return "settings: " + (" ".join(f"{name}={value}" for name, value in kept.items()) or "defaults")


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"cannot read it: {reason}", where=str(path)) from None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()] or [None]
        except (ValueError, RecursionError):
            raise UserError(
                "it is no JSON", where=str(path), hint="a file of /save, or a row of chats"
            ) from None
    if isinstance(whole, dict) and isinstance(whole.get("chats"), list) and whole["chats"]:
        return list(whole["chats"])  # the page's export
    if isinstance(whole, list) and whole and not all(isinstance(m, dict) and "role" in m for m in whole):
        return whole
    return [whole]


def _record(row: Any, path: Path) -> tuple[ChatRecord | PromptRecord, dict[str, Any]]:
    try:
        record = normalise(row, "chat")
    except BadRow:
        try:
            record = normalise(row, "prompt")  # a question without an answer
        except BadRow:
            hint = "a file of /save, or a row of chats"
            raise UserError("it holds no conversation", where=str(path), hint=hint) from None
    assert isinstance(record, ChatRecord | PromptRecord)
    settings = row.get("settings") if isinstance(row, dict) else None
    return record, settings if isinstance(settings, dict) else {}


def _turns(messages: list[Message]) -> tuple[str | None, list[Turn]]:
    """(system prompt, turns). What code printed belongs to the turn of the code."""
    system: str | None = None
    turns: list[Turn] = []
    for message in messages:
        if message["role"] == "system" and not turns:
            system = message["content"]
            continue
        output = message["role"] == "user" and str(message["content"]).startswith(_OUTPUT)
        if not turns or (message["role"] == "user" and not (output and len(turns[-1].messages) > 1)):
            turns.append(Turn([] if message["role"] == "user" else [{"role": "user", "content": ""}]))
        turns[-1].messages.append(message)
    return system, turns
