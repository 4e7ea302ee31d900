"""The one shape of a training batch: documents laid end to end in one flat row, no padding.

Attention never crosses a document (`cu_seqlens`), positions restart in each, and the label of a
token is the token after it in the same document, or `IGNORE` where there is nothing to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kllm.model.head import IGNORE


@dataclass
class Piece:
    """A run of one document inside a row: `tokens` [n] and the `labels` [n] to predict at each."""

    tokens: np.ndarray
    labels: np.ndarray
    start: int = 0  # position of the first token inside its document chunk


@dataclass
class Sequences:
    """Which token's label counts for which sequence (an answer whose log-probability is summed).

    index: int64 [T], the number of the sequence of this token's label, -1 = none; count: number
    of sequences (preference pairs: chosen is 2 i, rejected 2 i + 1); good: bool [count], the
    rating of each sequence in rated (KTO) data, None for pairs.
    """

    index: Tensor
    count: int
    good: Tensor | None = None

    def to(self, device: torch.device | str) -> Sequences:
        """The same sequences on `device`."""
        good = None if self.good is None else self.good.to(device, non_blocking=True)
        return Sequences(self.index.to(device, non_blocking=True), self.count, good)

    def sums(self, values: Tensor) -> Tensor:
        """[count] sums over the tokens of each sequence, of values [T] on the same device."""
        slot = torch.where(self.index < 0, self.count, self.index)
        return values.new_zeros(self.count + 1).index_add(0, slot, values)[: self.count]


@dataclass
class Batch:
    """T tokens of any number of documents.

    tokens, labels, positions: int64 [T]; cu_seqlens: int32 [segments + 1], cu_seqlens[-1] == T;
    weights: float32 [T] loss weights or None for all ones; rows: where each row came from.
    parents: int32 [segments] on the CPU or None: the earlier segment of the same batch whose
    tokens come before this one (a beginning that several segments share; it has no parent
    itself), -1 = none. A segment attends to all of its parent and causally to itself.
    sequences: answers scored as a whole (preferences). extras: per-token annotations [T, ...].
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    weights: Tensor | None = None
    rows: list[str] = field(default_factory=list)
    parents: Tensor | None = None
    sequences: Sequences | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_pieces(
        cls, pieces: Sequence[Piece], rows: list[str] | None = None, token_weights: np.ndarray | None = None
    ) -> Batch:
        """Lays `pieces` end to end. `token_weights` [V] gives a loss weight for each label id."""
        tokens = np.concatenate([p.tokens for p in pieces]).astype(np.int64)
        labels = np.concatenate([p.labels for p in pieces]).astype(np.int64)
        lengths = np.array([len(p.tokens) for p in pieces], dtype=np.int64)
        ends = np.cumsum(lengths)
        positions = np.arange(len(tokens), dtype=np.int64) - np.repeat(ends - lengths, lengths)
        positions += np.repeat(np.array([p.start for p in pieces], dtype=np.int64), lengths)
        weights = None
        if token_weights is not None:
            weights = torch.from_numpy(token_weights[np.maximum(labels, 0)].astype(np.float32))
        return cls(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            weights=weights,
            rows=rows or [],
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device` (cu_seqlens, parents stay on the CPU: read as Python ints)."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            tokens=moved(self.tokens),
            labels=moved(self.labels),
            positions=moved(self.positions),
            weights=None if self.weights is None else moved(self.weights),
            sequences=None if self.sequences is None else self.sequences.to(device),
            extras={name: moved(values) for name, values in self.extras.items()},
        )

    @property
    def context(self) -> int:
        """Positions that a model must know for it."""
        return int(self.positions.max()) + 1

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a label."""
        return int((self.labels != IGNORE).sum())
