"""Documents to rows of at most `seq_len` tokens, without padding and without losing a token.

A plan lists the pieces of every row: which document, from which of its tokens, how many. It is a
pure function of the lengths, the seed and the epoch, so that it never has to be stored. Long
documents are cut into pieces that follow one another; nothing is ever dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
WINDOW = 1 << 16


@dataclass(frozen=True)
class RowPlan:
    """The pieces of R rows, all P pieces in row order.

    docs [P] document numbers; starts [P] first token inside the document; lengths [P] tokens;
    rows [R + 1] where the pieces of each row begin.
    """

    docs: Ints
    starts: Ints
    lengths: Ints
    rows: Ints
    seq_len: int

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def row_tokens(self) -> Ints:
        """Tokens in each row [R]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.diff(ends[self.rows])

    @property
    def efficiency(self) -> float:
        """Share of the rows' capacity that holds tokens."""
        return self.tokens / (len(self) * self.seq_len) if len(self) else 1.0

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of every piece of a row."""
        inside = slice(self.rows[row], self.rows[row + 1])
        columns = (self.docs[inside], self.starts[inside], self.lengths[inside])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def select(self, rows: Ints) -> RowPlan:
        """The plan of these rows only, in this order."""
        counts = (self.rows[1:] - self.rows[:-1])[rows]
        take = spans(self.rows[rows], counts)
        bounds = np.concatenate([[0], np.cumsum(counts)])
        return RowPlan(self.docs[take], self.starts[take], self.lengths[take], bounds, self.seq_len)


def spans(begins: Ints, counts: Ints) -> Ints:
    """The numbers begins[i] .. begins[i] + counts[i] - 1 for each i, one after another."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(begins - (ends - counts), counts) + np.arange(total, dtype=np.int64)


def generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """Independent streams of random numbers for each (seed, epoch, purpose)."""
    return np.random.default_rng([seed & 0xFFFFFFFF, epoch, purpose])


def plan_contiguous(lengths: Ints, seq_len: int, seed: int, epoch: int) -> RowPlan:
    """Shuffled documents laid end to end and cut every `seq_len` tokens; then the rows are shuffled.

    Every row but the last is full. For text, where a document may go on in another row.
    """
    order = generator(seed, epoch, 0).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    begins = ends - lengths[order]
    total = int(ends[-1]) if len(ends) else 0
    # A piece begins where a document begins or a row begins.
    cuts = np.concatenate([begins[lengths[order] > 0], np.arange(0, total, seq_len)])
    cuts.sort(kind="stable")  # two sorted runs: a merge
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    at = np.searchsorted(ends, cuts, side="right")
    plan = RowPlan(
        docs=order[at],
        starts=cuts - begins[at],
        lengths=np.diff(cuts, append=total),
        rows=np.searchsorted(cuts, np.arange(0, total + seq_len, seq_len)),
        seq_len=seq_len,
    )
    return _shuffled(plan, seed, epoch)


def plan_best_fit(lengths: Ints, seq_len: int, seed: int, epoch: int, window: int = WINDOW) -> RowPlan:
    """Best-fit decreasing: each document goes into the fullest row that still has room.

    Documents keep together as long as they fit a row; longer ones are cut into full rows and a rest.
    Done for `window` shuffled documents at a time, which bounds the work and lets the company of a
    document change with the epoch. O(n log n).
    """
    docs, starts, sizes = _chunks(lengths, seq_len)
    order = generator(seed, epoch, 0).permutation(len(docs))
    placed, bounds = [], []
    for first in range(0, len(order), window):
        some = order[first : first + window]
        bins = _fill(sizes[some], seq_len)
        by_row = np.argsort(bins, kind="stable")
        placed.append(some[by_row])
        bounds.append(first + np.searchsorted(bins[by_row], np.arange(int(bins.max()) + 1)))
    take = np.concatenate(placed) if placed else order
    ends = np.concatenate([*bounds, [len(order)]]).astype(np.int64)
    return _shuffled(RowPlan(docs[take], starts[take], sizes[take], ends, seq_len), seed, epoch)


def plan_single(lengths: Ints, seq_len: int, seed: int, epoch: int) -> RowPlan:
    """One document to a row (`packing: false`); longer ones take as many rows as they need."""
    docs, starts, sizes = _chunks(lengths, seq_len)
    plan = RowPlan(docs, starts, sizes, np.arange(len(docs) + 1), seq_len)
    return _shuffled(plan, seed, epoch)


def _chunks(lengths: Ints, seq_len: int) -> tuple[Ints, Ints, Ints]:
    """(document, start, length) of pieces of at most `seq_len` tokens; empty documents have none."""
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // seq_len)
    docs = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    starts = spans(np.zeros_like(counts), counts) * seq_len
    return docs, starts, np.minimum(seq_len, lengths[docs] - starts)


def _shuffled(plan: RowPlan, seed: int, epoch: int) -> RowPlan:
    return plan.select(generator(seed, epoch, 1).permutation(len(plan)))


def _fill(sizes: Ints, capacity: int) -> Ints:
    """The row of every piece by best-fit decreasing, all pieces of one size at a time.

    Equal pieces are placed together: rows with the least sufficient room take as many as fit, then new
    rows are opened. This gives the rows of the one-by-one algorithm in time that depends on the number
    of different sizes rather than of pieces.
    """
    order = np.argsort(-sizes, kind="stable")
    distinct, firsts = np.unique(-sizes[order], return_index=True)
    bins = np.empty(len(sizes), dtype=np.int64)
    room = _Room()
    opened = 0
    for size, first, last in zip(-distinct, firsts, [*firsts[1:], len(sizes)], strict=True):
        waiting = order[first:last]
        for space, open_rows in room.at_least(int(size)):
            each = space // int(size)
            used = open_rows[: -(-len(waiting) // each)]
            waiting = _place(bins, waiting, used, each, space, int(size), room)
            room.put(space, open_rows[len(used) :])
            if not len(waiting):
                break
        if len(waiting):
            each = capacity // int(size)
            fresh = np.arange(opened, opened - (-len(waiting) // each))
            opened += len(fresh)
            _place(bins, waiting, fresh, each, capacity, int(size), room)
    return bins


def _place(bins: Ints, waiting: Ints, rows: Ints, each: int, space: int, size: int, room: _Room) -> Ints:
    """Puts up to `each` pieces into each of `rows`, notes the room left; the pieces still waiting."""
    taken = waiting[: len(rows) * each]
    bins[taken] = np.repeat(rows, each)[: len(taken)]
    full, rest = divmod(len(taken), each)
    room.put(space - each * size, rows[:full])
    if rest:
        room.put(space - rest * size, rows[full : full + 1])
    return waiting[len(taken) :]


class _Room:
    """Open rows by the room they have left."""

    def __init__(self) -> None:
        self._rows: dict[int, list[Ints]] = {}
        self._spaces = 0  # bit s is set if rows with room s are open

    def put(self, space: int, rows: Ints) -> None:
        if space and len(rows):
            self._rows.setdefault(space, []).append(rows)
            self._spaces |= 1 << space

    def at_least(self, size: int) -> Iterator[tuple[int, Ints]]:
        """Takes out the rows with the least room that is enough for `size`, then the next ones."""
        while fitting := self._spaces >> size:
            space = size + (fitting & -fitting).bit_length() - 1
            self._spaces ^= 1 << space
            yield space, np.concatenate(self._rows.pop(space))
