"""The data cursor: stopping anywhere and going on gives the same batches, on any number of processes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.data.batch import Batch
from kllm.data.loader import PackedSource
from kllm.data.shards import Shard


def shard(name: str, kind: str, count: int, seed: int, first: int) -> Shard:
    """Documents of tokens that are all different."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 30, count))]).astype(np.int64)
    tokens = np.arange(first, first + offsets[-1]).astype(np.uint32)
    mask = rng.integers(0, 2, len(tokens)).astype(np.uint8) if kind == "chat" else None
    return Shard(tokens, offsets, mask, None, {"kind": kind, "hash": name, "source": name})


def source(kind: str, weights: list[float], **options: Any) -> PackedSource:
    shards = [shard(f"s{n}", kind, 12 + 7 * n, n, 10_000 * n) for n in range(len(weights))]
    settled = {"seq_len": 32, "rows_per_step": 6, "micro_rows": 2, "seed": 3, **options}
    return PackedSource(shards, weights, **settled)


def content(batches: list[Batch]) -> list[tuple[Any, ...]]:
    return [(b.tokens.tolist(), b.labels.tolist(), b.cu_seqlens.tolist(), b.rows) for b in batches]


MIXTURES = [[1.0], [1.0, 1.0], [0.6, 0.3, 0.1]]


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", MIXTURES)
def test_resuming_at_any_step_gives_the_same_batches(kind: str, packing: bool, weights: list[float]) -> None:
    steps = 30
    straight = source(kind, weights, packing=packing)
    states, batches = [], []
    for _ in range(steps):
        states.append(json.dumps(straight.state_dict()))
        batches.append(content(straight.take()))
    epochs = {int(name.split()[-3]) for step in batches for batch in step for name in batch[3]}
    assert len(epochs) >= 3, "the test must cross epochs"
    for step in range(0, steps - 2, 4):
        resumed = source(kind, weights, packing=packing)
        resumed.load_state_dict(json.loads(states[step]))
        assert [content(resumed.take()) for _ in range(3)] == batches[step : step + 3]
    assert len(states[-1]) < 500


@settings(max_examples=25, deadline=None, derandomize=True)
@given(world=st.integers(1, 6), weights=st.sampled_from(MIXTURES), seed=st.integers(0, 5))
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_processes(
    world: int, weights: list[float], seed: int
) -> None:
    alone = source("text", weights, seed=seed)
    ranks = [source("text", weights, seed=seed, rank=rank, world=world) for rank in range(world)]
    for _ in range(8):
        rows = [name for batch in alone.take() for name in batch.rows]
        shared = [[name for batch in rank.take() for name in batch.rows] for rank in ranks]
        assert all(shared), "every process has work"
        assert [rows[rank::world] for rank in range(world)] == shared
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_resuming_on_another_number_of_processes() -> None:
    alone = source("chat", [0.6, 0.3, 0.1])
    for _ in range(7):
        alone.take()
    ranks = [source("chat", [0.6, 0.3, 0.1], rank=rank, world=2, micro_rows=1) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    for _ in range(5):
        whole = sorted(t for batch in alone.take() for t in batch.tokens.tolist())
        parts = sorted(t for rank in ranks for batch in rank.take() for t in batch.tokens.tolist())
        assert whole == parts


@settings(max_examples=25, deadline=None, derandomize=True)
@given(kind=st.sampled_from(["text", "chat"]), packing=st.booleans(), seed=st.integers(0, 99))
def test_each_epoch_shows_every_token_once(kind: str, packing: bool, seed: int) -> None:
    joined = source(kind, [1.0, 1.0], packing=packing, seed=seed, rows_per_step=1)
    everything = sorted(
        t for n in range(2) for t in shard("", kind, 12 + 7 * n, n, 10_000 * n).tokens.tolist()
    )
    seen: dict[str, list[int]] = {}
    while len(seen) < 4:
        for batch in joined.take():
            (name,) = batch.rows
            seen.setdefault(name.split()[-3], []).extend(batch.tokens.tolist())
    assert [sorted(seen[str(epoch)]) for epoch in range(3)] == [everything] * 3
