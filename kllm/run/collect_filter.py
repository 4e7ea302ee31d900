"""Which answers of a teacher are worth learning: rules, and the name under which each counts its victims."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kllm.data.messages import BadRow, Message, read_tool_calls
from kllm.data.reasoning import AnswerTags, one_form, place_empty, without_reasoning
from kllm.errors import UserError
from kllm.run.collect_answers import agrees, answer_key
from kllm.run.collect_duplicates import repetition
from kllm.run.collect_journal import Reply
from kllm.run.collect_prompts import Prompt
from kllm.run.collect_words import LANGUAGES, refuses, right_language

Best = Literal["first", "shortest", "longest", "majority"]
BEST: tuple[Best, ...] = ("first", "shortest", "longest", "majority")

_CALL = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>\s*", re.DOTALL)


@dataclass(frozen=True)
class Rules:
    """What an answer must be to be kept.

    min_chars, max_chars: characters of the answer; of answer and reasoning together.
    require: texts that must occur in the answer as the model writes it, think tags included (`</think>`).
    language: "match" (that of the question, unless it asks for another), "any", or zh, en, ja, ko, ru.
    refusals: whether refusals are dropped, with those that begin with one of `refusal_phrases`.
    max_repetition: most of the text that may have been said before in it, by runs of 16 characters; 1 = all.
    check_answer: where the prompt has a known answer, only right answers are kept.
    answer_tags: what becomes of `<answer>` tags; see `kllm.data.reasoning.untag_answer`.

    Raises:
        UserError: a value out of range; `where` is the field's name.
    """

    min_chars: int = 1
    max_chars: int | None = None
    require: tuple[str, ...] = ()
    language: str = "match"
    refusals: bool = True
    refusal_phrases: tuple[str, ...] = ()
    max_repetition: float = 0.5
    check_answer: bool = False
    answer_tags: AnswerTags = "strip"

    def __post_init__(self) -> None:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise UserError(f"less than min_chars ({self.min_chars})", where="max_chars")
        if not 0 <= self.max_repetition <= 1:
            raise UserError(f"must be between 0 and 1, not {self.max_repetition}", where="max_repetition")
        if isinstance(self.require, str) or not all(self.require):
            raise UserError("must be texts that are not empty", where="require")
        if self.language not in LANGUAGES:
            raise UserError(f"unknown: {self.language!r}", "language", f"known: {' '.join(LANGUAGES)}")


def judge(rules: Rules, prompt: Prompt, reply: Reply) -> tuple[Message | None, str]:
    """(the message to learn, "") or (None, the reason why not)."""
    if reply.finish_reason == "length":
        return None, "cut by max_tokens"
    if reply.finish_reason == "content_filter":
        return None, "content filter"
    try:
        message = _message(reply.message, rules.answer_tags)
    except BadRow as error:
        return None, "broken tool call" if "call" in str(error) else str(error)
    fault = _fault(rules, prompt, message, str(reply.message.get("content") or ""))
    return (None, fault) if fault else (message, "")


def _message(raw: Message, tags: AnswerTags) -> Message:
    """The assistant's message in the one form, tool calls out of the text."""
    raw = {**raw, "role": "assistant", "content": raw.get("content") or ""}
    message = one_form(raw, tags)
    out: Message = {"role": "assistant", "content": message["content"].strip()}
    if message.get("reasoning_content"):
        out["reasoning_content"] = message["reasoning_content"]
    calls = read_tool_calls(raw.get("tool_calls"), 1)
    if not calls and (words := _CALL.findall(out["content"])):
        calls = read_tool_calls(f"[{','.join(words)}]", 1)
        out["content"] = _CALL.sub("", out["content"])
    if calls:
        out["tool_calls"] = calls
    return out


def written(message: Message) -> str:
    """An answer as a model writes it, its reasoning between think tags."""
    reasoning = message.get("reasoning_content")
    return f"<think>\n{reasoning}\n</think>\n\n{message['content']}" if reasoning else str(message["content"])


def _fault(rules: Rules, prompt: Prompt, message: Message, raw: str) -> str:
    content, whole = message["content"], written(message)
    calls = message.get("tool_calls")
    if not content and not calls:
        return "empty"
    try:
        json.dumps(message, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "broken characters"
    if len(content) < rules.min_chars and not calls:
        return "too short"
    if rules.max_chars is not None and len(whole) > rules.max_chars:
        return "too long"
    if any(text not in whole and text not in raw for text in rules.require):
        return "lacks a required text"
    if rules.refusals and refuses(content, rules.refusal_phrases):
        return "refusal"
    talk = "\n".join(m["content"] for m in prompt.messages if m["role"] in ("user", "assistant"))
    if not right_language(rules.language, prompt.question, content, talk):
        return "wrong language"
    if rules.max_repetition < 1 and repetition(whole) > rules.max_repetition:
        return "repeats itself"
    if rules.check_answer and prompt.answer is not None and not agrees(content, prompt.answer):
        return "wrong answer"
    return ""


def choose(best: Best, passed: Sequence[Message], keep: int) -> list[Message]:
    """Up to `keep` of the good answers to one prompt, which come in the order of the samples.

    `majority` takes from the largest group of answers that agree in their result (self-consistency, Wang et
    al. 2022), of equal groups from the one that came first.
    """
    some = list(passed)
    if best == "majority" and some:
        keys = [answer_key(message["content"]) for message in some]
        counts = Counter(keys)
        most = max(keys, key=lambda key: counts[key])  # the first of equals
        some = [message for message, key in zip(some, keys, strict=True) if key == most]
    elif best in ("shortest", "longest"):
        some.sort(key=lambda message: len(written(message)) * (1 if best == "shortest" else -1))
    return some[:keep]


def conversation(prompt: Prompt, system: str | None, message: Message) -> dict[str, Any]:
    """The line of the conversation file."""
    row: dict[str, Any] = {"messages": [*with_system(prompt.messages, system), message]}
    if prompt.tools:
        row["tools"] = prompt.tools
    return row


def plain_twin(row: dict[str, Any]) -> dict[str, Any]:
    """The conversation without reasoning: an empty think block before every answer."""
    return {**row, "messages": place_empty(without_reasoning(row["messages"]), in_field=False)}


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages with `system` before them, or before the words of the system message that they have."""
    if not system:
        return list(messages)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]
