"""Annotations: computed once for each stored token, and back in the batches beside its label."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import Source, byte_tokenizer, chat_shard, text_shard, write_jsonl
from torch import Tensor

from kllm.data.annotate import annotate
from kllm.data.batch import IGNORE, Batch
from kllm.data.loader import PackedSource, val_batches
from kllm.data.pairsource import PairSource
from kllm.data.shards import Prepared, prepare
from kllm.errors import KllmError, UserError
from kllm.tokenizer.tokenizer import Tokenizer

FIELDS = {"reference": (np.float32, 0), "teacher_ids": (np.int32, 3), "teacher_logprobs": (np.float16, 3)}
SIZE = {"micro_tokens": 400, "seq_len": 128}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def model(batch: Batch) -> dict[str, Tensor]:
    """Numbers that depend on all tokens that come before in the document, and on the label."""
    bounds = batch.cu_seqlens.tolist()
    parents = [-1] * (len(bounds) - 1) if batch.parents is None else batch.parents.tolist()
    seen = torch.zeros(len(batch.tokens))
    for (first, last), parent in zip(pairwise(bounds), parents, strict=True):
        above = batch.tokens[bounds[parent] : bounds[parent + 1]] if parent >= 0 else batch.tokens[:0]
        context = torch.cat([above, batch.tokens[first:last]]).float()
        seen[first:last] = (context * (1 + torch.arange(len(context)) % 7)).cumsum(0)[len(above) :]
    reference = torch.where(batch.labels == IGNORE, 0.0, -(seen + batch.labels) / 64)
    best = batch.tokens[:, None] + torch.arange(3)
    return {"reference": reference, "teacher_ids": best, "teacher_logprobs": -(best % 50).bfloat16() / 8}


def data(tmp_path: Path, tokenizer: Tokenizer, kind: Any, name: str = "a", **more: Any) -> Prepared:
    rows: list[Any] = [
        {"prompt": f"{name} question {n}", "chosen": "yes " * (1 + n % 5), "rejected": "no " * (1 + n % 3)}
        for n in range(40)
    ]
    if kind == "chat":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    file = write_jsonl(tmp_path / f"{name}-{kind}.jsonl", rows)
    options = {"seq_len": 128, "val_fraction": 0.2, "cache_dir": tmp_path / "cache", **more}
    return prepare([Source(str(file))], tokenizer, kind=kind, **options)


@pytest.mark.parametrize("kind", ["chat", "preference", "rated"])
@pytest.mark.parametrize("drawn", [False, True])
def test_batches_carry_what_the_model_says_there(
    tmp_path: Path, tokenizer: Tokenizer, kind: Any, drawn: bool
) -> None:
    more = {"system_prompt_ratio": 0.5} if drawn else {}
    made = [data(tmp_path, tokenizer, kind, name, **more) for name in ("a", "b")]
    shards = [shard for prepared in made for shard in prepared.train]
    extras = [annotate(shard, "model-1", FIELDS, model, **SIZE) for shard in shards]
    assert all(isinstance(array, np.memmap) for found in extras for array in found.values())
    cls = PackedSource if kind == "chat" else PairSource
    for options in ({"rank": 1, "world": 2}, {"weights": [1.0, 3.0]}, {"packing": False}):
        source = cls(shards, seq_len=128, rows_per_step=6, micro_rows=2, extras=extras, **options)
        for batch in [batch for _ in range(6) for batch in source.take()]:
            expected = model(batch)
            assert set(batch.extras) == set(FIELDS)
            for name, (dtype, _) in FIELDS.items():
                values = batch.extras[name]
                assert values.numpy().dtype == dtype
                assert torch.equal(values, expected[name].float().to(values.dtype))
    val = made[0].val
    notes = annotate(val, "model-1", FIELDS, model, **SIZE)
    for batch in val_batches(val, 128, 10**9, 2, extras=notes):
        assert torch.equal(batch.extras["reference"], model(batch)["reference"])


def test_each_token_is_computed_once_in_small_batches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (shard,) = data(tmp_path, tokenizer, "preference", keep_empty_think=0.5).train
    sizes: list[int] = []
    news: list[tuple[int, int]] = []

    def counted(batch: Batch) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        sizes.append(len(batch.tokens))
        return model(batch)

    annotate(shard, "k", FIELDS, counted, micro_tokens=300, seq_len=128, progress=lambda *x: news.append(x))
    assert sum(sizes) == len(shard.tokens) == news[-1][0] == news[-1][1]
    assert max(sizes) <= 300 and len(sizes) < 2 * len(shard.tokens) / 300 + 1
    assert news == sorted(news)


def test_annotations_are_found_again_by_their_key(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = data(tmp_path, tokenizer, "preference")
    (shard,) = prepared.train
    first = annotate(shard, "model-1", FIELDS, model, **SIZE)

    def never(batch: Batch) -> dict[str, Tensor]:
        pytest.fail("computed again")

    (again,) = data(tmp_path, tokenizer, "preference").train
    found = annotate(again, "model-1", FIELDS, never, **SIZE)
    assert all(np.array_equal(first[name], found[name]) for name in FIELDS)
    calls = []

    def other(batch: Batch) -> dict[str, Tensor]:
        calls.append(batch)
        return {name: values + 1 for name, values in model(batch).items()}

    changed = annotate(shard, "model-2", FIELDS, other, **SIZE)
    assert calls and not np.array_equal(changed["reference"], first["reference"])
    calls.clear()
    wider = {"reference": (np.float64, 0)}
    assert annotate(shard, "model-1", wider, other, **SIZE)["reference"].dtype == np.float64 and calls
    val = replace(shard, split="val")  # as many tokens
    joined = replace(shard, meta={**shard.meta, "hash": "joined"})
    for apart in (prepared.val, val, joined):
        calls.clear()
        annotate(apart, "model-1", FIELDS, other, **SIZE)
        assert calls, "each has its own"


def test_a_killed_computation_starts_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (shard,) = data(tmp_path, tokenizer, "chat").train
    assert shard.folder is not None
    before = sorted(shard.folder.iterdir())
    calls = []

    def broken(batch: Batch) -> dict[str, Tensor]:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(batch)

    with pytest.raises(KeyboardInterrupt):
        annotate(shard, "k", FIELDS, broken, **SIZE)
    assert sorted(shard.folder.iterdir()) == before
    made = annotate(shard, "k", FIELDS, model, **SIZE)
    (folder,) = set(shard.folder.iterdir()) - set(before)
    (folder / "reference.bin").write_bytes(b"half")  # not whole: not used
    torn = shard.folder / f".{folder.name}.tmp-{2**22 + os.getpid()}"  # a killed process's
    torn.mkdir()
    again = annotate(shard, "k", FIELDS, model, **SIZE)
    assert np.array_equal(made["teacher_ids"], again["teacher_ids"]) and not torn.exists()
    assert again["reference"].shape == shard.tokens.shape


def test_a_full_disk_is_one_line(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard,) = data(tmp_path, tokenizer, "chat").train
    assert shard.folder is not None
    before = sorted(shard.folder.iterdir())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kllm.data.annotate.write_json", full)
    with pytest.raises(KllmError, match="no space left on the device"):
        annotate(shard, "k", FIELDS, model, **SIZE)
    assert sorted(shard.folder.iterdir()) == before


def test_joined_validation_shards_keep_theirs_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a", "b"):
        data(tmp_path, tokenizer, "preference", name)
    sources = [Source(str(tmp_path / f"{name}-preference.jsonl")) for name in ("a", "b")]
    options = {"kind": "preference", "seq_len": 128, "val_fraction": 0.2, "cache_dir": tmp_path / "cache"}
    prepared = prepare(sources, tokenizer, **options)
    first = annotate(prepared.val, "k", FIELDS, model, **SIZE)
    assert isinstance(first["reference"], np.memmap)
    for batch in val_batches(prepared.val, 128, 10**9, 2, extras=first):
        assert torch.equal(batch.extras["reference"], model(batch)["reference"])
    swapped = prepare(sources[::-1], tokenizer, **options)
    other = annotate(swapped.val, "k", FIELDS, model, **SIZE)
    assert not np.array_equal(first["reference"], other["reference"])


def test_shards_in_memory(tokenizer: Tokenizer) -> None:
    shard = chat_shard([9, 5, 7], [2, 1, 3])
    found = annotate(shard, "k", FIELDS, model, micro_tokens=1, seq_len=9)
    assert [array.shape for array in found.values()] == [(21,), (21, 3), (21, 3)]
    source = PackedSource([shard], seq_len=14, rows_per_step=2, micro_rows=2, extras=[found])
    (batch,) = source.take()
    assert torch.equal(batch.extras["reference"], model(batch)["reference"])
    empty = chat_shard([], [])
    assert annotate(empty, "k", FIELDS, model, **SIZE)["teacher_ids"].shape == (0, 3)


def test_what_cannot_be_annotated() -> None:
    with pytest.raises(UserError, match="rows of plain text depend on the packing"):
        annotate(text_shard([20]), "k", FIELDS, model, **SIZE)
    shard = chat_shard([20, 5], [2, 2])
    with pytest.raises(UserError, match="a document of 20 tokens is longer than seq_len 16"):
        annotate(shard, "k", FIELDS, model, micro_tokens=8, seq_len=16)
    notes = [{"reference": np.zeros(25, np.float32)}]
    with pytest.raises(UserError, match="longer than the 16 of a row and must stay whole"):
        PackedSource([shard], seq_len=16, rows_per_step=1, micro_rows=1, extras=notes)
    with pytest.raises(ValueError, match="do not fit"):
        PackedSource([shard], seq_len=20, rows_per_step=1, micro_rows=1, extras=[{"reference": np.zeros(24)}])
    with pytest.raises(ValueError, match="do not fit"):
        options = {"seq_len": 20, "rows_per_step": 1, "micro_rows": 1}
        PackedSource([shard, chat_shard([3], [1])], extras=[*notes, {}], **options)


def test_a_broken_model_is_not_stored() -> None:
    shard = chat_shard([20, 5], [2, 2])
    fields = {"reference": (np.float32, 0)}

    def broken(batch: Batch) -> dict[str, Tensor]:
        return {"reference": torch.full((len(batch.tokens),), float("nan"))}

    with pytest.raises(KllmError, match="the model gives NaN as reference"):
        annotate(shard, "k", fields, broken, **SIZE)
    with pytest.raises(ValueError, match=r"reference has the shape \(2,\), not \(25,\)"):
        annotate(shard, "k", fields, lambda _: {"reference": torch.zeros(2)}, **SIZE)
