"""Which answers are kept: every rule on a table, equal and near texts, the best of several."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from collect_fake_server import FakeTeacher, question, said
from collect_support import CITIES, answers_of, prompts_file, rows_of, run, tell

from kllm.data.encode import ChatDocuments, EncodeOptions
from kllm.data.formats import normalise
from kllm.data.messages import Message
from kllm.data.reasoning import EMPTY_THINK, ThinkOptions
from kllm.data.sources import iter_records
from kllm.errors import KllmError, UserError
from kllm.run.collect_answers import agrees, answer_key, number
from kllm.run.collect_client import Sampling
from kllm.run.collect_duplicates import Duplicates, repetition
from kllm.run.collect_filter import Rules, choose, conversation, judge, plain_twin, with_system
from kllm.run.collect_journal import Reply
from kllm.run.collect_prompts import Prompt, read_prompt
from kllm.run.collect_words import languages, refuses, right_language
from kllm.tokenizer.train import train_tokenizer

ASKED = read_prompt({"prompt": "What is the capital of France?", "answer": "Paris"})
TOOL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("rules", "message", "finish", "reason"),
    [
        ({}, {"content": "Paris."}, "stop", ""),
        ({}, {"content": "Paris."}, "length", "cut by max_tokens"),
        ({}, {"content": "Paris."}, "content_filter", "content filter"),
        ({}, {"content": ""}, "stop", "empty"),
        ({}, {"content": None, "reasoning_content": "hm"}, "stop", "empty"),
        ({}, {"content": "<think>hm"}, "stop", "the thinking never ends"),
        ({}, {"content": "Paris \ud83d"}, "stop", "broken characters"),
        ({"min_chars": 7}, {"content": "Paris."}, "stop", "too short"),
        ({"min_chars": 6}, {"content": "Paris."}, "stop", ""),
        ({"max_chars": 40}, {"content": "Paris.", "reasoning_content": "x" * 40}, "stop", "too long"),
        ({"max_chars": 40}, {"content": "Paris."}, "stop", ""),
        ({"require": ("</think>",)}, {"content": "Paris."}, "stop", "lacks a required text"),
        ({"require": ("</think>",)}, {"content": "Paris.", "reasoning": "hm"}, "stop", ""),
        ({"require": ("<answer>", "</answer>")}, {"content": "<answer>Paris</answer>"}, "stop", ""),
        ({}, {"content": "I'm sorry, but I can't help with that."}, "stop", "refusal"),
        ({"refusals": False}, {"content": "I'm sorry, but I can't help with that."}, "stop", ""),
        ({"refusal_phrases": ("no comment",)}, {"content": "No comment. Paris."}, "stop", "refusal"),
        ({}, {"content": "法国的首都是巴黎。"}, "stop", "wrong language"),
        ({"language": "zh"}, {"content": "法国的首都是巴黎。"}, "stop", ""),
        ({"language": "any"}, {"content": "法国的首都是巴黎。"}, "stop", ""),
        ({}, {"content": "Paris is it. " * 40}, "stop", "repeats itself"),
        ({}, {"content": "Yes.", "reasoning_content": "Wait, let me think again. " * 40}, "stop", "repeats itself"),
        ({"max_repetition": 1.0}, {"content": "Paris is it. " * 40}, "stop", ""),
        ({"check_answer": True}, {"content": "Lyon"}, "stop", "wrong answer"),
        ({"check_answer": True}, {"content": "I think\nParis"}, "stop", ""),
        ({}, {"content": "", "tool_calls": [TOOL]}, "tool_calls", ""),
        ({}, {"content": "", "tool_calls": [{"function": {}}]}, "tool_calls", "broken tool call"),
    ],
)  # fmt: skip
def test_rules(rules: dict[str, Any], message: dict[str, Any], finish: str, reason: str) -> None:
    kept, why = judge(Rules(**rules), ASKED, Reply(message, finish))
    assert why == reason and (kept is None) == bool(reason)


def test_an_answer_comes_out_in_the_one_form() -> None:
    def kept(rules: Rules, **message: Any) -> Message | None:
        return judge(rules, ASKED, Reply(message))[0]

    whole = {"role": "assistant", "content": "Paris", "reasoning_content": "hm"}
    for content in ("<think>hm</think>\nParis", "hm\n</think>\n\n<answer>Paris</answer>"):
        assert kept(Rules(), content=content) == whole
    assert kept(Rules(answer_tags="add"), content="<think>hm</think>Paris") == {
        **whole,
        "content": "<answer>\nParis\n</answer>",
    }
    assert kept(Rules(), content=EMPTY_THINK + "Paris") == {"role": "assistant", "content": "Paris"}
    assert kept(Rules(), content=None, tool_calls=[TOOL]) == {
        "role": "assistant", "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }  # fmt: skip
    text = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    called = kept(Rules(), content=text)
    assert called is not None and called["content"] == "Let me see."
    assert called["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "rules", [{"min_chars": 5, "max_chars": 4}, {"max_repetition": 2}, {"require": "x"}, {"language": "xx"}]
)
def test_rules_out_of_range_are_said(rules: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Rules(**rules)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True), ("I’m unable to provide medical advice.", True),
        ("As an AI language model, I do not have feelings.", True), ("Sorry, I cannot do that.", True),
        ("很抱歉，我无法回答这个问题。", True), ("作为一个人工智能，我不能提供建议。", True), ("我无法提供相关信息", True),
        ("对不起，这个请求我不能满足", True), ("I do not know.", False), ("我不知道。", False), ("Sorry, I don't know who that is.", False),
        ("我是一个人工智能助手。", False), ("I am an AI assistant made to help.", False), ("抱歉让您久等了，答案是3。", False),
        ("Sorry for the delay! Paris.", False), ("A cat cannot fly; " * 20 + "I cannot help it", False),
        ("The letter said: I'm sorry, I cannot come.", False),
    ],
)  # fmt: skip
def test_refusals(text: str, refused: bool) -> None:
    assert refuses(text) is refused


def test_languages_are_told_by_script() -> None:
    assert languages("你好，世界") == {"zh": 1.0} and languages("こんにちは世界") == {"ja": 1.0}
    assert languages("안녕하세요") == {"ko": 1.0} and languages("Привет, мир") == {"ru": 1.0}
    for nothing in ("47", "x", "", "```python\nprint(1)\n```", "https://example.org/a/b"):
        assert languages(nothing) == {}
    mixed = languages("使用 Python 的 asyncio 库，可以 await")
    assert mixed["zh"] > mixed["en"] > 0.3
    assert right_language("match", "Translate into Chinese: hello", "你好，世界")
    assert right_language("match", "请把下面的话翻译成英文：你好", "Hello there, everybody")
    assert not right_language("match", "你叫什么名字？", "My name is something else")
    assert right_language("match", "2+3?", "答案是五"), "the question shows no language"
    assert right_language("match", "你叫什么名字？", "```\nx = 'long enough to count'\n```")
    assert not right_language("ja", "", "你好，世界")
    assert right_language(
        "match", "有《Automatic》、《First Love》。", "好的，我回去听一下。", "有哪些歌可以推荐给我呢？"
    ), "the talk is Chinese"
    assert not right_language("match", "What is it?", "这是一首歌。", "What is it? A song, of course.")


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("so 47+38=85.", "85", True), ("The answer is 1,234 dollars", 1234, True), ("I got 12 and then 7", "12", False),
        ("答案：B", "B", True), ("A) no; the answer is (C).", "C", True), ("A cat sat", "A", False), ("<answer>B</answer>", "C", False),
        (r"x \boxed{\frac{3}{4}} ok", "0.75", True), (r"so $\boxed{12}$, not 13", "12", True), ("50%", "50", True),
        ("<answer>Paris</answer>", "paris.", True), ("The capital is Paris.", "Paris", False), ("step\nParis", "Paris", True),
        ("a 5, b 6", [5, 6], True), ("a 5", [5, 6], False), ("Paris and Rome", ["rome"], True), ("#### 72", "work\n#### 72", True),
        ("He has 3. The answer is 4 because 2+2=4, not 9", "4", True), ("7-3=4", "4", True), ("-3", "-3", True), ("3", "-3", False),
        ("result: 3.50", "3.5", True), ("18 美元", "18", True), ("no digits", "5", False), ("= 1/0", "1", False), ("anything", [], False),
    ],
)  # fmt: skip
def test_known_answers(text: str, expected: Any, right: bool) -> None:
    assert agrees(text, expected) is right


def test_numbers_and_keys() -> None:
    assert number("1,234") == 1234 and number("$18") == 18 and number("1/2") == number("0.5")
    assert number("about 5 or 6") is None and number("Paris") is None
    assert answer_key("so it is 4") == answer_key("2+2=4") == answer_key(r"\boxed{4.0}") != answer_key("5")


# ---- duplicates


WORDS = [
    "river",
    "stone",
    "cloud",
    "lamp",
    "paper",
    "green",
    "quiet",
    "seven",
    "window",
    "salt",
    "bread",
    "north",
    "engine",
    "winter",
    "apple",
    "silver",
]


def sentence(dice: random.Random, words: int = 60) -> list[str]:
    return [dice.choice(WORDS) + str(dice.choice(["", "s", "ed"])) for _ in range(words)]


def test_equal_texts_and_near_ones_are_found() -> None:
    known = Duplicates(0.8)
    dice = random.Random(1)
    for _ in range(50):
        words = sentence(dice)
        assert known.find(" ".join(words)) is None
        assert known.find(" ".join(words).upper() + "  ") == "duplicate"
        words[30] = "elephant"
        assert known.find(" ".join(words)) == "near duplicate"
        assert known.find(" ".join(reversed(words))) is None
    assert Duplicates(1.0).find("abc def ghi") is None
    exact = Duplicates(1.0)
    assert exact.find("a " * 50 + "b") is None and exact.find("a " * 50 + "c") is None, (
        "1 finds equal texts only"
    )


def test_the_threshold_is_the_jaccard_similarity_of_windows() -> None:
    """Against the exact similarity: an error only close to the threshold."""
    dice = random.Random(2)
    windows = lambda text: {text[i : i + 5] for i in range(len(text) - 4)}  # noqa: E731
    for threshold in (0.5, 0.8, 0.9):
        for changes in range(0, 40, 4):
            words = sentence(dice, 120)
            other = list(words)
            for at in dice.sample(range(120), changes):
                other[at] = dice.choice(WORDS)
            a, b = " ".join(words), " ".join(other)
            exact = len(windows(a) & windows(b)) / len(windows(a) | windows(b))
            known = Duplicates(threshold)
            known.find(a)
            if abs(exact - threshold) > 0.12:
                assert bool(known.find(b)) == (exact >= threshold), (exact, threshold)


def test_other_numbers_are_another_text_and_chinese_has_windows_too() -> None:
    known = Duplicates(0.7)
    problem = (
        "Tom has {a} apples and buys {b} more at the market on a sunny day. How many apples does he have now?"
    )
    assert known.find(problem.format(a=3, b=4)) is None
    assert known.find(problem.format(a=5, b=4)) is None
    assert known.find(problem.format(a=3, b=4).replace("sunny", "rainy")) == "near duplicate"
    text = "从前有一座山，山里有一座庙，庙里有一个老和尚正在给一个小和尚讲故事，讲的是什么故事呢"
    assert known.find(text) is None and known.find(text.replace("什么", "甚么")) == "near duplicate"


def test_repetition() -> None:
    assert repetition("short short") == 0.0
    assert (
        repetition(
            "The quick brown fox jumps over the lazy dog while seven wizards watch from a green hill in the rain."
        )
        == 0.0
    )
    assert repetition("我们再来一次，" * 40) > 0.9


def test_duplicates_are_told_apart_in_the_report(tmp_path: Path) -> None:
    prompts_file(tmp_path, 6)
    long = (
        "It is known for its rivers and its towers, for the bread of its bakers and the songs of its people"
    )

    def answer(body: dict[str, Any], before: int) -> Any:
        return said(long + ("." if "Rome" in question(body) else "!"))

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url, model="m", duplicates=0.7)
        assert report.kept == 1 and report.dropped == {"near duplicate": 5}
        assert run(tmp_path, server.url, model="m", duplicates=1.0).kept == 6, "the questions differ"


# ---- the best of several


def texts(best: Any, passed: list[str], keep: int = 1) -> list[str]:
    found = choose(best, [{"role": "assistant", "content": text} for text in passed], keep)
    return [message["content"] for message in found]


def test_the_best_of_several() -> None:
    several = ["about 7", "it is 5", "5", "so the result is 5"]
    assert texts("first", several) == ["about 7"] and texts("shortest", several) == ["5"]
    assert texts("longest", several) == ["so the result is 5"] and texts("majority", several) == ["it is 5"]
    assert texts("majority", ["a", "b"]) == ["a"] and texts("majority", []) == []
    assert texts("shortest", several, 2) == ["5", "about 7"] and texts("majority", several, 9) == several[1:]


def test_the_first_good_answer_ends_the_asking(tmp_path: Path) -> None:
    prompts_file(tmp_path, 4)

    def answer(body: dict[str, Any], before: int) -> Any:
        good = sum(question(body) == question(b) for b in server.asked) > CITIES.index(
            question(body).split()[2]
        )
        return tell(body) if good else said("I'm sorry, I cannot help.")

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url, samples=3, parallel=2)
    assert report.requests == 1 + 2 + 3 + 3 and report.kept == 3 and report.dropped == {"refusal": 1 + 2 + 3}
    assert len({body["seed"] for body in server.asked}) == 9, "no answer is asked for twice"


def test_all_answers_are_asked_for_where_they_are_compared(tmp_path: Path) -> None:
    prompts_file(tmp_path, 3)

    def answer(body: dict[str, Any], before: int) -> Any:
        n = sum(question(body) == question(b) for b in server.asked)
        return said(tell(body)["choices"][0]["message"]["content"] + " Indeed." * n)

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url, samples=3, best="shortest", keep=2, parallel=1, duplicates=1.0)
    assert report.requests == 9 and report.kept == 6 and report.spare == 3
    assert [text.count("Indeed") for text in answers_of(tmp_path / "out.jsonl")] == [1, 2] * 3


def test_wrong_answers_are_rejected_until_one_is_right(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(1, 5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(body: dict[str, Any], before: int) -> Any:
        n = int(question(body).split("+")[1][:-1])
        tries = sum(question(body) == question(b) for b in server.asked)
        return said(f"<think>\nlet me add</think>{n}+{n}={2 * n if tries > 1 else 99}")

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url, samples=2, rules=Rules(check_answer=True))
    assert report.kept == report.reasoned == 4 and report.dropped == {"wrong answer": 4}
    for row, (n, _) in zip(rows_of(tmp_path / "out.jsonl"), enumerate(rows, 1), strict=True):
        assert row["messages"][-1] == {
            "role": "assistant",
            "content": f"{n}+{n}={2 * n}",
            "reasoning_content": "let me add",
        }


def test_no_good_answer_is_an_error_that_says_why(tmp_path: Path) -> None:
    prompts_file(tmp_path, 3)
    with (
        FakeTeacher(lambda body, before: said("x", "length")).listening() as server,
        pytest.raises(KllmError, match=r"no answer passed: cut by max_tokens 3.*out\.jsonl\.answers"),
    ):
        run(tmp_path, server.url)
    assert not (tmp_path / "out.jsonl").exists()


# ---- what is written


def test_the_system_message_is_said_and_kept_as_asked() -> None:
    assert with_system([{"role": "user", "content": "q"}], None) == [{"role": "user", "content": "q"}]
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    assert with_system(own, "new")[0]["content"] == "new\n\nown" and own[0]["content"] == "own"
    row = conversation(ASKED, "S", {"role": "assistant", "content": "a"})
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"] and "tools" not in row
    tooled = Prompt("", ASKED.messages, [{"type": "function", "function": {"name": "add"}}], None, "")
    assert conversation(tooled, None, {"role": "assistant", "content": "a"})["tools"]


def test_twins_without_reasoning_teach_the_switch(tmp_path: Path) -> None:
    prompts_file(tmp_path, 12)

    def answer(body: dict[str, Any], before: int) -> Any:
        return said(tell(body)["choices"][0]["message"]["content"], reasoning_content="hm, towers")

    with FakeTeacher(answer).listening() as server:
        report = run(tmp_path, server.url, model="m", plain_ratio=0.5)
        first = (tmp_path / "out.jsonl").read_bytes()
        assert run(tmp_path, server.url, model="m", plain_ratio=0.5).to_dict()["plain"] == report.plain
        assert (tmp_path / "out.jsonl").read_bytes() == first
    assert report.kept == report.reasoned == 12 and 2 <= report.plain <= 10
    twins = [
        row
        for row in rows_of(tmp_path / "out.jsonl")
        if row["messages"][-1]["content"].startswith(EMPTY_THINK)
    ]
    assert len(twins) == report.plain and not any("reasoning_content" in t["messages"][-1] for t in twins)
    assert (
        plain_twin({"messages": [{"role": "user", "content": "<think>"}]})["messages"][0]["content"]
        == "<think>"
    )
    tokenizer, _ = train_tokenizer(["the towers are known"] * 5, 300, max_bytes=10_000, min_frequency=1)
    encode = ChatDocuments(tokenizer, EncodeOptions(1024, think=ThinkOptions()))
    records = [normalise(row, "chat") for _, row in iter_records(tmp_path / "out.jsonl")]
    trained = []
    for document in encode(records):
        ids, mask = document.renderings[0]  # type: ignore[union-attr]
        assert mask is not None
        trained.append(tokenizer.decode(ids[mask.astype(bool)].tolist(), skip_special_tokens=False))
    assert sum(text.startswith("<think>\nhm, towers\n</think>\n\n") for text in trained) == 12
    assert sum("think" not in text for text in trained) == report.plain


def test_thinking_teachers_are_told_to_think(tmp_path: Path) -> None:
    prompts_file(tmp_path, 1)
    with FakeTeacher(tell).listening() as server:
        run(tmp_path, server.url, sampling=Sampling(enable_thinking=False, max_tokens=None, temperature=None))
    (body,) = server.asked
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "max_tokens" not in body and "temperature" not in body
