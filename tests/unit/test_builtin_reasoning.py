"""Problems thought through: right steps, both modes, and held-out ones to measure by."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

from kllm.data.builtin import generate
from kllm.data.builtin.reasoning import EMPTY, PROBLEMS
from kllm.data.builtin.voice import voice
from kllm.data.builtin.world import group, world
from kllm.data.formats import ChatRecord, PromptRecord, normalise
from kllm.eval.scoring import exact

LANGS = ("en", "zh")
KINDS = {name for name, _ in PROBLEMS}


@lru_cache(maxsize=4)
def rows(split: str) -> list[dict[str, Any]]:
    return list(generate(split, subject="reasoning"))


def problems() -> list[tuple[dict[str, Any], str, str | None, str]]:
    """(row, question, thinking or None, answer) of the training split's problems."""
    found = []
    for row in rows("sft"):
        if row["category"] in KINDS:
            (user, said) = row["messages"]
            found.append((row, user["content"], said.get("reasoning_content"), said["content"]))
    return found


def test_both_modes_of_every_kind_and_language() -> None:
    counts = Counter((row["lang"], row["category"], thought is None) for row, _, thought, _ in problems())
    for lang in LANGS:
        for kind in KINDS:
            thinks, direct = counts[lang, kind, False], counts[lang, kind, True]
            assert thinks + direct > 500
            assert 2 < thinks / direct < 4  # without a word about it, thinking is the likelier way
    shares = Counter(row["category"] in KINDS for row in rows("sft"))
    assert 0.2 < shares[False] / len(rows("sft")) < 0.3


def test_every_answer_is_behind_a_think_block() -> None:
    """So the switch decides: the empty block that the prompt then ends with, or the model's own thinking."""
    for row in rows("sft"):
        for message in row["messages"]:
            if message["role"] == "assistant":
                thinks = bool(message.get("reasoning_content"))
                assert thinks != message["content"].startswith(EMPTY)
        record = normalise(row, "chat")
        assert isinstance(record, ChatRecord)
        assert record.messages == row["messages"]


def result(question: str) -> str | None:
    numbers = re.findall(r"\d+", question)
    if len(numbers) != 2:
        return None
    a, b = map(int, numbers)
    if re.search(r"larger|bigger|Compare|大|比较", question):
        return str(max(a, b))
    return str(a - b if re.search(r"-|minus|减", question) else a + b)


def test_steps_and_answers_are_right() -> None:
    checked = 0
    for _, question, thought, answer in problems():
        for left, right in re.findall(r"(\d+(?:[+-]\d+)+)=(\d+)", f"{thought}\n{answer}"):
            assert sum(int(n) for n in re.findall(r"[+-]?\d+", left)) == int(right)
        if (expected := result(question)) is not None:
            assert exact(answer.removeprefix(EMPTY), expected), (question, answer)
            checked += 1
    assert checked > 4000


def test_chains_end_with_the_answer() -> None:
    told = {
        lang: {
            voice(lang, world()).tell(f) for f in world() if f.lang in ("", lang) and group(f) != "derived"
        }
        for lang in LANGS
    }
    for row, _, thought, answer in problems():
        if row["category"] == "chain" and thought is not None:
            steps = thought.split("\n")
            assert len(steps) >= 2
            assert steps[-1] == answer
            assert set(steps) <= told[row["lang"]]


def test_held_out_problems_are_never_asked_in_training() -> None:
    training = {question for _, question, _, _ in problems()}
    for row in rows("eval"):
        assert row["question"] not in training
        numbers = re.findall(r"\d+", row["question"])
        if row["category"] != "chain":
            assert world().held_numbers(*map(int, numbers)) or max(map(int, numbers)) < 10
    for _, question, _, _ in problems():
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if len(numbers) == 2:
            assert not world().held_numbers(*numbers)


def test_the_evaluation_is_balanced_and_knows_its_answers() -> None:
    counts = Counter((row["lang"], row["category"]) for row in rows("eval"))
    assert set(counts) == {(lang, kind) for lang in LANGS for kind in KINDS}
    assert len(set(counts.values())) == 1
    assert len({row["question"] for row in rows("eval")}) == len(rows("eval"))
    for row in rows("eval"):
        record = normalise(row, "prompt")
        assert isinstance(record, PromptRecord)
        assert (record.messages, record.answer) == (row["messages"], row["answer"])
        expected = result(row["question"])
        assert row["category"] == "chain" or row["answer"] == expected
        assert row["reasoning_content"]
