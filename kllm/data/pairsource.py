"""Micro-batches of preference pairs or rated answers, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kllm.data.loader import PackedSource, row_capacity
from kllm.data.shards import Shard
from kllm.errors import UserError


class PairSource(PackedSource):
    """`PackedSource` for shards of kind "preference" or "rated".

    Its batches carry `sequences`, those of pairs `parents` too. A pair is never cut and its two sides
    always share a batch.

    Args:
        seq_len: longest conversation; a row holds `row_capacity(kind, seq_len)` tokens, which is what
            `rows_per_step` and `micro_rows` count in. The other arguments are `PackedSource`'s.

    Raises:
        UserError: no rows, shards of another kind, or shards made for a longer seq_len.
    """

    def __init__(
        self, shards: Sequence[Shard], weights: Sequence[float] | None = None, *, seq_len: int, **options: Any
    ) -> None:
        kinds = {shard.kind for shard in shards}
        if len(kinds) != 1 or not kinds <= {"preference", "rated"}:
            raise UserError(f"pairs or ratings are wanted, the data is {' and '.join(sorted(kinds))}")
        (kind,) = kinds
        super().__init__(shards, weights, seq_len=row_capacity(kind, seq_len), kind=kind, **options)
        self._check_whole()

    @property
    def sequences_per_epoch(self) -> int:
        """Answers of one pass over all documents, two for each pair."""
        docs = sum(shard.docs for stream in self._streams for shard in stream.shards)
        return 2 * docs if self._kind == "preference" else docs
