"""The built-in world: the same bytes everywhere, true answers, and questions that training never asks."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from kllm.data.builtin import generate
from kllm.data.builtin.rng import Deck, Dice
from kllm.data.builtin.sums import Sum
from kllm.data.builtin.voice import voice
from kllm.data.builtin.world import World, group, world
from kllm.errors import UserError

SPLITS = ("pretrain", "sft", "preference", "rl", "tools", "eval")
TRAINING = SPLITS[:-1]
LANGS = ("en", "zh")


@lru_cache(maxsize=16)
def rows(split: str, seed: int = 0) -> list[dict[str, Any]]:
    return list(generate(split, seed))


def digest(split: str, seed: int = 0) -> str:
    lines = "\n".join(json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows(split, seed))
    return hashlib.sha256(lines.encode()).hexdigest()


def exchanges(split: str) -> Iterator[tuple[str, str]]:
    """Every (user text, assistant text) of a split."""
    for row in rows(split):
        if split == "pretrain":
            parts = re.split(r"(?:^|\n)(user|assistant):\n", row["text"])
            said = list(zip(parts[1::2], parts[2::2], strict=True))
            messages = [{"role": role, "content": text} for role, text in said]
        else:
            messages = [*row.get("messages", []), *row.get("prompt", []), *row.get("chosen", [])]
            messages += row.get("rejected", [])
            if split == "rl":
                messages = [*messages, {"role": "assistant", "content": row["answer"]}]
        user = ""
        for message in messages:
            if message["role"] == "user":
                user = message["content"]
            else:
                yield user, message["content"]


@lru_cache(maxsize=1)
def training_exchanges() -> list[tuple[str, str]]:
    return [pair for split in TRAINING for pair in exchanges(split)]


# ---- the generator


def test_same_seed_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib, json, sys; from kllm.data.builtin import generate\n"
        "for s in ('sft', 'eval', 'preference'):\n"
        "    text = '\\n'.join(json.dumps(r, ensure_ascii=False, sort_keys=True) for r in generate(s))\n"
        "    print(hashlib.sha256(text.encode()).hexdigest())\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert out.stdout.split() == [digest(split) for split in ("sft", "eval", "preference")]


def test_another_seed_is_another_world() -> None:
    other = World(1)
    assert {f.value for f in other} <= {f.value for f in world()} | {f.value for f in other}
    same = [f for f in world() if f.kind == "person" and other.facts[f.key].value == f.value]
    assert len(same) < 0.3 * sum(f.kind == "person" for f in world())
    assert digest("eval", 1) != digest("eval")


def test_dice_never_change() -> None:
    """Pinned values: a change here changes every byte of every world."""
    dice = Dice("pinned")
    assert [dice.below(100) for _ in range(6)] == [46, 24, 32, 75, 89, 13]
    assert dice.shuffled(range(8)) == [7, 0, 5, 3, 6, 1, 4, 2]


def test_dice_are_fair_and_decks_deal_everything() -> None:
    dice = Dice("fair")
    counts = Counter(dice.below(10) for _ in range(20000))
    assert all(1800 < counts[i] < 2200 for i in range(10))
    assert sum(dice.chance(0.25) for _ in range(20000)) == pytest.approx(5000, abs=250)
    weighted = Counter(dice.weighted((("a", 1), ("b", 3))) for _ in range(20000))
    assert weighted["b"] == pytest.approx(15000, abs=300)
    deck = Deck(range(10), dice)
    assert sorted(deck.deal() for _ in range(10)) == list(range(10))


def test_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="splits: pretrain, sft"):
        generate("train")


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_their_split_s_fields(split: str) -> None:
    fields = {
        "pretrain": {"text"},
        "sft": {"messages", "lang", "category"},
        "preference": {"prompt", "chosen", "rejected", "lang", "category"},
        "rl": {"messages", "answer"},
        "tools": {"messages", "tools", "lang", "category"},
        "eval": {"question", "answer", "messages", "lang", "category"},
    }[split]
    assert len(rows(split)) > 500
    for row in rows(split):
        assert set(row) == fields
        assert all(row[field] for field in fields - {"tools"})
        for message in row.get("messages", []):
            assert message["role"] in ("user", "assistant", "tool")
            assert message["content"].strip() or message.get("tool_calls")


# ---- variety


def numbers() -> list[str]:
    """Questions of the training splits that ask for a sum or a comparison."""
    return [
        q for q, a in training_exchanges() if re.fullmatch(r"[\d+=<>，, -]+[.。]", a) and re.search(r"\d", q)
    ]


def test_several_thousand_facts_and_dozens_of_phrasings() -> None:
    facts = list(world())
    assert len(facts) == len({f.key for f in facts}) >= 3200
    assert sum(group(f) != "derived" for f in facts) >= 1400
    sums = {tuple(sorted(map(int, pair))) for pair in re.findall(r"(\d+)\D{1,8}(\d+)", " ".join(numbers()))}
    assert len(sums) >= 2500
    for lang in LANGS:
        speaker = voice(lang, world())
        ways = [line for lines in speaker.phrases.values() for line in lines[">"]]
        asks = [line for lines in speaker.phrases.values() for line in lines["?"]]
        assert len(set(ways)) >= 48
        assert len(set(asks)) >= 72


def test_every_base_fact_is_told_in_the_pretraining_text() -> None:
    text = {"en": set(), "zh": set()}  # type: dict[str, set[str]]
    for row in rows("pretrain"):
        for sentence in re.split(r"(?<=[.。])\s*|\n|: |：", row["text"]):
            text["zh" if re.search("[\u4e00-\u9fff]", sentence[:4]) else "en"].add(sentence)
    for lang in LANGS:
        speaker, missing = voice(lang, world()), []
        for fact in world():
            if group(fact) == "derived" or fact.lang not in ("", lang):
                continue
            ways = speaker.phrases[f"{fact.kind}.{fact.attr}"][">"]
            if not any(speaker.fill(way, fact) in text["en"] | text["zh"] for way in ways):
                missing.append(fact)
        assert not missing, missing[:3]


def test_people_have_names_of_two_characters_and_each_a_city() -> None:
    assert all(len(name) == 2 for name in world().people["zh"])
    assert all(("person", "city", name) in world().facts for lang in LANGS for name in world().people[lang])
    everyone = world().people["en"] + world().people["zh"]
    assert len(everyone) == len(set(everyone))


# ---- truth


def test_worked_sums_are_right() -> None:
    assert Sum(47, "+", 38).work("en") == "7+8=15, 4+3+1=8, =85."
    assert Sum(47, "+", 8).work("en") == "7+8=15, 4+1=5, =55."
    assert Sum(41, "+", 8).work("zh") == "1+8=9，=49。"
    assert Sum(52, "-", 38).work("zh") == "12-8=4，5-3-1=1，=14。"
    assert Sum(3, "+", 9).work("en") == "=12."
    assert Sum(47, ">", 38).work("en") == "4>3, 47>38, =47."
    assert Sum(42, ">", 47).work("zh") == "4=4，2<7，42<47，=47。"
    asked = 0
    for question, answer in training_exchanges():
        if (found := re.search(r"(\d+)(?:\+| plus | and |加)(\d+)", question)) and re.search(
            r"^[^<>]*=\d+[.。]$", answer
        ):
            right = int(found[1]) + int(found[2]) == int(answer.rstrip(".。").rpartition("=")[2])
            asked += right
            assert right or (question, answer) in wrong_answers()
    assert asked > 1000
    for split in ("sft", "eval"):
        for _, answer in exchanges(split):
            for left, right in re.findall(r"(\d+(?:[+-]\d+)+)=(\d+)", answer):
                assert sum(int(n) for n in re.findall(r"[+-]?\d+", left)) == int(right)
            for left, sign, right in re.findall(r"(\d+)([<>])(\d+)", answer):
                assert (int(left) < int(right)) == (sign == "<")


def wrong_answers() -> set[tuple[str, str]]:
    return {(r["prompt"][-1]["content"], r["rejected"][0]["content"]) for r in rows("preference")}


def test_carries_and_borrows_occur() -> None:
    assert sum("+1=" in answer for _, answer in exchanges("sft")) > 100
    assert sum("-1=" in answer for _, answer in exchanges("preference")) > 100


RECALLED = re.compile(
    r"(?:Your .* (?:in|is a|is an|is)|你叫|你住在|你喜欢|你养了|你的工作是) ?([^.。]+)[.。]"
)


def test_what_the_user_said_is_what_is_remembered() -> None:
    seen = Counter()  # type: Counter[str]
    for split in ("sft", "eval"):
        for row in rows(split):
            if row["category"] != "memory":
                continue
            said = " ".join(m["content"] for m in row["messages"][:-2] if m["role"] == "user")
            answer = row["messages"][-1]["content"] if split == "sft" else row["answer"]
            value = RECALLED.fullmatch(answer)
            assert value and value[1] in said, row
            seen[row["lang"]] += 1
    assert min(seen["en"], seen["zh"]) > 100


def test_only_strangers_are_unknown() -> None:
    names = set(world().people["en"]) | set(world().people["zh"])
    refused = [q for q, a in exchanges("sft") if a in ("I don't know.", "我不知道。")]
    assert len(refused) > 500
    assert not [
        q for q in refused if any(re.search(rf"\b{n}\b", q) if n.isascii() else n in q for n in names)
    ]
    needless = [
        r for r in rows("preference") if r["rejected"][0]["content"] in ("I don't know.", "我不知道。")
    ]
    assert len(needless) > 100


def test_preferences_differ_and_the_chosen_is_true() -> None:
    answers = {}  # type: dict[str, set[str]]
    for question, answer in exchanges("sft"):
        answers.setdefault(question, set()).add(answer)
    compared = 0
    for row in rows("preference"):
        question = row["prompt"][0]["content"]
        good, bad = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert good != bad
        if len(known := answers.get(question, set())) == 1:
            assert known == {good}
            compared += 1
    assert compared > 200


# ---- what is held out stays out


def test_held_out_questions_occur_in_no_training_split() -> None:
    """Every evaluation question about a fact: its very words, greeting or not, are asked nowhere else."""
    asked = {strip(question) for question, _ in training_exchanges()}
    assert len(asked) > 5000
    checked = 0
    for row in rows("eval"):
        if row["category"] not in ("follow-up", "memory"):  # there the words before the question count
            assert strip(row["question"]) not in asked, row
            checked += 1
    assert checked > 500


def test_held_out_facts_are_asked_for_in_no_words() -> None:
    """Not the phrasing is new in the evaluation but the fact: no training question means it."""
    held = [fact for fact in world() if fact.key in world().held]
    assert len(held) > 500
    assert {group(fact) for fact in held} == {"person", "derived", "thing"}
    asked = {strip(question) for question, _ in training_exchanges()}
    for fact in held:
        for lang in (fact.lang,) if fact.lang else LANGS:
            speaker = voice(lang, world())
            for way in speaker.phrases[f"{fact.kind}.{fact.attr}"]["?"]:
                assert speaker.fill(way, fact) not in asked, fact


def test_follow_ups_ask_for_no_held_out_fact() -> None:
    """ "And Tom?" after a question about Anna: the answer is none that only the evaluation asks for."""
    kept = {
        lang: {voice(lang, world()).answer(f) for f in world() if f.key in world().held} for lang in LANGS
    }
    answers = {
        lang: {voice(lang, world()).answer(f) for f in world() if f.key not in world().held} for lang in LANGS
    }
    seen = 0
    for row in rows("sft"):
        if row["category"] == "follow-up":
            assert row["messages"][-1]["content"] not in kept[row["lang"]] - answers[row["lang"]]
            seen += 1
    assert seen > 500
    for row in rows("eval"):
        if row["category"] in ("follow-up", "person", "derived", "thing"):
            assert row["answer"] in kept[row["lang"]], row


def test_derived_facts_are_never_stated() -> None:
    """Both steps are told apart; only answers put them together."""
    told = [row["text"] for row in rows("pretrain") if not re.match("user:|Words|词语", row["text"])]
    assert len(told) > 10000
    cities = {f.subject: f.value for f in world() if f.attr == "country" and f.kind == "city"}
    for lang in LANGS:
        for name in world().people[lang]:
            city = world().facts[("person", "city", name)].value
            country = cities[city].split("/")[lang == "zh"]
            near = re.compile(rf"{name}[^.。\n]*{country}")
            assert not [t for t in told if near.search(t)]


def strip(question: str) -> str:
    for lang in LANGS:
        for greeting in voice(lang, world()).greetings:
            question = question.removeprefix(greeting)
    return question


def test_held_out_numbers_are_in_no_sum() -> None:
    checked = 0
    for question in numbers():
        pair = [int(n) for n in re.findall(r"\d+", question)]
        if len(pair) == 2 and max(pair) < 100:
            assert not world().held_numbers(*pair), question
            checked += 1
    assert checked > 3000
    asked = [row for row in rows("eval") if row["category"] in ("addition", "comparison")]
    for row in asked:
        a, b = map(int, re.findall(r"\d+", row["question"]))
        assert world().held_numbers(a, b)
    assert len(asked) > 150


def test_held_out_dialogues_and_phrasings_are_new() -> None:
    dialogues = {
        json.dumps([m["content"] for m in row["messages"] if m["role"] == "user"]) for row in rows("sft")
    }
    training = {question for question, _ in training_exchanges()}
    for row in rows("eval"):
        users = [m["content"] for m in row["messages"]]
        assert json.dumps(users[::2]) not in dialogues
        if row["category"] in ("identity", "unknown"):
            assert row["question"] not in training


def test_evaluation_is_balanced() -> None:
    counts = Counter((row["lang"], row["category"]) for row in rows("eval"))
    assert {lang for lang, _ in counts} == set(LANGS)
    names = {name for _, name in counts}
    assert names >= {
        "person",
        "derived",
        "thing",
        "addition",
        "comparison",
        "follow-up",
        "identity",
        "unknown",
        "memory",
    }
    assert all(counts["en", name] >= 12 and counts["zh", name] >= 12 for name in names)
    first = Counter((row["lang"], row["category"]) for row in rows("eval")[: 2 * len(names)])
    assert set(first.values()) == {1}  # a small limit keeps the balance
