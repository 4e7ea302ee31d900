"""`inspect_file`: the dict that `kllm data inspect` shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_tools import byte_tokenizer, chat, write_jsonl

from kllm.cli.inspected import print_data
from kllm.data.inspect import inspect_file
from kllm.errors import UserError
from kllm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_conversations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [chat("你好", "hello"), chat("q", "a" * 100), {"messages": []}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with file.open("a") as handle:
        handle.write("{broken\n")
    found = inspect_file(file, tokenizer)
    json.dumps(found)
    assert (found["kind"], found["dialects"], found["rows"]) == ("chat", {"openai": 2}, 2)
    assert found["bad_rows"] == 2 and [bad["where"] for bad in found["bad"]] == [f"{file}:3", f"{file}:4"]
    assert found["unit"] == "tokens" and found["complete"]
    assert sum(bin["rows"] for bin in found["histogram"]) == 2
    assert found["trained_tokens"] == 6 + 101
    assert found["tokens"]["total"] == found["tokens"]["mean"] * 2
    assert found["fits"][256] == 1.0
    sample = found["sample"]
    assert len(sample["ids"]) == len(sample["mask"]) == len(sample["pieces"])
    assert (
        "".join(sample["pieces"])
        == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    )
    shown = "".join(piece for piece, on in zip(sample["pieces"], sample["mask"], strict=True) if on)
    assert shown == "hello<|im_end|>"


def test_histogram_bins_cover_every_length(tmp_path: Path) -> None:
    lengths = [1, 16, 17, 32, 33, 64, 65]
    found = inspect_file(write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * n} for n in lengths]))
    assert found["histogram"] == [
        {"low": 1, "high": 16, "rows": 2}, {"low": 17, "high": 32, "rows": 2},
        {"low": 33, "high": 64, "rows": 2}, {"low": 65, "high": 128, "rows": 1},
    ]  # fmt: skip
    assert found["unit"] == "chars" and found["tokens"] is None and found["chars"]["max"] == 65


def test_texts_pairs_prompts_and_ratings(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = {
        "text": {"text": "abc"},
        "preference": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "prompt": {"question": "q", "answer": "4"},
        "rated": {"prompt": "q", "completion": "fine", "label": True},
    }
    for kind, row in rows.items():
        found = inspect_file(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer)
        assert found["kind"] == kind and found["rows"] == 1
        shown = "".join(found["sample"]["pieces"])
        trained = sum(found["sample"]["mask"])
        expected = {"text": ("abc<|endoftext|>", 4), "preference": ("good", 9), "prompt": ("assistant\n", 0),
                    "rated": ("fine", 5)}[kind]  # fmt: skip
        assert expected[0] in shown and trained == expected[1]


def test_row_limit_and_sample_choice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(50)])
    found = inspect_file(file, tokenizer, rows=10, sample=3)
    assert found["rows"] == 10 and not found["complete"]
    assert found["sample"]["text"] == "text 3" and found["sample"]["where"] == f"{file}:4"


def test_rows_of_another_kind_are_bad(tmp_path: Path) -> None:
    found = inspect_file(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, chat("q", "a"), {"text": "b"}]))
    assert found["kind"] == "text" and found["rows"] == 2
    assert "a conversation" in found["bad"][0]["reason"]


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: no row can be used; the first: unknown format"):
        inspect_file(write_jsonl(tmp_path / "a.jsonl", [{"foo": 1}]))
    with pytest.raises(UserError, match="no such file"):
        inspect_file(tmp_path / "none.jsonl")


def test_pairs_are_shown_in_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "no"},
        {"prompt": "q", "chosen": "a", "rejected": "worse"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = inspect_file(file, tokenizer)
    assert (found["rows"], found["bad_rows"], found["good"]) == (2, 1, None)
    prompt = len("user\nq\nassistant\n") + 3  # and three turn tokens
    pairs = found["pairs"]
    assert [pairs[name]["total"] for name in ("prompt", "chosen", "rejected")] == [2 * prompt, 7, 9]
    assert pairs["chosen_longer"] == 0.5 and pairs["saved"] == 2 * prompt / (4 * prompt + 16)
    assert found["tokens"]["total"] == 2 * prompt + 5 + 6 and found["trained_tokens"] == 16
    sample = found["sample"]
    assert [(part["name"], "".join(part["pieces"]), sum(part["mask"])) for part in sample["sections"]] == [
        ("prompt", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", 0),
        ("chosen", "good<|im_end|>", 5),
        ("rejected", "no<|im_end|>", 3),
    ]
    plain = inspect_file(file)
    assert plain["pairs"]["chosen"]["total"] == 5 and plain["pairs"]["saved"] is None
    assert [part["messages"][0]["content"] for part in plain["sample"]["sections"]] == ["q", "good", "no"]


def test_ratings_have_their_share_of_good_ones(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": n == 0} for n in range(4)]
    found = inspect_file(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    assert found["good"] == 0.25 and found["pairs"] is None and found["sample"]["sections"] == []


def test_the_page_of_pairs_has_every_part(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "no"}])
    for found in (inspect_file(file, tokenizer), inspect_file(file)):
        print_data(found)
        facts, _, shown = capsys.readouterr().out.partition("sample: ")
        parts = [shown.index(text) for text in ("[prompt]", "user", "[chosen]", "good", "[rejected]", "no")]
        assert parts == sorted(parts) and "chosen is the longer" in facts
