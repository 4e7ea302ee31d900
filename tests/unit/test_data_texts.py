"""What a tokenizer reads: every dialect's texts, and every source and file before any is used up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from data_tools import Source

from kllm.data.texts import all_texts, mixed_texts
from kllm.tokenizer.train import train_tokenizer


def write(path: Path, word: str, rows: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{word} {i:03d}"}) + "\n" for i in range(rows)))
    return str(path)


def test_texts_of_every_dialect() -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert list(all_texts({"text": "t"})) == ["t"]
    assert list(all_texts(chat)) == ["q", "a"]
    assert list(all_texts({"prompt": "p", "chosen": "c", "rejected": "r"})) == ["p", "c", "r"]
    assert list(all_texts({"nonsense": 1})) == []


def test_sources_come_side_by_side_by_weight(tmp_path: Path) -> None:
    sources = [
        Source(write(tmp_path / "a.jsonl", "a", 300), 3.0),
        Source(write(tmp_path / "b.jsonl", "b", 300)),
    ]
    texts = list(mixed_texts(sources))
    assert sorted(texts) == sorted([f"{w} {i:03d}" for w in "ab" for i in range(300)])
    head = [t[0] for t in itertools.islice(texts, 100)]
    assert 70 <= head.count("a") <= 80


def test_files_of_a_folder_come_side_by_side_by_size(tmp_path: Path) -> None:
    for n in range(70):  # more than are read side by side
        write(tmp_path / f"{n:02d}.jsonl", "x", 5)
    write(tmp_path / "large.jsonl", "y", 350)
    (tmp_path / "empty.jsonl").write_text("")
    texts = list(mixed_texts([Source(str(tmp_path))]))
    assert len(texts) == 700
    assert 0.4 < sum(t[0] == "y" for t in texts[:200]) / 200 < 0.6


def test_a_capped_text_is_said_to_be_capped(tmp_path: Path) -> None:
    source = Source(write(tmp_path / "a.jsonl", "word", 2000))
    _, report = train_tokenizer(mixed_texts([source]), 300, max_bytes=4000)
    assert report.capped
    assert any("4" in note for note in report.notes())
    _, whole = train_tokenizer(mixed_texts([source]), 300, max_bytes=1_000_000)
    assert not whole.capped
