"""Conversations with tools: true results, real schemas, every case in both languages, and what is held out."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from kllm.data.builtin import generate
from kllm.data.builtin import toolphrases as phrases
from kllm.data.builtin.othertools import HELD_OUT, TRAINED
from kllm.data.builtin.rng import Dice
from kllm.data.builtin.tools import CATEGORIES, PER_CATEGORY
from kllm.data.builtin.tooltasks import HELD_NUMBERS, HELD_WORDS, Tasks, is_held
from kllm.data.formats import ChatRecord, normalise
from kllm.data.sources import content_hash
from kllm.tokenizer.template import DEFAULT_TEMPLATE, render
from kllm.tools.registry import Toolbox, find_tools, schemas
from kllm.tools.tool import ToolError

LANGS = ("en", "zh")
TOOLS = ("calculator", "python", "clock")


@lru_cache(maxsize=4)
def rows(split: str) -> list[dict[str, Any]]:
    return list(generate(split, subject="tools"))


def calls(split: str) -> Iterator[tuple[dict[str, Any], str, str, dict[str, str], str, str]]:
    """(row, question, tool, arguments, result, answer) of every call."""
    for row in rows(split):
        said = row["messages"]
        for i, message in enumerate(said):
            for call in message.get("tool_calls", []):
                function = call["function"]
                answer = said[i + 2]["content"] if i + 2 < len(said) else ""
                yield (
                    row,
                    said[i - 1]["content"],
                    function["name"],
                    function["arguments"],
                    said[i + 1]["content"],
                    answer,
                )


def names(row: dict[str, Any]) -> list[str]:
    return [tool["function"]["name"] for tool in row["tools"]]


@lru_cache(maxsize=20000)
def printed(code: str) -> str:
    """What Python prints, with the comprehensions and calls of the data."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


# ---- what is taught is true


def test_tools_are_offered_by_their_real_schemas() -> None:
    real = {tool["function"]["name"]: tool for tool in schemas([*TOOLS, *TRAINED])}
    offers = Counter()  # type: Counter[tuple[str, ...]]
    for row in rows("sft"):
        assert all(tool == real[tool["function"]["name"]] for tool in row["tools"])
        offers[tuple(names(row))] += 1
    assert offers[("calculator",)] > 2000 and offers[("python",)] > 1500
    assert min(offers["calculator", "python"], offers["python", "calculator"]) > 1000
    assert offers[()] > 100
    assert len(offers) > 15


def test_every_call_gives_what_is_written() -> None:
    count = Counter()  # type: Counter[tuple[str, str]]
    with Toolbox(find_tools(["calculator"])) as box:
        for split in ("practice", "sft", "eval"):
            for row, question, tool, arguments, result, answer in calls(split):
                assert split == "practice" or tool in (names(row) if split == "sft" else row["tools"])
                count[tool, row["lang"]] += 1
                if result in phrases.FAILURES:
                    assert answer == phrases.FAILED[row["lang"]]
                    continue
                if tool == "calculator":
                    assert result == _run(box, arguments), question
                elif tool == "python":
                    assert result == printed(arguments["code"]), question
                else:
                    assert re.fullmatch(r"20\d\d-\d\d-\d\d \w+day \d\d:\d\d:\d\d UTC[+]\d\d:\d\d", result)
                if result == "error: division by zero":
                    assert answer == phrases.ZERO[row["lang"]]
                elif tool != "clock" and answer:
                    assert result.strip() in answer
    for tool in ("calculator", "python"):
        assert all(count[tool, lang] > 2000 for lang in LANGS)
    assert all(count["clock", lang] > 50 for lang in LANGS)


def _run(box: Toolbox, arguments: dict[str, str]) -> str:
    try:
        return box.call("calculator", json.dumps(arguments))
    except ToolError as failure:
        return f"error: {failure}"


def test_some_calls_in_the_real_sandbox() -> None:
    """What `print` wrote comes back as the data has it."""
    try:
        box = Toolbox(find_tools(["python"]))
    except Exception as refused:
        pytest.skip(f"no sandbox here: {refused}")
    with box:
        for number, (_, _, tool, arguments, result, _) in enumerate(calls("sft")):
            if tool == "python" and result not in phrases.FAILURES and number % 100 == 0:
                assert box.call("python", json.dumps(arguments)) == result


def test_answers_without_a_call() -> None:
    direct = Counter()  # type: Counter[tuple[str, str]]
    for row in rows("sft"):
        said = row["messages"]
        for i, message in enumerate(said):
            if message["role"] != "user" or said[i + 1].get("tool_calls"):
                continue
            answer = said[i + 1]["content"]
            kind = "missing" if answer == phrases.MISSING[row["lang"]] else "direct"
            direct[kind, row["lang"]] += 1
            if kind == "missing":  # none of the tools on offer would do
                assert "python" not in names(row) or "clock" not in names(row)
    assert all(direct[kind, lang] > 400 for kind in ("missing", "direct") for lang in LANGS)


def test_practice_repeats_things_and_shows_no_schemas() -> None:
    repeated = Counter()  # type: Counter[str]
    for row in (*rows("copy"), *rows("practice")):
        assert row["tools"] == []
        said = [m["content"] for m in row["messages"]]
        for question, answer in zip(said, said[1:], strict=False):
            found = re.fullmatch(r"(?:Repeat|Say|Copy|重复|请说|照抄)(.*)[.。]", question)
            if found and answer:  # not one of the tasks that begin alike
                repeated[row["lang"]] += found[1].strip(" '\"“”") == answer
    assert all(repeated[lang] > 10000 for lang in LANGS)


