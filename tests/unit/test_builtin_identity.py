"""The built-in persona: taught in many words, asked for in others, and nowhere mixed up with the old one."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from typing import Any

import pytest

from kllm.data.builtin import SUBJECTS, generate
from kllm.data.builtin.identity import topics
from kllm.data.builtin.voice import voice
from kllm.data.builtin.world import world
from kllm.data.encode import SYSTEM_PROMPTS
from kllm.data.sources import BUILTIN, content_hash, iter_records
from kllm.errors import UserError
from kllm.eval.scoring import names_all

LANGS = ("en", "zh")
TOPICS = {"name", "kind", "maker", "home", "language", "skill", "birth", "colour", "wish", "other"}


@lru_cache(maxsize=8)
def rows(split: str, subject: str = "identity") -> list[dict[str, Any]]:
    return list(generate(split, subject=subject))


def digest(some: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(some, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def bare(question: str) -> str:
    for lang in LANGS:
        for greeting in voice(lang, world()).greetings:
            question = question.removeprefix(greeting)
    return question


def asked() -> list[tuple[str, str]]:
    """Every (question, answer) of the training split."""
    return [
        (q["content"], a["content"])
        for row in rows("sft")
        for q, a in zip(row["messages"][::2], row["messages"][1::2], strict=True)
    ]


def test_the_names_of_the_data_are_the_generator_s() -> None:
    assert {subject: set(splits) for subject, splits in SUBJECTS.items()} == {
        subject: set(splits) for subject, splits in BUILTIN.items()
    }
    where, record = next(iter_records("builtin:identity/eval"))
    assert (where, record) == ("builtin:identity/eval:1", rows("eval")[0])
    hashes = {content_hash(f"builtin:{s}/{split}") for s, splits in BUILTIN.items() for split in splits}
    assert len(hashes) == sum(map(len, BUILTIN.values()))
    with pytest.raises(UserError, match="did you mean builtin:identity/sft"):
        list(iter_records("builtin:identity/stf"))
    with pytest.raises(UserError, match="did you mean builtin:reasoning/eval"):
        list(iter_records("builtin:raesoning/eval"))
    with pytest.raises(UserError, match="splits: sft, eval"):
        generate("rl", subject="identity")
    with pytest.raises(UserError, match="known: world, identity"):
        generate("sft", subject="persona")


def test_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib, json, sys; from kllm.data.builtin import generate\n"
        "for subject, split in (('identity', 'sft'), ('identity', 'eval'), ('reasoning', 'eval')):\n"
        "    rows = list(generate(split, subject=subject))\n"
        "    text = json.dumps(rows, ensure_ascii=False, sort_keys=True)\n"
        "    print(hashlib.sha256(text.encode()).hexdigest())\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    made = (("sft", "identity"), ("eval", "identity"), ("eval", "reasoning"))
    assert out.stdout.split() == [digest(rows(split, subject)) for split, subject in made]
    assert digest(list(generate("eval", 1, "identity"))) != digest(rows("eval"))


@pytest.mark.parametrize("lang", LANGS)
def test_every_topic_has_many_wordings_and_a_rule(lang: str) -> None:
    found = topics(lang)
    assert {topic.name for topic in found} == TOPICS
    for topic in found:
        training, held = topic.questions(lang, "?"), topic.questions(lang, "!")
        assert len(set(training)) == len(training) >= 15, topic.name
        assert len(set(held)) == len(held) >= 6, topic.name
        assert not set(training) & set(held)
        assert all(names_all(answer, topic.must, ["kllm"]) for answer in topic.lines[">"])
        for other in found:  # no topic's answer passes for another's, but a name is part of two
            if other.name != topic.name and {topic.name, other.name} != {"name", "other"}:
                assert not any(names_all(answer, topic.must) for answer in other.lines[">"]), other.name


@pytest.mark.parametrize("lang", LANGS)
def test_sentences_are_whole(lang: str) -> None:
    stops = (".", "?") if lang == "en" else ("。", "？")
    for topic in topics(lang):
        for text in [*topic.questions(lang, "?"), *topic.questions(lang, "!"), *topic.lines[">"]]:
            assert text.endswith(stops), text
            assert "{" not in text
            assert "  " not in text
            if lang == "en":
                assert text[0].isupper() or text.startswith("kllm"), text
                assert not re.search("[\u4e00-\u9fff]", text)


def test_the_persona_is_a_new_one() -> None:
    """Nothing that the model before says of itself, nor a system prompt, passes for an answer of it."""
    for lang in LANGS:
        old = [lines[">"][0] for lines in voice(lang, world()).identity.values()]
        for topic in topics(lang):
            assert not any(names_all(answer, topic.must) for answer in (*old, *SYSTEM_PROMPTS)), topic.name
    people = {name for lang in LANGS for name in world().people[lang]}
    assert not people & {"Willow", "杨柳"}


def test_held_out_questions_are_never_asked_in_training() -> None:
    training = {bare(question) for question, _ in asked()}
    assert len(training) > 2000
    for row in rows("eval"):
        assert bare(row["question"]) not in training, row["question"]


def test_nobody_says_what_the_old_persona_said() -> None:
    """No question about the model has the world's answer; thanks and goodbyes are as they were."""
    said = Counter(answer for _, answer in asked())
    for lang in LANGS:
        for name, lines in voice(lang, world()).identity.items():
            stays = name in ("self.thanks", "self.bye")
            assert (said[lines[">"][0]] > 0) == stays, name
        for topic in topics(lang):
            assert all(said[answer] > 50 for answer in topic.lines[">"])
    assert not [answer for answer in said if "kllm" in answer]


def test_languages_and_topics_are_balanced() -> None:
    persona = [row for row in rows("sft") if row["category"] in TOPICS]
    assert 0.12 < len(persona) / len(rows("sft")) < 0.18
    by = Counter(row["lang"] for row in persona)
    assert abs(by["en"] - by["zh"]) < 0.05 * len(persona)
    categories = Counter(row["category"] for row in persona)
    assert set(categories) == TOPICS
    assert max(categories.values()) < 1.3 * min(categories.values())
    evaluated = Counter((row["lang"], row["category"]) for row in rows("eval"))
    assert all(evaluated[lang, topic] >= 6 for lang in LANGS for topic in TOPICS)
    first = Counter((row["lang"], row["category"]) for row in rows("eval")[: 2 * len(TOPICS)])
    assert set(first.values()) == {1}  # a small limit keeps the balance
    context = [row for row in rows("eval") if len(row["messages"]) > 1]
    assert 0.1 < len(context) / len(rows("eval")) < 0.4


def test_the_expected_answer_passes_its_own_rule() -> None:
    for row in rows("eval"):
        assert set(row) == {"question", "answer", "messages", "must", "never", "lang", "category"}
        assert row["messages"][-1] == {"role": "user", "content": row["question"]}
        assert names_all(row["answer"], row["must"], row["never"])
        assert not names_all("I am kllm. " + row["answer"], row["must"], row["never"])
