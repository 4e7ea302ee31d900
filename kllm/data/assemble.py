"""Runs of stored tokens to one batch, in whole-array operations: their number matters little.

A text or conversation is one segment of the flat row. A preference pair is up to three: the beginning
that both sides share, then chosen and rejected, whose parent it is. So the shared prompt is computed
once; see `Batch.parents`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kllm.data.batch import IGNORE, Batch, Sequences
from kllm.data.pack import Ints, spans
from kllm.data.shards import Shard


@dataclass
class Pieces:
    """Runs of tokens: in which shard, from where, how many, whether the document goes on after, and
    which of the shard's renderings it is."""

    shards: Ints
    begins: Ints
    lengths: Ints
    open: NDArray[np.bool_]
    renderings: Ints

    @classmethod
    def joined(cls, parts: Sequence[Pieces]) -> Pieces:
        """All of them, in order."""
        names = ("shards", "begins", "lengths", "open", "renderings")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass
class Window:
    """What becomes one batch: pieces of `shards`, each with its annotations, and the rows' names."""

    shards: list[Shard] = field(default_factory=list)
    extras: list[Mapping[str, NDArray[Any]]] = field(default_factory=list)
    parts: list[Pieces] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def assemble(window: Window, kind: str, token_weights: np.ndarray | None) -> Batch:
    """The batch of a window of rows; with `parents` and `sequences` as the kind of data has them."""
    pieces = Pieces.joined(window.parts)
    if kind == "preference":
        return _pairs(window, pieces, token_weights)
    batch = _flat(window, pieces, token_weights)
    if kind == "rated":
        owner = np.repeat(np.arange(len(pieces.lengths)), pieces.lengths)
        tables = [shard.good for shard in window.shards]
        good = torch.from_numpy(_take(tables, pieces.renderings, _owner(window, pieces.shards)).astype(bool))
        batch.sequences = Sequences(_scored(batch, owner), len(good), good)
    return batch


def _pairs(window: Window, pieces: Pieces, token_weights: np.ndarray | None) -> Batch:
    tables = [shard.splits for shard in window.shards]
    splits = _take(tables, pieces.renderings, _owner(window, pieces.shards)).astype(np.int64)
    count = len(splits)
    sizes = np.column_stack([splits, pieces.lengths - splits.sum(axis=1)])  # [pairs, 3]
    begins = pieces.begins[:, None] + np.cumsum(sizes, axis=1) - sizes
    exists = sizes.ravel() > 0  # nothing may be shared but the one token that both sides carry
    shared = np.where(sizes[:, 0] > 0, np.cumsum(exists).reshape(-1, 3)[:, 0] - 1, -1)
    nobody = np.full(count, -1)
    parents = np.column_stack([nobody, shared, shared]).ravel()[exists]
    number = np.column_stack([nobody, 2 * np.arange(count), 2 * np.arange(count) + 1]).ravel()[exists]
    before = np.column_stack([np.zeros(count, np.int64), sizes[:, 0], sizes[:, 0]]).ravel()[exists]
    lengths = sizes.ravel()[exists]
    segments = Pieces(
        shards=np.repeat(pieces.shards, 3)[exists],
        begins=begins.ravel()[exists],
        lengths=lengths,
        open=np.zeros(len(lengths), dtype=bool),
        renderings=np.repeat(pieces.renderings, 3)[exists],
    )
    batch = _flat(window, segments, token_weights)
    batch.positions += torch.from_numpy(np.repeat(before, lengths))
    batch.parents = torch.from_numpy(parents.astype(np.int32))
    batch.sequences = Sequences(_scored(batch, np.repeat(number, lengths)), 2 * count)
    return batch


def _scored(batch: Batch, owner: Ints) -> torch.Tensor:
    """int64 [T]: the owner of each label, -1 where there is none."""
    return torch.where(batch.labels == IGNORE, -1, torch.from_numpy(owner.astype(np.int64)))


def _flat(window: Window, pieces: Pieces, token_weights: np.ndarray | None) -> Batch:
    """Pieces end to end as segments of their own; the label of a token is the next of its document."""
    begins, lengths = pieces.begins, pieces.lengths
    ends = np.cumsum(lengths)
    index = spans(begins, lengths)
    owner = _owner(window, pieces.shards, lengths)
    tokens, trained = _tokens(window.shards, index, owner)
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    goes_on = np.flatnonzero(pieces.open)
    next_owner = None if owner is None else pieces.shards[goes_on]
    follows, follows_trained = _tokens(window.shards, (begins + lengths)[goes_on], next_owner)
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
    extras = {
        name: torch.from_numpy(np.ascontiguousarray(_take([e[name] for e in window.extras], index, owner)))
        for name in window.extras[0]
    }
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        weights=weights,
        rows=window.names,
        extras=extras,
    )


def _owner(window: Window, shards: Ints, lengths: Ints | None = None) -> Ints | None:
    """The shard of each piece, or of each token; None if there is only one shard."""
    if len(window.shards) == 1:
        return None
    return shards if lengths is None else np.repeat(shards, lengths)


def _tokens(shards: list[Shard], index: Ints, owner: Ints | None) -> tuple[Ints, NDArray[np.uint8] | None]:
    """(tokens, mask or None if all are trained) at `index` of the shard `owner`."""
    tokens = _take([shard.tokens for shard in shards], index, owner).astype(np.int64)
    masks = [shard.mask for shard in shards]
    if all(mask is None for mask in masks):
        return tokens, None
    return tokens, _take(masks, index, owner, missing=1)


def _take(
    tables: Sequence[NDArray[Any] | None], index: Ints, owner: Ints | None, missing: int = 0
) -> NDArray[Any]:
    """Rows `index` of the table `owner` (of the only one if None); `missing` where there is no table."""
    known = next(table for table in tables if table is not None)
    if owner is None:
        return known[index]
    out = np.full(
        (len(index), *known.shape[1:]), missing, np.result_type(*(t for t in tables if t is not None))
    )
    for number in np.unique(owner).tolist():
        some = np.flatnonzero(owner == number)
        table = tables[number]
        if table is not None:
            out[some] = table[index[some]]
    return out
