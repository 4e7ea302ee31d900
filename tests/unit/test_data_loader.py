"""Batches: labels at borders and ends, masks, mixtures, and the order of rows."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from data_tools import chat_shard, text_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.data.batch import IGNORE, Batch
from kllm.data.loader import PackedSource, val_batches
from kllm.data.shards import Shard
from kllm.errors import KllmError, UserError


def one_epoch(source: PackedSource, rows_per_step: int) -> list[Batch]:
    assert source.rows_per_epoch % rows_per_step == 0
    steps = source.rows_per_epoch // rows_per_step
    return [batch for _ in range(steps) for batch in source.take()]


def documents(batch: Batch) -> list[slice]:
    bounds = batch.cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(2, 20), st.booleans())
def test_text_labels_are_the_next_token_across_row_borders(
    lengths: list[int], seq_len: int, packing: bool
) -> None:
    shard = text_shard(lengths)
    source = PackedSource([shard], seq_len=seq_len, rows_per_step=1, micro_rows=1, packing=packing)
    last = {int(end) - 1 for end in shard.offsets[1:]}
    seen: Counter[int] = Counter()
    for batch in one_epoch(source, 1):
        seen.update(batch.tokens.tolist())
        for token, label in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
            # Tokens count upwards, so the next token of a document is the number after.
            assert label == (IGNORE if token in last else token + 1)
        for inside in documents(batch):
            size = inside.stop - inside.start
            assert batch.positions[inside].tolist() == list(range(size))
            first = int(batch.tokens[inside.start])
            assert batch.tokens[inside].tolist() == list(range(first, first + size))
            owner = np.searchsorted(shard.offsets, [first, first + size - 1], side="right")
            assert owner[0] == owner[1], "no piece crosses a document"
    assert seen == Counter(range(sum(lengths)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(2, 16), st.integers(0, 15)), min_size=1, max_size=20), st.booleans())
def test_chat_labels_are_trained_tokens_only(shapes: list[tuple[int, int]], packing: bool) -> None:
    lengths = [length for length, _ in shapes]
    prompts = [min(prompt, length - 1) for length, prompt in shapes]
    shard = chat_shard(lengths, prompts)
    assert shard.mask is not None
    source = PackedSource([shard], seq_len=16, rows_per_step=1, micro_rows=1, packing=packing)
    trained = 0
    for batch in one_epoch(source, 1):
        for inside in documents(batch):
            tokens, labels = batch.tokens[inside].tolist(), batch.labels[inside].tolist()
            for at, label in enumerate(labels):
                wanted = at + 1 < len(tokens) and shard.mask[tokens[at + 1]] == 1
                assert label == (tokens[at + 1] if wanted else IGNORE)
        trained += batch.trained_tokens
    assert trained == sum(length - max(1, prompt) for length, prompt in zip(lengths, prompts, strict=True))


def test_a_long_masked_document_keeps_its_border_label() -> None:
    shard = chat_shard([20], [12])
    source = PackedSource([shard], seq_len=8, rows_per_step=3, micro_rows=3)
    (batch,) = source.take()
    found = {t: n for t, n in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True) if n != IGNORE}
    assert found == {token: token + 1 for token in range(11, 19)}


def test_micro_batches_hold_whole_rows() -> None:
    source = PackedSource([text_shard([100])], seq_len=10, rows_per_step=5, micro_rows=2)
    batches = source.take()
    assert [len(batch.tokens) for batch in batches] == [20, 20, 10]
    assert [len(batch.rows) for batch in batches] == [2, 2, 1]
    assert batches[0].rows[0] == "text epoch 0 row 0"
    assert batches[0].cu_seqlens.dtype == torch.int32
    assert {batches[0].tokens.dtype, batches[0].labels.dtype, batches[0].positions.dtype} == {torch.int64}


def test_unpacked_rows_hold_one_document_without_padding() -> None:
    source = PackedSource([chat_shard([3, 5, 4], [1, 1, 1])], seq_len=8, rows_per_step=3, micro_rows=3,
                          packing=False)  # fmt: skip
    (batch,) = source.take()
    assert len(batch.tokens) == 12 and len(batch.cu_seqlens) == 4


def test_token_weights_follow_the_label() -> None:
    table = np.ones(100)
    table[7] = 10
    source = PackedSource([text_shard([20])], seq_len=20, rows_per_step=1, micro_rows=1, token_weights=table)
    (batch,) = source.take()
    assert batch.weights is not None and batch.weights.dtype == torch.float32
    assert batch.weights[batch.labels == 7].tolist() == [10.0]
    assert batch.weights.sum() == 29


def test_sources_without_weights_are_joined_exactly() -> None:
    shards = [text_shard([30, 11], 0, "a"), text_shard([25] * 7, 1000, "b"), text_shard([3], 5000, "c")]
    source = PackedSource(shards, [1.0, 1.0, 1.0], seq_len=9, rows_per_step=1, micro_rows=1)
    seen = Counter(t for batch in one_epoch(source, 1) for t in batch.tokens.tolist())
    expected = [t for shard in shards for t in shard.tokens.tolist()]
    assert seen == Counter(expected)
    assert source.tokens_per_epoch == len(expected)


def test_weights_are_shares_of_tokens() -> None:
    shards = [chat_shard([9, 8, 7] * 40, [1] * 120, 0, "a"), chat_shard([13] * 50, [1] * 50, 10_000, "b")]
    source = PackedSource(shards, [0.7, 0.3], seq_len=16, rows_per_step=8, micro_rows=8)
    for steps in (10, 200):
        tokens = torch.cat([batch.tokens for _ in range(steps) for batch in source.take()])
        assert float((tokens < 10_000).double().mean()) == pytest.approx(0.7, abs=1 / steps)


def test_sources_of_a_mixture_roll_over_on_their_own() -> None:
    shards = [text_shard([40], 0, "big"), text_shard([10], 1000, "small")]
    source = PackedSource(shards, [1.0, 3.0], seq_len=10, rows_per_step=4, micro_rows=4)
    for _ in range(5):
        source.take()
    (big, small) = source.state_dict()["cursors"]
    assert big[0] == 1 and small[0] == 14


def test_epochs_are_shuffled_anew() -> None:
    source = PackedSource([text_shard([5] * 40)], seq_len=10, rows_per_step=20, micro_rows=20)
    first, second = (source.take()[0].tokens.tolist() for _ in range(2))
    assert sorted(first) == sorted(second) and first != second


def test_a_step_may_hold_rows_of_two_epochs() -> None:
    source = PackedSource([text_shard([30])], seq_len=10, rows_per_step=4, micro_rows=4)
    (batch,) = source.take()
    assert [name.split(" epoch ")[1] for name in batch.rows] == ["0 row 0", "0 row 1", "0 row 2", "1 row 0"]
    assert len(batch.tokens) == 40


def test_take_zero_moves_nothing() -> None:
    source = PackedSource([text_shard([30])], seq_len=10, rows_per_step=1, micro_rows=1)
    before = source.state_dict()
    assert source.take(0) == [] and source.state_dict() == before


def test_wrong_shapes_are_refused() -> None:
    shard = text_shard([30])
    with pytest.raises(UserError, match="for 4 processes"):
        PackedSource([shard], seq_len=10, rows_per_step=2, micro_rows=1, world=4)
    with pytest.raises(UserError, match="nothing to train on"):
        PackedSource([Shard.empty("text")], seq_len=10, rows_per_step=2, micro_rows=1)
    with pytest.raises(UserError, match="1 data sources with 2 weights"):
        PackedSource([shard], [1, 2], seq_len=10, rows_per_step=2, micro_rows=1)


def test_a_cursor_of_other_data_is_refused() -> None:
    options = {"seq_len": 10, "rows_per_step": 1, "micro_rows": 1}
    state = PackedSource([text_shard([30])], **options).state_dict()
    for other in (
        PackedSource([text_shard([31])], **options),
        PackedSource([text_shard([30])], seed=1, **options),
        PackedSource([text_shard([30])], **{**options, "seq_len": 11}),
    ):
        with pytest.raises(KllmError, match="belongs to other data"):
            other.load_state_dict(state)


def test_validation_rows_are_always_the_same() -> None:
    shard = chat_shard([7, 9, 12] * 30, [2] * 90)
    first, second = (val_batches(shard, 16, 200, 4) for _ in range(2))
    assert [b.tokens.tolist() for b in first] == [b.tokens.tolist() for b in second]
    assert 200 <= sum(len(b.tokens) for b in first) <= 216
    everything = val_batches(shard, 16, 10**9, 4)
    assert sorted(t for b in everything for t in b.tokens.tolist()) == list(range(len(shard.tokens)))
    assert val_batches(Shard.empty("chat"), 16, 100, 4) == []
