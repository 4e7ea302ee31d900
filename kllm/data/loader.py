"""From token shards to the micro-batches of each optimiser step.

The rows of step s are the same whatever the number of processes: rank r takes rows r, r + world, ...
of the step's window. Everything follows from (seed, epoch) and a small cursor, so a run resumes at any
step with the same batches. Epochs roll over inside a step, each with its own shuffle.

Sources whose weights are all 1 are joined into one set of documents, each seen once per epoch. Other
weights are the sources' shares of the tokens, kept from row to row: the next row comes from the source
that lags most behind its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kllm.data.batch import IGNORE, Batch
from kllm.data.pack import Ints, RowPlan, plan_best_fit, plan_contiguous, plan_single, spans
from kllm.data.shards import Shard
from kllm.errors import KllmError, UserError

STATE_VERSION = 1


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
        # The shard of document d is the number of bounds at or below d.
        self._bounds = np.cumsum([len(some) for some in chosen])[:-1]
        packer = plan_contiguous if layout.kind == "text" else plan_best_fit
        planner = packer if layout.packing else plan_single
        self.plan: RowPlan = planner(self._lengths, layout.seq_len, layout.seed, epoch)
        self.row_tokens = self.plan.row_tokens

    def __len__(self) -> int:
        return len(self.plan)

    def pieces(self, rows: Ints) -> _Pieces:
        chosen = self.plan.select(rows)
        return _Pieces(
            shards=np.searchsorted(self._bounds, chosen.docs, side="right"),
            begins=self._begins[chosen.docs] + chosen.starts,
            lengths=chosen.lengths,
            open=chosen.starts + chosen.lengths < self._lengths[chosen.docs],
        )


@dataclass
class _Pieces:
    """Runs of tokens: in which shard, from where, how many, and whether the document goes on after."""

    shards: Ints
    begins: Ints
    lengths: Ints
    open: NDArray[np.bool_]


class _Stream:
    """The endless rows of one or more joined shards, and the cursor in them."""

    def __init__(self, shards: Sequence[Shard], layout: Layout) -> None:
        self.shards = list(shards)
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

    Raises:
        UserError: no rows, or fewer rows in a step than processes.
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
    ) -> None:
        if rows_per_step < world:
            reason = f"a step has {rows_per_step} rows of {seq_len} tokens for {world} processes"
            raise UserError(reason, hint="raise train.batch_tokens or lower dataset.seq_len")
        weights = list(weights) if weights is not None else [1.0] * len(shards)
        if len(weights) != len(shards) or not shards:
            raise UserError(f"{len(shards)} data sources with {len(weights)} weights")
        layout = Layout(kind or shards[0].kind, seq_len, packing, seed)
        joined = all(weight == 1.0 for weight in weights)
        groups = [list(shards)] if joined else [[shard] for shard in shards]
        self._streams = [_Stream(group, layout) for group in groups]
        self._shares = np.array([1.0] if joined else weights)
        self._seq_len = seq_len
        self._rows_per_step, self._micro_rows = rows_per_step, max(1, micro_rows)
        self._rank, self._world = rank, world
        self._token_weights = token_weights
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

    def _next(self) -> tuple[_Stream, _Epoch, int]:
        if len(self._streams) == 1:
            stream = self._streams[0]
        else:
            progress = [s.tokens / share for s, share in zip(self._streams, self._shares, strict=True)]
            stream = self._streams[progress.index(min(progress))]
        return (stream, *stream.next_row())

    def _batch(self, window: list[tuple[_Stream, _Epoch, int]]) -> Batch:
        """One micro-batch: runs of rows of one stream and epoch are looked up together."""
        parts: list[_Pieces] = []
        names: list[str] = []
        shards: list[Shard] = []
        base: dict[int, int] = {}
        at = 0
        while at < len(window):
            stream, epoch, _ = window[at]
            end = at
            while end < len(window) and window[end][1] is epoch:
                end += 1
            rows = np.array([row for _, _, row in window[at:end]], dtype=np.int64)
            pieces = epoch.pieces(rows)
            if id(stream) not in base:
                base[id(stream)] = len(shards)
                shards += stream.shards
            pieces.shards = pieces.shards + base[id(stream)]
            parts.append(pieces)
            names += [f"{stream.name} epoch {epoch.epoch} row {row}" for row in rows.tolist()]
            at = end
        return _assemble(shards, parts, names, self._token_weights)


def val_batches(
    shard: Shard, seq_len: int, max_tokens: int, micro_rows: int, *, packing: bool = True
) -> list[Batch]:
    """The first `max_tokens` tokens or so of the validation rows, the same ones every time; [] if empty."""
    if not shard.docs:
        return []
    epoch = _Epoch([shard], Layout(shard.kind, seq_len, packing), 0)
    enough = int(np.searchsorted(np.cumsum(epoch.row_tokens), max_tokens)) + 1
    batches = []
    for first in range(0, min(enough, len(epoch)), micro_rows):
        rows = np.arange(first, min(first + micro_rows, enough, len(epoch)))
        names = [f"validation row {row}" for row in rows.tolist()]
        batches.append(_assemble([shard], [epoch.pieces(rows)], names, None))
    return batches


def _assemble(
    shards: list[Shard], parts: list[_Pieces], names: list[str], token_weights: np.ndarray | None
) -> Batch:
    """Pieces to a batch, in whole-array operations: their number matters little."""
    where = np.concatenate([part.shards for part in parts])
    begins = np.concatenate([part.begins for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    still_open = np.concatenate([part.open for part in parts])
    ends = np.cumsum(lengths)
    index = spans(begins, lengths)
    owner = np.repeat(where, lengths) if len(shards) > 1 else None
    tokens, trained = _gather(shards, index, owner)
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    goes_on = np.flatnonzero(still_open)
    next_owner = None if owner is None else where[goes_on]
    follows, follows_trained = _gather(shards, (begins + lengths)[goes_on], next_owner)
    labels[ends - 1] = IGNORE
    labels[ends[goes_on] - 1] = follows
    if trained is not None and follows_trained is not None:
        keep = np.empty_like(trained)
        keep[:-1] = trained[1:]
        keep[ends[goes_on] - 1] = follows_trained
        labels[keep == 0] = IGNORE
    weights = None
    if token_weights is not None:
        weights = torch.from_numpy(token_weights[np.maximum(labels, 0)].astype(np.float32))
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        weights=weights,
        rows=names,
    )


def _gather(shards: list[Shard], index: Ints, owner: Ints | None) -> tuple[Ints, NDArray[np.uint8] | None]:
    """(tokens, mask or None) at `index` of the shard `owner` (of the only shard if None)."""
    if owner is None:
        mask = shards[0].mask
        return shards[0].tokens[index].astype(np.int64), None if mask is None else mask[index]
    tokens = np.empty(len(index), dtype=np.int64)
    masked = any(shard.mask is not None for shard in shards)
    trained = np.ones(len(index), dtype=np.uint8) if masked else None
    for number in np.unique(owner).tolist():
        some = np.flatnonzero(owner == number)
        tokens[some] = shards[number].tokens[index[some]]
        mask = shards[number].mask
        if trained is not None and mask is not None:
            trained[some] = mask[index[some]]
    return tokens, trained
