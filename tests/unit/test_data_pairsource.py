"""Batches of pairs: mixtures, resume, ranks, validation, packing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import Source, byte_tokenizer, pair_shard, sides_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.data.batch import Batch
from kllm.data.encode import Document
from kllm.data.loader import row_capacity, val_batches
from kllm.data.pairsource import PairSource
from kllm.data.shards import Shard, prepare
from kllm.errors import UserError
from kllm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


SIZES = st.lists(
    st.tuples(st.integers(0, 30), st.integers(2, 20), st.integers(2, 20)), min_size=4, max_size=25
)


def numbered(sizes: Any, first: int = 0, name: str = "pairs") -> Shard:
    """Pairs of these part lengths whose tokens are all different."""
    documents = []
    for shared, chosen, rejected in sizes:
        ids = np.arange(first, first + shared + chosen + rejected, dtype=np.uint32)
        mask = np.ones(len(ids), np.uint8)
        mask[: shared + 1] = mask[shared + chosen] = 0
        documents.append(Document([(ids, mask)], 0, splits=[(shared, chosen)]))
        first += len(ids)
    return pair_shard(documents, name)


def state(batch: Batch) -> list[Any]:
    assert batch.sequences is not None
    parents = None if batch.parents is None else batch.parents.tolist()
    return [batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist(), parents,
            batch.cu_seqlens.tolist(), batch.sequences.index.tolist(), batch.rows]  # fmt: skip


def pairs_of(batches: list[Batch]) -> Counter[Any]:
    return Counter(
        tuple((tuple(ids), tuple(said)) for ids, said in pair) for b in batches for pair in sides_of(b)
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 3), st.integers(0, 6), st.booleans())
def test_resume_is_exact(sizes: Any, rows: int, steps: int, mixed: bool) -> None:
    shards = [numbered(sizes), numbered(sizes[:3], 5000, "more")]
    weights = [1.0, 2.0] if mixed else None
    made = [PairSource(shards, weights, seq_len=50, rows_per_step=rows, micro_rows=2, seed=7) for _ in "12"]
    for _ in range(steps):
        made[0].take()
    made[1].load_state_dict(made[0].state_dict())
    for _ in range(4):
        first, second = ([state(batch) for batch in source.take()] for source in made)
        assert first == second


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 3), st.booleans())
def test_ranks_share_the_rows_of_one(sizes: Any, world: int, mixed: bool) -> None:
    shards = [numbered(sizes), numbered(sizes[:3], 5000, "more")]
    options: dict[str, Any] = {"weights": [1.0, 2.0] if mixed else None, "seq_len": 50, "rows_per_step": 4}
    alone = PairSource(shards, micro_rows=4, **options)
    ranks = [PairSource(shards, micro_rows=1, rank=rank, world=world, **options) for rank in range(world)]
    for _ in range(5):
        together = [batch for source in ranks for batch in source.take()]
        assert pairs_of(alone.take()) == pairs_of(together)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SIZES, st.booleans())
def test_an_epoch_has_every_pair_once(sizes: Any, packing: bool) -> None:
    shards = [numbered(sizes), numbered(sizes[:3], 5000, "more")]
    source = PairSource(shards, seq_len=50, rows_per_step=1, micro_rows=1, packing=packing)
    batches = [batch for _ in range(source.rows_per_epoch) for batch in source.take()]
    seen = pairs_of(batches)
    assert len(seen) == seen.total() == len(sizes) + 3
    assert source.sequences_per_epoch == 2 * len(seen)
    assert all(len(batch.tokens) <= row_capacity("preference", 50) == 100 for batch in batches)
    held_out = val_batches(shards[0], 50, 10**9, 3)
    assert pairs_of(held_out) == pairs_of(held_out[::-1]) and pairs_of(held_out).total() == len(sizes)


def test_pairs_are_never_cut() -> None:
    shard = numbered([(30, 20, 20)])
    with pytest.raises(UserError, match="a document of 70 tokens is longer than the 60 of a row"):
        PairSource([shard], seq_len=30, rows_per_step=1, micro_rows=1)
    with pytest.raises(UserError, match="must stay whole"):
        val_batches(shard, 30, 100, 1)


def test_weights_follow_the_label_of_every_part() -> None:
    table = np.ones(100)
    table[[12, 14, 17]] = 10
    source = PairSource(
        [numbered([(10, 4, 4)])], seq_len=20, rows_per_step=1, micro_rows=1, token_weights=table
    )
    (batch,) = source.take()
    assert batch.weights is not None
    # 14 is the head of the rejected answer: it is nobody's label
    assert batch.labels[batch.weights == 10].tolist() == [12, 17]


def test_moving_a_batch_keeps_everything() -> None:
    (batch,) = PairSource([numbered([(3, 4, 5)])], seq_len=20, rows_per_step=1, micro_rows=1).take()
    batch.extras["reference"] = torch.arange(12.0)
    there = batch.to("meta")
    assert there.sequences is not None and there.parents is not None
    assert {
        there.tokens.device.type,
        there.sequences.index.device.type,
        there.extras["reference"].device.type,
    } == {"meta"}
    assert there.parents.device.type == there.cu_seqlens.device.type == "cpu"
    assert state(batch.to("cpu")) == state(batch)


def row(number: int, answer: int = 0) -> dict[str, str]:
    return {"prompt": f"question {number}", "chosen": f"yes {answer}", "rejected": f"no {answer}"}


@pytest.mark.parametrize("kind", ["preference", "rated"])
def test_one_prompt_stays_on_one_side_of_the_split(tmp_path: Path, tokenizer: Tokenizer, kind: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [row(n, k) for n in range(60) for k in range(3)])
    prepared = prepare(
        [Source(str(file))], tokenizer, kind=kind, cache_dir=tmp_path, seq_len=128, val_fraction=0.2
    )
    each = 3 if kind == "preference" else 6
    asked = []
    for shard in (*prepared.train, prepared.val):
        texts = [tokenizer.decode(shard.tokens[a : a + 40].tolist()) for a in shard.offsets[:-1].tolist()]
        count = Counter(text.split("\n")[1] for text in texts)
        assert set(count.values()) == {each}
        asked.append(set(count))
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 60 and len(asked[1]) > 3
    assert prepared.stats["val_docs"] == each * len(asked[1])


@pytest.mark.parametrize("kind", ["preference", "rated"])
def test_validation_data_of_several_sources(tmp_path: Path, tokenizer: Tokenizer, kind: Any) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [row(m, n) for m in range(30)]) for n in (1, 2)]
    prepared = prepare(
        [Source(str(f)) for f in files], tokenizer, kind=kind, cache_dir=tmp_path, seq_len=128,
        val_fraction=0.3, keep_empty_think=0.5, system_prompt_ratio=0.5,
    )  # fmt: skip
    batches = val_batches(prepared.val, 128, 10**9, 4)
    said = Counter()
    for batch in batches:
        assert batch.sequences is not None
        for number in range(batch.sequences.count):
            text = tokenizer.decode(batch.labels[batch.sequences.index == number].tolist())
            good = number % 2 == 0 if batch.sequences.good is None else bool(batch.sequences.good[number])
            said[text] += 1
            assert text[:-2] == ("yes" if good else "no")
    assert set(said) == {"yes 1", "no 1", "yes 2", "no 2"}
    assert said.total() == prepared.val.docs * (2 if kind == "preference" else 1)
    assert val_batches(Shard.empty(kind), 128, 100, 4) == []


def test_the_head_of_a_shard_keeps_its_parts() -> None:
    shard = numbered([(n, n + 2, 2 * n + 3) for n in range(9)])
    head = shard._head(60)
    assert 1 < head.docs < 9
    every, some = (pairs_of(val_batches(one, 50, 10**9, 4)) for one in (shard, head))
    assert some < every and some.total() == head.docs
    rated = Shard(shard.tokens, shard.offsets, shard.mask, None, {"kind": "rated"}, None, np.arange(9) < 3)
    (batch,) = val_batches(rated._head(60), 50, 10**9, 99)
    assert batch.sequences is not None and batch.sequences.good is not None
    first = {
        int(batch.tokens[a]) for a, good in zip(batch.cu_seqlens, batch.sequences.good, strict=False) if good
    }
    assert first == set(shard.offsets[:3].tolist())


def test_joined_shards_keep_their_parts() -> None:
    shards = [numbered([(n, n + 2, 2 * n + 3) for n in range(9)]), numbered([(2, 9, 9)] * 3, 5000)]
    one, two, both = (pairs_of(val_batches(s, 50, 10**9, 4)) for s in (*shards, Shard.concat(shards)))
    assert both == one + two
    for shard, good in zip(shards, ([1] * 4 + [0] * 5, [0, 0, 1]), strict=True):
        shard.splits, shard.good, shard.meta["kind"] = None, np.array(good, np.uint8), "rated"
    assert Shard.concat(shards).good.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_real_lengths_pack_tightly() -> None:
    """Lengths as in the data kit's dpo files with a 6,400-word tokenizer."""
    rng = np.random.default_rng(0)
    prompt = np.minimum(rng.lognormal(4.6, 0.8, 1500), 500).astype(int)
    answers = np.minimum(rng.lognormal(4.9, 1.0, (2, 1500)), 500).astype(int) + 2
    shard = numbered(list(zip(prompt.tolist(), *answers.tolist(), strict=True)))
    source = PairSource([shard], seq_len=1024, rows_per_step=8, micro_rows=8)
    apart = int((2 * prompt + answers.sum(0)).sum())
    print(
        f"\n1500 pairs, {source.tokens_per_epoch:,} tokens in {source.rows_per_epoch} rows of 2048: "
        f"{source.efficiency:.2%} full; {1 - source.tokens_per_epoch / apart:.1%} saved by sharing; "
        f"{2 * 1024 * 1500 / source.tokens_per_epoch:.2f} times fewer tokens than padded to 1024"
    )
    assert source.efficiency > 0.97
