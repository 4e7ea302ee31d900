"""From token shards to the micro-batches of each optimiser step.

The rows of step s are the same whatever the number of processes: rank r takes rows r, r + world, ...
of the step's window. Everything follows from (seed, epoch) and a small cursor, so a run resumes at any
step with the same batches. Epochs roll over inside a step, each with its own shuffle.

Sources whose weights are all 1 are joined into one set of documents, each seen once per epoch. Other
weights are the sources' shares of the tokens, kept from row to row: the next row comes from the source
that lags most behind its share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kllm.data.assemble import Pieces, Window, assemble
from kllm.data.batch import Batch
from kllm.data.pack import Ints, RowPlan, plan_best_fit, plan_contiguous, plan_single
from kllm.data.shards import Shard
from kllm.errors import KllmError, UserError

STATE_VERSION = 1
Extras = Mapping[str, NDArray[Any]]  # annotations of one shard, by name


@dataclass(frozen=True)
class Layout:
    """How documents become rows: at most `seq_len` tokens each, packed or one document to a row."""

    kind: str
    seq_len: int
    packing: bool = True
    seed: int = 0


class _Epoch:
    """One pass over the documents of some shards: which tokens stand in which row."""

    def __init__(self, shards: Sequence[Shard], layout: Layout, epoch: int) -> None:
        self.epoch = epoch
        chosen = [shard.select(layout.seed, epoch) for shard in shards]
        lengths = [shard.lengths(some) for shard, some in zip(shards, chosen, strict=True)]
        self._begins = np.concatenate([s.offsets[some] for s, some in zip(shards, chosen, strict=True)])
        self._lengths = np.concatenate(lengths)
        self._renderings = np.concatenate(chosen)
        # The shard of document d is the number of bounds at or below d.
        self._bounds = np.cumsum([len(some) for some in chosen])[:-1]
        packer = plan_contiguous if layout.kind == "text" else plan_best_fit
        planner = packer if layout.packing else plan_single
        self.plan: RowPlan = planner(self._lengths, layout.seq_len, layout.seed, epoch)
        self.row_tokens = self.plan.row_tokens

    def __len__(self) -> int:
        return len(self.plan)

    def pieces(self, rows: Ints) -> Pieces:
        chosen = self.plan.select(rows)
        return Pieces(
            shards=np.searchsorted(self._bounds, chosen.docs, side="right"),
            begins=self._begins[chosen.docs] + chosen.starts,
            lengths=chosen.lengths,
            open=chosen.starts + chosen.lengths < self._lengths[chosen.docs],
            renderings=self._renderings[chosen.docs],
        )

    def check_whole(self) -> None:
        """Refuses documents that are cut into several rows."""
        if (self.plan.starts > 0).any():
            longest, room = int(self._lengths.max()), self.plan.seq_len
            reason = f"a document of {longest} tokens is longer than the {room} of a row and must stay whole"
            raise UserError(reason, hint="raise dataset.seq_len")


class _Stream:
    """The endless rows of one or more joined shards, and the cursor in them."""

    def __init__(self, shards: Sequence[Shard], layout: Layout, extras: Sequence[Extras]) -> None:
        self.shards, self.extras = list(shards), list(extras)
        self._layout = layout
        self.name = " + ".join(str(shard.meta.get("source", "data")) for shard in shards[:3])
        self.row = self.tokens = 0
        self.epoch = _Epoch(self.shards, layout, 0)
        self.rows_per_epoch, self.tokens_per_epoch = len(self.epoch), self.epoch.plan.tokens
        if not self.rows_per_epoch:
            raise UserError("there is nothing to train on", self.name)

    def seek(self, epoch: int, row: int, tokens: int) -> None:
        if epoch != self.epoch.epoch:
            self.epoch = _Epoch(self.shards, self._layout, epoch)
        self.row, self.tokens = row, tokens

    def next_row(self) -> tuple[_Epoch, int]:
        if self.row >= len(self.epoch):
            self.seek(self.epoch.epoch + 1, 0, self.tokens)
        row, self.row = self.row, self.row + 1
        self.tokens += int(self.epoch.row_tokens[row])
        return self.epoch, row

    def state(self) -> list[int]:
        return [self.epoch.epoch, self.row, self.tokens]


class PackedSource:
    """Micro-batches of packed rows from shards; the `Source` that language modelling trains on.

    Args:
        shards: one per source, of one kind.
        weights: one per shard; all 1 joins them, else shares of tokens.
        seq_len: most tokens in a row.
        rows_per_step: rows of one optimiser step, over all processes.
        micro_rows: rows of one micro-batch.
        rank, world: this process and how many there are.
        packing: False puts one document in a row (still without padding).
        kind: "text" rows are full and documents go on from row to row; "chat" documents stay whole.
        token_weights: loss weight of each label id [vocabulary], or None.
        extras: one per shard, arrays [stored tokens, ...] by name (see annotate.py), for `Batch.extras`.

    Raises:
        UserError: no rows, fewer rows in a step than processes, or extras for documents that are cut.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        weights: Sequence[float] | None = None,
        *,
        seq_len: int,
        rows_per_step: int,
        micro_rows: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        packing: bool = True,
        kind: str | None = None,
        token_weights: np.ndarray | None = None,
        extras: Sequence[Extras] | None = None,
    ) -> None:
        if rows_per_step < world:
            reason = f"a step has {rows_per_step} rows of {seq_len} tokens for {world} processes"
            raise UserError(reason, hint="raise train.batch_tokens or lower dataset.seq_len")
        weights = list(weights) if weights is not None else [1.0] * len(shards)
        if len(weights) != len(shards) or not shards:
            raise UserError(f"{len(shards)} data sources with {len(weights)} weights")
        layout = Layout(kind or shards[0].kind, seq_len, packing, seed)
        joined = all(weight == 1.0 for weight in weights)
        every = range(len(shards))
        groups = [list(every)] if joined else [[number] for number in every]
        notes = _fitting(shards, extras)
        self._streams = [
            _Stream([shards[n] for n in group], layout, [notes[n] for n in group]) for group in groups
        ]
        if any(notes):
            self._check_whole()
        self._shares = np.array([1.0] if joined else weights)
        self._seq_len = seq_len
        self._rows_per_step, self._micro_rows = rows_per_step, max(1, micro_rows)
        self._rank, self._world = rank, world
        self._kind, self._token_weights = layout.kind, token_weights
        hashes = [shard.meta.get("hash", len(shard.tokens)) for shard in shards]
        self._identity = [hashes, weights, layout.kind, seq_len, packing, seed]

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over all documents (of a weighted mixture: rows of all sources together)."""
        return sum(stream.rows_per_epoch for stream in self._streams)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of one pass over all documents."""
        return sum(stream.tokens_per_epoch for stream in self._streams)

    @property
    def efficiency(self) -> float:
        """Share of the rows' capacity that holds tokens, in the first epoch."""
        return self.tokens_per_epoch / (self.rows_per_epoch * self._seq_len)

    def take(self, n: int = 1, policy: Any = None) -> list[Batch]:
        """This process's micro-batches of the next optimiser step; `take(0)` is empty and moves nothing."""
        if n == 0:
            return []
        window = [self._next() for _ in range(self._rows_per_step)][self._rank :: self._world]
        step = self._micro_rows
        return [self._batch(window[at : at + step]) for at in range(0, len(window), step)]

    def state_dict(self) -> dict[str, Any]:
        """The cursor as JSON: [epoch, row, tokens so far] of each stream, and what it is a cursor of."""
        cursors = [stream.state() for stream in self._streams]
        return {"version": STATE_VERSION, "cursors": cursors, "data": list(self._identity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes where `state_dict` was taken; the next `take` gives what it would have given there.

        Raises:
            KllmError: the cursor belongs to other data, packing or seed.
        """
        if state.get("version") != STATE_VERSION or state.get("data") != self._identity:
            reason = "the checkpoint's place in the data belongs to other data, seed, seq_len or weights"
            raise KllmError(reason, hint="resume with the same data, or start afresh with --fresh")
        for stream, cursor in zip(self._streams, state["cursors"], strict=True):
            stream.seek(*cursor)

    def _check_whole(self) -> None:
        for stream in self._streams:
            stream.epoch.check_whole()

    def _next(self) -> tuple[_Stream, _Epoch, int]:
        if len(self._streams) == 1:
            stream = self._streams[0]
        else:
            progress = [s.tokens / share for s, share in zip(self._streams, self._shares, strict=True)]
            stream = self._streams[progress.index(min(progress))]
        return (stream, *stream.next_row())

    def _batch(self, rows: list[tuple[_Stream, _Epoch, int]]) -> Batch:
        """One micro-batch: runs of rows of one stream and epoch are looked up together."""
        window = Window()
        base: dict[int, int] = {}
        at = 0
        while at < len(rows):
            stream, epoch, _ = rows[at]
            end = at
            while end < len(rows) and rows[end][1] is epoch:
                end += 1
            numbers = np.array([row for _, _, row in rows[at:end]], dtype=np.int64)
            pieces = epoch.pieces(numbers)
            if id(stream) not in base:
                base[id(stream)] = len(window.shards)
                window.shards += stream.shards
                window.extras += stream.extras
            pieces.shards = pieces.shards + base[id(stream)]
            window.parts.append(pieces)
            window.names += [f"{stream.name} epoch {epoch.epoch} row {row}" for row in numbers.tolist()]
            at = end
        return assemble(window, self._kind, self._token_weights)


def _fitting(shards: Sequence[Shard], extras: Sequence[Extras] | None) -> list[Extras]:
    """The annotations of each shard; all have the same names and a row for each stored token."""
    if extras is None:
        return [{} for _ in shards]
    for shard, notes in zip(shards, extras, strict=True):
        if notes.keys() != extras[0].keys() or any(len(note) != len(shard.tokens) for note in notes.values()):
            raise ValueError(f"extras {sorted(notes)} do not fit {shard.meta.get('source', 'the shard')}")
    return list(extras)


def row_capacity(kind: str, seq_len: int) -> int:
    """Tokens that a row holds: any pair whose sides have at most `seq_len` fits into two of them."""
    return 2 * seq_len if kind == "preference" else seq_len


def val_batches(
    shard: Shard,
    seq_len: int,
    max_tokens: int,
    micro_rows: int,
    *,
    packing: bool = True,
    extras: Extras | None = None,
) -> list[Batch]:
    """The first `max_tokens` tokens or so of the validation rows, the same ones every time; [] if empty.

    Args:
        seq_len: as the training source's; rows of pairs hold twice as much.
        extras: annotations of this shard.
    """
    if not shard.docs:
        return []
    layout = Layout(shard.kind, row_capacity(shard.kind, seq_len), packing)
    epoch = _Epoch([shard], layout, 0)
    if extras or shard.kind in ("preference", "rated"):
        epoch.check_whole()
    enough = int(np.searchsorted(np.cumsum(epoch.row_tokens), max_tokens)) + 1
    batches = []
    for first in range(0, min(enough, len(epoch)), micro_rows):
        rows = np.arange(first, min(first + micro_rows, enough, len(epoch)))
        names = [f"validation row {row}" for row in rows.tolist()]
        window = Window([shard], _fitting([shard], [extras or {}]), [epoch.pieces(rows)], names)
        batches.append(assemble(window, shard.kind, None))
    return batches
