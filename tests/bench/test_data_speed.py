"""Data speed, in CPU seconds and side by side: against a loop that treats one sample at a time."""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from data_tools import Source, text_shard

from kllm.data.loader import PackedSource
from kllm.data.shards import prepare
from kllm.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.bench


def cpu_seconds(work: Callable[[], object], rounds: int = 2) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def one_by_one(tokenizer: object, file: Path, kind: str, seq_len: int) -> None:
    """Tokenise, pad to `seq_len` and mask each sample on its own, as data sets do that work on the fly."""
    import torch

    head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids  # type: ignore[operator]
    tail = tokenizer("<|im_end|>\n", add_special_tokens=False).input_ids  # type: ignore[operator]
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if kind == "text":
                text = row["text"]
            else:
                text = tokenizer.apply_chat_template(row["conversations"], tokenize=False)  # type: ignore[attr-defined]
            ids = tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[operator]
            for first in range(0, len(ids) if kind == "text" else 1, seq_len):
                part = ids[first : first + seq_len]
                part = part + [0] * (seq_len - len(part))
                labels = [-100] * seq_len if kind == "chat" else list(part)
                at = 0
                while kind == "chat" and at < seq_len:
                    if part[at : at + len(head)] != head:
                        at += 1
                        continue
                    at = end = at + len(head)
                    while end < seq_len and part[end : end + len(tail)] != tail:
                        end += 1
                    labels[at : end + len(tail)] = part[at : end + len(tail)]
                    at = end
                torch.tensor(part), torch.tensor(labels)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("text", "pretrain/zh_luxun"), ("text", "pretrain/en_docs"), ("text", "pretrain/zh_poetry"), ("chat", "sft/en"),
     ("chat", "sft/zh")],
)  # fmt: skip
def test_tokenise_and_pack_is_faster_than_sample_by_sample(
    kind: str, name: str, tmp_path: Path, data_kit: Path, record_property: Callable[[str, object], None]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder, file = data_kit / "tokenizers" / "minimind", data_kit / f"{name}.jsonl.gz"
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    caches = iter(range(99))

    def packed() -> None:
        prepared = prepare(
            [Source(str(file))], ours, kind=kind, cache_dir=tmp_path / str(next(caches)), seq_len=1024,
            max_bad_rows=10_000,
        )  # fmt: skip
        source = PackedSource(prepared.train, seq_len=1024, rows_per_step=8, micro_rows=8)
        for _ in range(source.rows_per_epoch // 8):
            source.take()

    slow, fast = cpu_seconds(lambda: one_by_one(theirs, file, kind, 1024)), cpu_seconds(packed)
    record_property("ratio", slow / fast)
    sys.stderr.write(f"{name}: {slow:.2f} / {fast:.2f} CPU s = {slow / fast:.2f}x\n")
    assert slow / fast >= 1.5


@pytest.mark.parametrize("length", [10, 500, 100_000])
def test_a_step_is_assembled_in_about_a_millisecond(length: int) -> None:
    source = PackedSource(
        [text_shard([length] * (400_000 // length))], seq_len=512, rows_per_step=8, micro_rows=8
    )
    taken = cpu_seconds(lambda: [source.take() for _ in range(50)], rounds=5) / 50
    sys.stderr.write(f"{length}-token documents: {taken * 1e3:.2f} ms for 8 x 512 tokens\n")
    assert taken < 2e-3
