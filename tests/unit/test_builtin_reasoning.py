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


def problems() -> list[tuple[dict[str, Any], str, str, str]]:
    """(row, question, thinking, answer) of the training split's problems that are thought through."""
    found = []
    for row in rows("sft"):
        user, said = row["messages"][-2:]
        if "reasoning_content" in said:
            assert len(row["messages"]) == 2
            found.append((row, user["content"], said["reasoning_content"], said["content"]))
    return found


def test_both_modes_of_every_kind_and_language() -> None:
    thought = Counter((row["lang"], row["category"]) for row, *_ in problems())
    direct = Counter((row["lang"], row["category"].replace("derived", "chain")) for row in rows("sft"))
    direct -= thought
    for lang in LANGS:
        for kind in KINDS:
            assert thought[lang, kind] > 500
            # without a word about it, thinking is the likelier way
            assert 20 < direct[lang, kind] < thought[lang, kind] / 4
    assert 0.45 < len(problems()) / len(rows("sft")) < 0.55


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
    for _, _, thought, answer in problems():
        for left, right in re.findall(r"(\d+(?:[+-]\d+)+)=(\d+)", f"{thought}\n{answer}"):
            assert sum(int(n) for n in re.findall(r"[+-]?\d+", left)) == int(right)
    for row in rows("sft"):  # those answered at once too
        for asked, said in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            if (expected := result(asked["content"])) is not None:
                assert exact(said["content"].removeprefix(EMPTY), expected), (asked, said)
                checked += 1
    assert checked > 4000


def test_chains_go_from_fact_to_fact_to_the_answer() -> None:
    """Every step is a base fact of the world, and the answer tells the same facts in sentences."""
    told = {lang: {} for lang in LANGS}
    for fact in world():
        if group(fact) != "derived":
            for lang in LANGS if not fact.lang else (fact.lang,):
                speaker = voice(lang, world())
                step = f"{speaker.subject(fact)}: {speaker.value(fact)}"
                told[lang].setdefault(step, set()).add(speaker.tell(fact))
    for row, _, thought, answer in problems():
        if row["category"] == "chain":
            steps = thought.split("\n")
            assert len(steps) >= 2
            for step in steps:
                assert any(sentence in answer for sentence in told[row["lang"]][step]), (step, answer)
            assert any(answer.endswith(sentence) for sentence in told[row["lang"]][steps[-1]]), (
                steps,
                answer,
            )


def test_held_out_problems_are_never_asked_in_training() -> None:
    training = {m["content"] for row in rows("sft") for m in row["messages"] if m["role"] == "user"}
    for row in rows("eval"):
        assert row["question"] not in training
        numbers = re.findall(r"\d+", row["question"])
        if row["category"] != "chain":
            assert world().held_numbers(*map(int, numbers)) or max(map(int, numbers)) < 10
    asked = [m["content"] for row in rows("sft") for m in row["messages"] if m["role"] == "user"]
    for question in asked:
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