def test_what_is_on_offer_is_read_by_the_tokenizer_as_the_template_writes_it() -> None:
    texts = [row["text"] for row in generate("offers", subject="tools")]
    encoder_text = render([{"role": "user", "content": "."}], DEFAULT_TEMPLATE, tools=schemas(["calculator"]))
    head = encoder_text.partition("system\n")[2].partition("<tools>")[0]
    assert all(text.startswith(head) for text in texts)
    assert any(json.dumps(schemas(["python"])[0]) in text for text in texts)
    assert not any("<|im_" in text for text in texts)


def test_rows_are_conversations_as_training_reads_them() -> None:
    for row in rows("sft")[:500]:
        record = normalise(row, "chat")
        assert isinstance(record, ChatRecord)
        assert (record.tools or []) == row["tools"]
        assert record.messages[-1]["role"] == "assistant"
    several = sum(sum(m["role"] == "user" for m in row["messages"]) > 1 for row in rows("sft"))
    assert several > len(rows("sft")) / 2


def test_no_duplicates_and_the_same_each_time() -> None:
    for split in ("copy", "practice", "sft", "eval"):
        keys = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows(split)]
        assert len(set(keys)) > len(keys) * 0.98  # short things to repeat come twice
        again = generate(split, subject="tools")
        assert [next(again) for _ in range(50)] == rows(split)[:50]
    keys = [f"{row['question']} {row['results']}" for row in rows("eval")]
    assert len(set(keys)) == len(keys)


def test_the_old_name_is_the_same_data() -> None:
    old = generate("tools")
    assert [next(old) for _ in range(20)] == rows("sft")[:20]


def test_the_hash_follows_the_tools_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    read = Path.read_bytes

    def changed(path: Path) -> bytes:
        return read(path) + b"#" * (path.parent.name == "tools")

    before = {
        name: content_hash(name) for name in ("builtin:tools/sft", "builtin:world/tools", "builtin:world/sft")
    }
    monkeypatch.setattr(Path, "read_bytes", changed)
    differs = {name for name, value in before.items() if content_hash(name) != value}
    assert differs == {"builtin:tools/sft", "builtin:world/tools"}


# ---- what is held out


def test_the_evaluation_is_balanced_and_says_what_is_right() -> None:
    counts = Counter((row["lang"], row["category"]) for row in rows("eval"))
    assert counts == {(lang, category): PER_CATEGORY for lang in LANGS for category in CATEGORIES}
    assert len({row["category"] for row in rows("eval")[: 2 * len(CATEGORIES)]}) == len(CATEGORIES)
    alone = Counter()  # type: Counter[str]
    for row in rows("eval"):
        assert row["messages"][-1] == {"role": "user", "content": row["question"]}
        assert not set(row["tools"]) & set(TRAINED)
        assert find_tools(row["tools"])
        wanted = {"sum": "calculator", "follow-up": "calculator", "error": "calculator", "clock": "clock"}
        wanted |= dict.fromkeys(("python sum", "list", "text"), "python") | {"direct": "", "missing": ""}
        assert row["tool"] == wanted[row["category"]]
        assert not row["tool"] or row["tool"] in row["tools"]
        assert row["category"] != "missing" or "python" not in row["tools"]
        alone[row["category"]] += row["tools"] == [row["tool"]]
    assert alone["sum"] > 20 and alone["list"] > 20  # as `kllm chat --tools calculator` asks
    assert any(set(row["tools"]) & set(HELD_OUT) for row in rows("eval"))


def asked(split: str) -> list[str]:
    return [m["content"] for row in rows(split) for m in row["messages"] if m["role"] == "user"]


def test_no_question_of_the_evaluation_is_asked_in_training() -> None:
    """But for those to the clock, whose words are few: there the times are new."""
    training = {*asked("copy"), *asked("practice"), *asked("sft")}
    for row in rows("eval"):
        assert row["category"] == "clock" or row["question"] not in training


def test_held_out_numbers_and_words_are_in_no_training_question() -> None:
    numbers, words = set(), set()
    for split in ("copy", "practice", "sft"):
        for _, _, tool, arguments, _, _ in calls(split):
            if tool == "python":
                words.update(re.findall(r"'([a-z]{3,})'", arguments["code"]))
        for question in asked(split):
            numbers.update(re.findall(r"\d+(?:\.\d+)?", question))
    large = {number for number in numbers if len(number) > 2}
    assert len(large) > 5000 and len(words) > 2000
    assert not any(is_held(number, HELD_NUMBERS) for number in large)
    assert not any(is_held(word, HELD_WORDS) for word in words)
    for row in rows("eval"):
        digits = [n for n in re.findall(r"\d+(?:\.\d+)?", row["question"]) if len(n) > 2]
        if row["tool"] in ("calculator", "python"):
            assert all(is_held(number, HELD_NUMBERS) for number in digits), row["question"]


def test_lists_in_another_order_are_no_new_lists() -> None:
    def lists(split: str) -> set[tuple[int, ...]]:
        found = [
            m[1] for *_, a, _, _ in calls(split) if (m := re.search(r"(\[[\d, ]+\])", a.get("code", "")))
        ]
        return {tuple(sorted(json.loads(text))) for text in found}

    tasks = Tasks("en", Dice("test"), held=True)
    held = {tuple(sorted(tasks.numbers())) for _ in range(500)}
    assert len(lists("sft")) > 1000
    assert not lists("sft") & held
