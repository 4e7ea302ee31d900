"""The preference task against each conversation computed alone, and against a model that must prefer one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_support import chat_model

from kllm.data.builtin import generate
from kllm.errors import UserError
from kllm.eval.preference import run_preference
from kllm.eval.tasks import run_task
from kllm.export.load import load_model
from kllm.tokenizer.chat import ChatEncoder

PAIRS = [
    {"prompt": "where is the cat?", "chosen": "the cat is here.", "rejected": "the cat ate the fish."},
    {"prompt": "你好", "chosen": "你好，世界。", "rejected": "猫在哪里？猫在哪里？", "category": "zh"},
    {
        "prompt": [
            {"role": "user", "content": "the fish"},
            {"role": "assistant", "content": "the mat"},
            {"role": "user", "content": "the mat"},
        ],
        "chosen": [{"role": "assistant", "content": "here"}],
        "rejected": [{"role": "assistant", "content": "the cat sat on the mat and ate the fish"}],
    },
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return load_model(chat_model(tmp_path_factory.mktemp("model") / "m", context=512))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def alone(model: Any, prompt: Any, answer: Any) -> tuple[float, int]:
    """The summed log-probability of the last answer of one conversation, the plain way."""
    net, tokenizer = model
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    said = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    encoder = ChatEncoder(tokenizer)
    start = len(encoder.prompt(before))
    encoded = encoder.encode([*before, *said])
    ids = torch.tensor(encoded.ids)
    with torch.no_grad():
        logp = net.logits(net(ids, torch.arange(len(ids)))).log_softmax(-1)
    places = [i for i in range(start, len(ids)) if encoded.mask[i]]
    return sum(float(logp[i - 1, ids[i]]) for i in places), len(places)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_it_is_the_definition(model, tmp_path: Path, batch_tokens: int) -> None:
    result = run_preference(*model, write(tmp_path / "pairs.jsonl", PAIRS), batch_tokens=batch_tokens)
    good = [alone(model, row["prompt"], row["chosen"]) for row in PAIRS]
    bad = [alone(model, row["prompt"], row["rejected"]) for row in PAIRS]
    wins = [g[0] > b[0] for g, b in zip(good, bad, strict=True)]
    per_token = [g[0] / g[1] > b[0] / b[1] for g, b in zip(good, bad, strict=True)]
    assert (result["correct"], result["total"]) == (sum(wins), 3)
    assert result["accuracy_per_token"] == pytest.approx(sum(per_token) / 3)
    assert result["chosen_logprob"] == pytest.approx(sum(g[0] for g in good) / 3, rel=1e-5)
    assert result["rejected_logprob"] == pytest.approx(sum(b[0] for b in bad) / 3, rel=1e-5)
    total = sum(g[0] for g in good) / sum(g[1] for g in good)
    assert result["chosen_logprob_per_token"] == pytest.approx(total, rel=1e-5)
    assert result["margin"] == pytest.approx(result["chosen_logprob"] - result["rejected_logprob"])
    assert {lang: row["total"] for lang, row in result["by_language"].items()} == {"en": 2, "zh": 1}
    assert set(result["by_category"]["en"]) == {"pairs"}
    assert set(result["by_category"]["zh"]) == {"zh"}
    assert [s["correct"] for s in result["samples"]] == wins
    assert [s["answer"] == s["expected"] for s in result["samples"]] == wins
    json.dumps(result)


def test_swapped_pairs_give_the_rest(model, tmp_path: Path) -> None:
    """A random model has no opinion; whatever it prefers, it loses when the sides are changed."""
    rows = random.Random(0).sample(list(generate("preference-eval")), 40)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    one = run_preference(*model, write(tmp_path / "a.jsonl", rows))
    two = run_preference(*model, write(tmp_path / "b.jsonl", swapped))
    assert one["correct"] + two["correct"] == 40
    assert one["margin"] == pytest.approx(-two["margin"], rel=1e-6)


def test_the_built_in_pairs_by_kind_and_language(model) -> None:
    name = "preference:builtin:world/preference-eval"
    result = run_task(name, *model, limit=18)
    assert (result["task"], result["total"]) == (name, 18)
    for lang in ("en", "zh"):
        assert {row["total"] for row in result["by_category"][lang].values()} == {1}
        assert len(result["by_category"][lang]) == 9


def test_the_model_is_left_as_it_was(model, tmp_path: Path) -> None:
    net, tokenizer = model
    net.train()
    run_preference(net, tokenizer, write(tmp_path / "pairs.jsonl", PAIRS))
    assert net.training
    net.eval()


def test_long_pairs_are_passed_over_and_counted(model, tmp_path: Path) -> None:
    long = {**PAIRS[0], "chosen": "the cat sat on the mat " * 100}
    result = run_preference(*model, write(tmp_path / "pairs.jsonl", [*PAIRS, long]))
    assert (result["total"], result["dropped"]) == (3, 1)
    with pytest.raises(UserError, match="no pair to compare.*1 are longer than 512 tokens"):
        run_preference(*model, write(tmp_path / "long.jsonl", [long]))


def test_what_is_no_pair_is_said_with_its_line(model, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [PAIRS[0], {"text": "the cat"}])
    with pytest.raises(UserError, match=r"x\.jsonl:2"):
        run_task(f"preference:{file}", *model)
    same = write(tmp_path / "y.jsonl", [{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}])
    with pytest.raises(UserError, match=r"y\.jsonl:1.*the same"):
        run_task(f"preference:{same}", *model)
    with pytest.raises(UserError, match="no such file"):
        run_task(f"preference:{tmp_path / 'none.jsonl'}", *model)
