"""The built-in questions: about the world, answered exactly; to the persona, answered in its sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kllm.data.builtin import generate
from kllm.errors import UserError
from kllm.eval.asking import Asker
from kllm.eval.reply import read_reply
from kllm.eval.scoring import exact, names_all, shown, tally

Row = dict[str, Any]


def run_world(
    asker: Asker, *, limit: int | None = None, chat: bool | None = None, itself: bool = True
) -> dict[str, Any]:
    """Greedy answers to the held-out questions about the world, scored by `exact`.

    Questions come in turn from every category and language, so a `limit` keeps the balance. In text style
    the conversation is written as in the pretraining text ("user:", the words, "assistant:") and the answer
    is the first line: so a model that was only pretrained can be measured with the same questions. Where
    a model thinks first, what it says after that is judged.

    Args:
        chat: ask in chat turns (True) or in text style (False); None finds out which the model knows.
        itself: with the questions about the model itself.

    Returns:
        accuracy and counts: `accuracy`, `correct`, `total`, `by_language` {lang: {accuracy, correct,
        total}}, `by_category` {lang: {category: ...}}; `style` ("chat" or "text"); `samples`
        [{lang, category, question, answer, expected, correct}].
    """
    rows = [row for row in generate("eval") if itself or row["category"] != "identity"]
    return _run(asker, rows[:limit], lambda answer, row: exact(answer, row["answer"]), chat)


def run_identity(asker: Asker, *, limit: int | None = None, chat: bool | None = None) -> dict[str, Any]:
    """The held-out questions to the persona; an answer is right if it has what its question asks for.

    Each row names what a right answer has, in any words around it, and what it never has: the name of the
    model before. Returns what `run_world` does.
    """
    rows = list(generate("eval", subject="identity"))[:limit]
    result = _run(asker, rows, lambda answer, row: names_all(answer, row["must"], row["never"]), chat)
    return {**result, "measure": "answers as the persona"}


def _run(
    asker: Asker, rows: Sequence[Row], right: Callable[[str, Row], bool], chat: bool | None
) -> dict[str, Any]:
    if not rows:
        raise UserError("there is nothing to ask", where="limit", hint="limit must be at least 1")
    asked = [row["messages"] for row in rows]
    if chat is None:
        chat = asker.knows_turns(asked)
    said = asker.chat(asked) if chat else asker.text(asked)
    answers = [one.text for one in said]
    marks = [right(read_reply(answer).answer, row) for answer, row in zip(answers, rows, strict=True)]
    return {
        **tally([(row["lang"], row["category"], mark) for row, mark in zip(rows, marks, strict=True)]),
        "style": "chat" if chat else "text",
        "samples": [
            {
                "lang": rows[i]["lang"],
                "category": rows[i]["category"],
                "question": rows[i]["question"],
                "answer": answers[i],
                "expected": rows[i]["answer"],
                "correct": marks[i],
            }
            for i in shown(marks)
        ],
    }
