"""Packing: every token once, no row too long, no piece across documents, and nearly full rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.data.pack import RowPlan, plan_best_fit, plan_contiguous, plan_single

PLANNERS = [plan_contiguous, plan_best_fit, plan_single]
Planner = Callable[..., RowPlan]
lengths_of = st.lists(st.integers(0, 70), max_size=60)


@pytest.mark.parametrize("planner", PLANNERS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(lengths=lengths_of, seq_len=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_token_stands_exactly_once(
    planner: Planner, lengths: list[int], seq_len: int, seed: int, epoch: int
) -> None:
    plan = planner(np.array(lengths, dtype=np.int64), seq_len, seed, epoch)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for row in range(len(plan)):
        pieces = plan.pieces(row)
        assert pieces, "no row is empty"
        assert sum(length for _, _, length in pieces) == plan.row_tokens[row] <= seq_len
        for doc, start, length in pieces:
            assert length > 0 and start + length <= lengths[doc]
            seen[doc][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    assert plan.tokens == sum(lengths)


def one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as the textbook has it: the room left in each row."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda row: rooms[row])] -= size
    return sorted(rooms)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), capacity=st.integers(1, 50))
def test_best_fit_equals_the_textbook(data: st.DataObject, capacity: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    plan = plan_best_fit(np.array(sizes), capacity, seed=1, epoch=0)
    assert sorted((capacity - plan.row_tokens).tolist()) == one_by_one(sizes, capacity)


def test_documents_that_fit_are_never_split_by_best_fit() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    plan = plan_best_fit(lengths, 100, seed=0, epoch=0, window=64)
    assert len(plan.docs) == 500
    assert (plan.lengths == lengths[plan.docs]).all()


def test_rows_are_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.8, 20_000).astype(int), 8, 1024)
    assert plan_best_fit(lengths, 1024, 0, 0).efficiency > 0.99
    assert plan_best_fit(lengths, 1024, 0, 0, window=1000).efficiency > 0.97
    contiguous = plan_contiguous(lengths, 1024, 0, 0)
    assert (contiguous.row_tokens == 1024).sum() >= len(contiguous) - 1


@pytest.mark.parametrize("planner", PLANNERS)
def test_plans_depend_on_seed_and_epoch_only(planner: Planner) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 300)

    def key(seed: int, epoch: int) -> tuple[list[int], ...]:
        plan = planner(lengths, 64, seed, epoch)
        return plan.docs.tolist(), plan.starts.tolist(), plan.rows.tolist()

    assert key(1, 0) == key(1, 0)
    assert key(1, 0) != key(1, 1)
    assert key(1, 0) != key(2, 0)


def test_select_keeps_the_pieces_of_rows() -> None:
    plan = plan_contiguous(np.array([5, 30, 2, 2, 61]), 16, 0, 0)
    rows = np.array([3, 0, 3])
    some = plan.select(rows)
    assert [some.pieces(n) for n in range(3)] == [plan.pieces(row) for row in rows]


def test_no_documents_make_no_rows() -> None:
    for planner in PLANNERS:
        for lengths in ([], [0, 0]):
            plan = planner(np.array(lengths, dtype=np.int64), 8, 0, 0)
            assert len(plan) == 0 and plan.tokens == 0
