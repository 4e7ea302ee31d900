"""Whether a model thinks when it is told to, and only then: the form of its answers, and their truth.

Every prompt is answered twice, with `enable_thinking` true and false. With it, one think block with words
in it, closed, and the answer after it; without, no think tag at all. See `reply` for the rules.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from kllm.data.formats import PromptRecord, normalise
from kllm.data.messages import BadRow
from kllm.data.sources import iter_records
from kllm.errors import UserError
from kllm.eval.asking import Asker, Said
from kllm.eval.reply import Reply, read_reply
from kllm.eval.scoring import exact, language_of, shown, tally
from kllm.tokenizer.chat import ChatEncoder

MODES = {"thinking": True, "direct": False}

Row = dict[str, Any]  # messages, answer, lang, category


def run_format(asker: Asker, source: str | Path, *, limit: int | None = None) -> dict[str, Any]:
    """Greedy answers to the prompts of `source` (any dialect of prompts, or conversations without their end).

    Returns:
        `accuracy`, `correct`, `total`, `by_language` and `by_category` (the modes) of well-formed answers;
        `answers`, the same of right ones by mode and category of the row, of the rows that know the answer;
        `faults` {mode: {what is wrong: count}}; `thought_chars`, the mean length of the thinking;
        `switch`, whether the template heeds `enable_thinking`; `samples`.

    Raises:
        UserError: the file cannot be read, a row is no prompt, or there is no chat template.
    """
    rows = _rows(source, limit)
    if not rows:
        raise UserError("there is nothing to ask", where=str(source))
    marks: list[tuple[Row, str, bool]] = []
    right: list[tuple[str, str, bool]] = []
    faults: dict[str, Counter[str]] = {mode: Counter() for mode in MODES}
    samples: list[dict[str, Any]] = []
    thought = 0
    for mode, thinking in MODES.items():
        replies = _replies(asker, rows, thinking)
        for row, (said, reply) in zip(rows, replies, strict=True):
            fault = _fault(reply, thinking)
            faults[mode].update([fault] if fault else [])
            marks.append((row, mode, not fault))
            thought += len(reply.thought or "") if thinking else 0
            if row["answer"] is not None:
                correct = exact(reply.answer, row["answer"])
                right.append((row["lang"], f"{mode} / {row['category']}", correct))
            samples.append(_sample(row, mode, said, fault))
    chosen = shown([mark for _, _, mark in marks])
    return {
        **tally([(row["lang"], mode, mark) for row, mode, mark in marks]),
        "measure": "answers in form",
        **({"answers": tally(right)} if right else {}),
        "faults": {mode: dict(count) for mode, count in faults.items()},
        "thought_chars": thought / len(rows),
        "switch": _switches(asker, rows[0]),
        "samples": [samples[i] for i in chosen],
    }


def _fault(reply: Reply, thinking: bool) -> str:
    if thinking and reply.thought is None:
        return "no think block"
    if not thinking and reply.thought is not None:
        return "thinks though it should not"
    if thinking and not reply.thought:
        return reply.fault or "empty think block"
    return reply.fault


def _sample(row: Row, mode: str, said: Said, fault: str) -> dict[str, Any]:
    return {
        "lang": row["lang"],
        "category": f"{mode} / {row['category']}",
        "question": row["messages"][-1]["content"],
        "answer": said.text,
        "expected": row["answer"] or "",
        "correct": not fault,
        "fault": fault,
    }


def _replies(asker: Asker, rows: list[Row], thinking: bool) -> list[tuple[Said, Reply]]:
    said = asker.chat([row["messages"] for row in rows], enable_thinking=thinking)
    opened = _opens(asker, rows[0], thinking)
    return [(one, read_reply(one.text, opened=opened, ended=one.ended)) for one in said]


def _tail(asker: Asker, row: Row, thinking: bool) -> str:
    """What the template writes after the conversation, as the beginning of the answer."""
    encoder, messages = ChatEncoder(asker.tokenizer), row["messages"]
    before = encoder.text(messages, enable_thinking=thinking)
    after = encoder.text(messages, add_generation_prompt=True, enable_thinking=thinking)
    return after[len(before) :] if after.startswith(before) else after


def _opens(asker: Asker, row: Row, thinking: bool) -> bool:
    tail = _tail(asker, row, thinking)
    return tail.rfind("<think>") > tail.rfind("</think>")


def _switches(asker: Asker, row: Row) -> bool:
    return _tail(asker, row, True) != _tail(asker, row, False)


def _rows(source: str | Path, limit: int | None) -> list[Row]:
    rows: list[Row] = []
    for where, obj in iter_records(source):
        if len(rows) == limit:
            break
        try:
            record = normalise(obj, "prompt")
        except BadRow as bad:
            raise UserError(str(bad), where=where, hint=getattr(bad, "hint", None)) from bad
        assert isinstance(record, PromptRecord)
        given = obj if isinstance(obj, dict) else {}
        answer = None if record.answer is None else str(record.answer)
        lang = given.get("lang") or language_of(record.messages[-1]["content"])
        category = str(given.get("category") or "prompts")
        rows.append({"messages": record.messages, "answer": answer, "lang": str(lang), "category": category})
    return rows
