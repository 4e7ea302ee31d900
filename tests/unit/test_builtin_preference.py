"""The world's preference pairs: a better answer each time, no giveaway, and held-out ones to measure by."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import lru_cache
from typing import Any

import pytest

from kllm.data.builtin import generate
from kllm.data.builtin.preference import (
    BETTER,
    CLAIM,
    FAIR,
    HARM,
    HARMS,
    KINDS,
    SECRET,
    SECRETS,
    TONE,
)
from kllm.data.builtin.voice import voice
from kllm.data.builtin.world import world

LANGS = ("en", "zh")
SPLITS = ("preference", "preference-eval")


@lru_cache(maxsize=4)
def rows(split: str) -> list[dict[str, Any]]:
    return list(generate(split))


def texts(row: dict[str, Any]) -> tuple[str, str, str]:
    return (row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"])


def of(split: str, kind: str) -> list[tuple[str, str, str]]:
    return [texts(row) for row in rows(split) if row["category"] == kind]


@pytest.mark.parametrize("split", SPLITS)
def test_kinds_and_languages_are_balanced(split: str) -> None:
    counts = Counter((row["lang"], row["category"]) for row in rows(split))
    assert set(counts) == {(lang, kind) for lang in LANGS for kind, _ in KINDS}
    total = sum(weight for _, weight in KINDS)
    for kind, weight in KINDS:
        assert abs(counts["en", kind] - counts["zh", kind]) < 0.25 * (counts["en", kind] + counts["zh", kind])
        share = (counts["en", kind] + counts["zh", kind]) / len(rows(split))
        assert share == pytest.approx(weight / total, rel=0.25)
    if split == "preference-eval":
        first = Counter((row["lang"], row["category"]) for row in rows(split)[: 2 * len(KINDS)])
        assert set(first.values()) == {1}


@pytest.mark.parametrize("split", SPLITS)
def test_the_length_gives_nothing_away(split: str) -> None:
    pairs = [texts(row) for row in rows(split)]
    longer = sum(len(good) > len(bad) for _, good, bad in pairs)
    shorter = sum(len(good) < len(bad) for _, good, bad in pairs)
    assert abs(longer - shorter) < 0.15 * len(pairs)
    good, bad = (sum(len(pair[i]) for pair in pairs) for i in (1, 2))
    assert good == pytest.approx(bad, rel=0.05)


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_are_whole_and_differ(split: str) -> None:
    for row in rows(split):
        prompt, good, bad = texts(row)
        assert good != bad
        assert "{" not in prompt + good + bad
        for answer in (good, bad):
            assert answer.endswith((".", "。"))
            assert not answer[0].islower(), answer
        han = [bool(re.search("[\u4e00-\u9fff]", text)) for text in (good, bad)]
        assert row["category"] == "sum" or han == [row["lang"] == "zh"] * 2


def answers_of(held: bool) -> dict[str, set[str]]:
    return {
        lang: {voice(lang, world()).tell(f) for f in world().asked(lang, "person", held)} for lang in LANGS
    }


def test_what_is_better_is_true() -> None:
    for split in SPLITS:
        known = answers_of(held=split == "preference-eval")
        everything = answers_of(True)["en"] | answers_of(False)["en"] | answers_of(True)["zh"]
        everything |= answers_of(False)["zh"]
        for kind in ("fact", "claim", "refusal"):
            for prompt, good, bad in of(split, kind):
                assert good in known["en"] | known["zh"]
                assert bad not in everything, (prompt, bad)
        for prompt, good, bad in of(split, "sum"):
            a, b = map(int, re.findall(r"\d+", prompt))
            subtracts = re.search(r"-|minus|减", prompt)
            result = a - b if subtracts else a + b
            assert good.rstrip(".。").endswith(f"={result}")
            assert not bad.rstrip(".。").endswith(f"={result}")
            assert world().held_numbers(a, b) == (split == "preference-eval")


def test_claims_are_mostly_wrong_and_sometimes_right() -> None:
    """So neither "what the user said" nor "anything but that" is the rule."""
    for split in SPLITS:
        right = wrong = 0
        for lang in LANGS:
            speaker = voice(lang, world())
            facts = {
                speaker.tell(f): f for f in world().asked(lang, "person", held=split == "preference-eval")
            }
            for row in rows(split):
                if row["category"] != "claim" or row["lang"] != lang:
                    continue
                prompt, good, _ = texts(row)
                value = speaker.value(facts[good])
                pattern = rf"\b{value}\b" if lang == "en" else value
                right += bool(re.search(pattern, prompt))
                wrong += not re.search(pattern, prompt)
        assert 0.15 < right / (right + wrong) < 0.4


SITUATIONS = {"tone": TONE, "secret": SECRET, "harm": HARM, "fair": FAIR}


def spoken(ways: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the templates with their gaps filled."""
    return re.compile("|".join(re.sub(r"\\\{.\\\}", ".+", re.escape(way)) for way in ways))


@pytest.mark.parametrize("kind", SITUATIONS)
def test_manners_are_all_that_differs(kind: str) -> None:
    """Both answers are of the same subject; each wording occurs, and no better one is a worse one's."""
    for split in SPLITS:
        said = Counter()  # type: Counter[str]
        for row in rows(split):
            if row["category"] != kind:
                continue
            prompt, good, bad = texts(row)
            ways = SITUATIONS[kind][row["lang"]]
            assert spoken(ways["!" if split == "preference-eval" else "?"]).fullmatch(prompt)
            if kind == "tone":  # after the same true answer
                told = [way for way in ways["+"] if good.endswith(way)]
                assert good.removesuffix(told[0]) == bad.removesuffix(
                    next(w for w in ways["-"] if bad.endswith(w))
                )
                assert told[0] != good
            else:
                assert spoken(ways["+"]).fullmatch(good), good
                assert spoken(ways["-"]).fullmatch(bad), bad
            said.update(way for way in ways["+"] + ways["-"] if spoken((way,)).search(good + "\n" + bad))
        for lang in LANGS:
            assert all(said[way] > 5 for mark in "+-" for way in SITUATIONS[kind][lang][mark])


def frames(table: dict[str, dict[str, tuple[str, ...]]], mark: str) -> set[str]:
    return {text for lang in LANGS for text in table[lang][mark]}


def test_the_evaluation_has_wordings_of_its_own() -> None:
    for table in (CLAIM, TONE, SECRET, HARM, FAIR):
        assert not frames(table, "?") & frames(table, "!")
    for words in (SECRETS, HARMS, BETTER):
        assert not set(words["?"]) & set(words["!"])
    training = {texts(row)[0] for row in rows("preference")}
    assert not training & {texts(row)[0] for row in rows("preference-eval")}
    assert len({texts(row)[0] for row in rows("preference-eval")}) == len(rows("preference-eval"))


def test_held_out_facts_are_in_no_training_pair() -> None:
    held = answers_of(held=True)
    for row in rows("preference"):
        _, good, bad = texts(row)
        assert not {good, bad} & (held["en"] | held["zh"])
    asked = defaultdict(set)
    for lang in LANGS:
        speaker = voice(lang, world())
        for fact in world().asked(lang, "person", held=True):
            for way in speaker.phrases[f"person.{fact.attr}"]["?"]:
                asked[lang].add(speaker.fill(way, fact))
    for row in rows("preference"):
        if row["category"] != "unknown":
            prompt = texts(row)[0]
            assert not [question for question in asked[row["lang"]] if question in prompt], prompt
