"""Conversations as files: one line of JSON with OpenAI's messages, which the page and training read too."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kllm.chat.conversation import Conversation, Turn
from kllm.chat.model import Message, Settings
from kllm.chat.tidy import settled
from kllm.config.parts import SamplingSection
from kllm.data.formats import ChatRecord, PromptRecord, normalise
from kllm.data.messages import BadRow
from kllm.errors import KllmError, UserError
from kllm.files import new_file
from kllm.tools.codeact import OUTPUT, code_of

_HINT = "a file of /save, or a row of chats"


def path_of(text: str) -> Path:
    """A path as it was typed.

    Raises:
        UserError: nobody is called so (`~name`).
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(str(error), where=text) from None


def save(chat: Conversation, path: Path) -> int:
    """Writes the conversation as the model saw it, whole or not at all; the number of messages.

    Raises:
        UserError: there is a file that holds no conversation.
        KllmError: the file cannot be written.
    """
    _check_place(path)
    messages = chat.messages()
    row: dict[str, Any] = {"messages": messages}
    if chat.tools:
        row["tools"] = chat.tools
    thinking = {} if chat.settings.thinking is None else {"thinking": chat.settings.thinking}
    row["settings"] = {**chat.settings.sampling, **thinking}
    if chat.code:
        row["codeact"] = {"system": chat.system}  # without the words that CodeAct adds
    cut = [turn.question for turn in chat.turns if turn.finish_reason == "cancelled"]
    if cut:
        row["cut"] = cut  # questions whose answers were stopped
    row["model"] = chat.model.name
    row["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        with new_file(path) as aside:
            aside.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise KllmError(f"cannot write it: {reason}", where=str(path)) from None
    except KllmError as error:
        error.hint = None  # it speaks of --out
        raise
    return len(messages)


def load(chat: Conversation, path: Path) -> list[str]:
    """Takes the conversation of a file in place of the one there is; what is to be said about it.

    Any dialect of conversations that training reads will do; of several the first is taken.

    Raises:
        UserError: no such file, or no conversation in it. The present one stays as it was.
    """
    rows = _rows(path)
    row = rows[0] if isinstance(rows[0], dict) else {}
    system, turns = _turns(_record(rows[0], path).messages, isinstance(row.get("codeact"), dict))
    if isinstance(row.get("codeact"), dict):
        own = row["codeact"].get("system")
        system = own if isinstance(own, str) else None
    chat.clear()
    chat.system, chat.turns[:] = system, turns
    notes = [f"{len(rows) - 1} more conversations in the file were left out"] if len(rows) > 1 else []
    if turns and len(turns[-1].messages) == 1 and turns[-1].question:  # it waits for its answer
        chat.unanswered = chat.turns.pop().question
        notes.append("it ends with a question: /retry answers it")
    if missing := _missing_tools(row, chat):
        notes.append(f"it had the tools {', '.join(missing)}, which are not offered now: /tools, or --tools")
    if isinstance(row.get("settings"), dict) and row["settings"]:
        notes.append(_take_settings(chat, dict(row["settings"])))
    return notes


def _check_place(path: Path) -> None:
    """An older conversation may be overwritten, other files not."""
    try:
        if not path.is_file() or not path.stat().st_size:
            return
    except (OSError, ValueError):
        return  # writing it says what is wrong
    try:
        _record(_rows(path)[0], path)
    except UserError:
        message = "it is there already and holds no conversation"
        raise UserError(message, where=str(path), hint="choose another name") from None


def _missing_tools(row: dict[str, Any], chat: Conversation) -> list[str]:
    try:
        had = [str(tool["function"]["name"]) for tool in row.get("tools") or ()]
    except (TypeError, LookupError):
        return []
    offered = chat.box.tools if chat.box is not None else {}
    return [name for name in had if name not in offered]


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
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"cannot read it: {reason}", where=str(path)) from None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()] or [None]
        except (ValueError, RecursionError):
            raise UserError("it is no JSON", where=str(path), hint=_HINT) from None
    if isinstance(whole, dict) and isinstance(whole.get("chats"), list) and whole["chats"]:
        return list(whole["chats"])  # the page's export
    if isinstance(whole, list) and whole and not all(isinstance(m, dict) and "role" in m for m in whole):
        return whole
    return [whole]


def _record(row: Any, path: Path) -> ChatRecord | PromptRecord:
    try:
        record = normalise(row, "chat")
    except BadRow as bad:
        messages = row.get("messages") if isinstance(row, dict) else row
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, dict) or last.get("role") != "user":
            raise UserError(f"it holds no conversation: {bad}", where=str(path), hint=_HINT) from None
        try:
            record = normalise(row, "prompt")  # a question without an answer
        except BadRow as worse:
            raise UserError(f"it holds no conversation: {worse}", where=str(path), hint=_HINT) from None
    assert isinstance(record, ChatRecord | PromptRecord)
    return record


def _turns(messages: list[Message], codeact: bool) -> tuple[str | None, list[Turn]]:
    """(system prompt, turns). What code printed belongs to the turn of the code."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns: list[Turn] = []
    for message in messages[system is not None :]:
        new = message["role"] == "user" and not (codeact and turns and _is_output(message, turns[-1]))
        if new or not turns:
            turns.append(Turn([]))
        turns[-1].messages.append(message)
    for turn in turns:
        turn.messages[:] = settled(turn.messages)
    return system, turns


def _is_output(message: Message, turn: Turn) -> bool:
    last = turn.messages[-1]
    code = last["role"] == "assistant" and code_of(last.get("content") or "")
    return bool(code) and str(message["content"]).startswith(OUTPUT)
