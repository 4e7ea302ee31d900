"""Evaluation: when an answer is right, what is counted, and perplexity against its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from chat_support import chat_model

from kllm.data.builtin import generate
from kllm.data.builtin.splits import transcript
from kllm.data.builtin.talk import Turn
from kllm.errors import UserError
from kllm.eval.asking import Asker, Said, text_prompt
from kllm.eval.names import TASKS, check_task, task_data
from kllm.eval.scoring import exact, final_answer, language_of, names_all, shown, tally
from kllm.eval.tasks import run_task
from kllm.export.load import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return load_model(chat_model(tmp_path_factory.mktemp("model") / "m"))


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It is Rome.", "It is Rome.", True),
        ("it is  rome", "It is Rome.", True),
        ("It is Rome, I think.", "It is Rome.", False),
        ("", "It is Rome.", False),
        ("东京。", "东京", True),
        ("京东。", "东京", False),
        ("7+8=15, 4+3+1=8, =85.", "85", True),
        ("7+8=15, 4+3=7, =75.", "85", False),
        ("85", "85", True),
        ("185", "85", False),
        ("none", "85", False),
    ],
)
def test_exact(answer: str, expected: str, right: bool) -> None:
    assert exact(answer, expected) is right


def test_final_answer_is_the_number_after_the_last_equals() -> None:
    assert final_answer("1+1=2, so 11+12=23") == "23"
    assert final_answer("it is -4.") == "-4"
    assert final_answer("nothing") is None


def test_tally_counts_by_language_and_category() -> None:
    result = tally([("en", "sum", True), ("en", "sum", False), ("zh", "sum", True), ("zh", "name", True)])
    assert (result["correct"], result["total"], result["accuracy"]) == (3, 4, 0.75)
    assert result["by_language"]["en"]["accuracy"] == 0.5
    assert result["by_category"]["zh"]["name"] == {"accuracy": 1.0, "correct": 1, "total": 1}


def test_unknown_tasks_are_refused_with_the_nearest() -> None:
    for name, hint in (
        ("world", "mean builtin:world\\?"),
        ("identity", "mean builtin:identity\\?"),
        ("builtin:identty", "mean builtin:identity\\?"),
        ("prefrence:x.jsonl", "mean preference:FILE\\?"),
        ("perplexity", "FILE"),
        ("preference:", "preference:builtin:world/preference-eval"),
        ("format", "format:builtin:reasoning/eval"),
        ("hellaswag", "known"),
    ):
        with pytest.raises(UserError, match=hint):
            check_task(name)
    with pytest.raises(UserError) as unknown:
        check_task("hellaswag")
    assert all(name in str(unknown.value) for name in TASKS)


def test_tasks_name_their_data() -> None:
    for name, data in (
        ("builtin:world", "builtin:world/eval"),
        ("builtin:world/facts", "builtin:world/eval"),
        ("builtin:identity", "builtin:identity/eval"),
        ("builtin:tools", "builtin:tools/eval"),
        ("perplexity:heldout.jsonl", "heldout.jsonl"),
        ("preference:builtin:world/preference-eval", "builtin:world/preference-eval"),
        ("format:a:b.jsonl", "a:b.jsonl"),
    ):
        check_task(name)
        assert task_data(name) == [data]
    assert task_data("hellaswag") == task_data("format") == []


def test_text_style_is_the_style_of_the_pretraining_text() -> None:
    turns = [Turn("q1", "a1", ""), Turn("q2", "a2", "")]
    asked = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    assert text_prompt(asked) + "a2" == transcript(turns)


@pytest.mark.parametrize("chat", [True, False, None])
def test_world_on_a_random_model(model, chat: bool | None) -> None:
    result = run_task("builtin:world", *model, limit=40, max_new_tokens=4, chat=chat)
    assert result["total"] == 40
    assert result["accuracy"] < 0.2
    assert {len(names) for names in result["by_category"].values()} == {10}
    rows = list(generate("eval"))[:40]
    assert {s["question"] for s in result["samples"]} <= {r["question"] for r in rows}


@pytest.mark.parametrize("before", ["", "<think>\nhm\n</think>\n\n"])
def test_right_answers_are_counted(model, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """A model that knows every answer scores 1, so what is compared is the answer, after any thinking."""
    for name, rows in (
        ("builtin:world", list(generate("eval"))),
        ("builtin:identity", list(generate("eval", subject="identity"))),
    ):
        answers = {row["messages"][-1]["content"]: row["answer"] for row in rows[:20]}
        monkeypatch.setattr(
            Asker,
            "chat",
            lambda self, asked, a=answers: [Said(before + a[m[-1]["content"]], True) for m in asked],
        )
        result = run_task(name, *model, limit=20, chat=True)
        assert result["accuracy"] == 1.0
        assert len(result["samples"]) == 20


def test_facts_leave_out_the_questions_about_itself(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asker, "chat", lambda self, asked: [Said("", True) for _ in asked])
    whole = run_task("builtin:world", *model, chat=True)
    facts = run_task("builtin:world/facts", *model, chat=True)
    assert set(whole["by_category"]["en"]) - set(facts["by_category"]["en"]) == {"identity"}
    assert whole["total"] - facts["total"] == sum(row["category"] == "identity" for row in generate("eval"))


def test_the_old_persona_scores_nothing(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Asker, "chat", lambda self, asked: [Said("I am kllm. 我叫kllm。", True) for _ in asked]
    )
    assert run_task("builtin:identity", *model, chat=True)["correct"] == 0


@pytest.mark.parametrize(
    ("answer", "must", "never", "right"),
    [
        ("I am Willow.", [["willow"]], ["kllm"], True),
        ("I am Willow, not kllm.", [["willow"]], ["kllm"], False),
        ("I am Willows.", [["willow"]], [], False),
        ("My name is Willow.", [["i", "my"], ["willow"]], [], True),
        ("The name is Willow.", [["i", "my"], ["willow"]], [], False),
        ("我叫杨柳。", [["杨柳", "willow"]], [], True),
        ("我叫kllm。", [["我"]], ["kllm"], False),
        ("我是杨柳，白马画室做了我", [["杨柳"], ["白马画室"]], [], True),
        ("I am\nＷｉｌｌｏｗ", [["am willow"]], [], True),
        ("", [["willow"]], [], False),
    ],
)
def test_names_all(answer: str, must: list[list[str]], never: list[str], right: bool) -> None:
    assert names_all(answer, must, never) is right


def test_small_rules() -> None:
    assert [language_of(text) for text in ("Hello", "你好", "Hello 你")] == ["en", "zh", "zh"]
    assert shown([True] * 30) == list(range(20))
    assert shown([False] * 30) == list(range(10))
    assert shown([True] * 25 + [False] * 2) == [*range(18), 25, 26]


def test_perplexity_is_the_definition(model, tmp_path: Path) -> None:
    net, tokenizer = model
    texts = ["the cat sat on the mat", "where is the cat?", "你好，世界。"]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    result = run_task(f"perplexity:{file}", net, tokenizer)
    nll = text_nll = count = length = 0.0
    for text in texts:
        ids = torch.tensor([*tokenizer.encode(text), tokenizer.eot_token_id])
        with torch.no_grad():
            logp = net.logits(net(ids, torch.arange(len(ids)))).log_softmax(-1)
        for i, token in enumerate(ids[1:].tolist()):
            loss, size = -float(logp[i, token]), int(tokenizer.token_bytes()[token])
            nll, count = nll + loss, count + 1
            text_nll, length = text_nll + (loss if size else 0.0), length + size
    assert result["nll"] == pytest.approx(nll / count, rel=1e-5)
    assert result["ppl"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(text_nll / math.log(2) / length, rel=1e-5)
    with pytest.raises(UserError, match="missing"):
        run_task(f"perplexity:{tmp_path / 'missing.jsonl'}", net, tokenizer)
