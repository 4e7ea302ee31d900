"""A draft model: a smaller one with the same vocabulary guesses, the model checks.

Leviathan et al. 2023 (speculative decoding), in the exact form: a guess stands if the model would have
drawn it itself, so answers do not change. The draft has rows of its own for keys and values, and reads
what was said since it last looked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kllm.engine.cache import KVCache, Segment, in_order
from kllm.engine.kvformat import kv_format
from kllm.engine.request import Request
from kllm.engine.rows import Row, Rows
from kllm.model.decode import Prepared

_READ = 256  # tokens that the draft reads in one step: a long prompt comes in parts


class _State:
    """The draft's view of one request: its row and the tokens whose keys and values are there."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.fed: list[int] = []
        self.sure = 0
        """So many of `fed` are known to be the request's own."""


class DraftModel:
    """Proposes what a smaller model would say, greedily.

    Args:
        model: the smaller model, prepared.
        count: tokens proposed at once.
        memory: bytes for its keys and values; requests without room are not guessed for.
    """

    def __init__(self, model: Prepared, count: int, memory: int = 2**29) -> None:
        self.model, self.count = model, count
        shape = model.shape
        self.device = torch.device(model.device)
        self.max_length = shape.max_position_embeddings
        fmt = kv_format("auto", shape.head_dim, model.dtype)
        self._rows = Rows(
            shape.num_hidden_layers,
            shape.num_key_value_heads,
            fmt,
            max_length=self.max_length,
            budget=memory,
            device=self.device,
        )
        self._cache = KVCache(fmt, self.device)
        self._states: dict[Request, _State] = {}

    def propose(self, requests: Sequence[Request]) -> dict[Request, list[int]]:
        """See `stepper.Proposer`."""
        first: dict[Request, list[int]] = {}
        ready: set[Request] = set()
        left = _READ
        for request in requests:
            if not left or not self._room(request):
                continue
            missing = self._missing(request)
            first[request] = missing[:left]
            left -= len(first[request])
            if len(first[request]) == len(missing):
                ready.add(request)
        if not first:
            return {}
        proposed = {r: [token] for r, token in self._next(first).items() if r in ready}
        for _ in range(self.count - 1 if ready else 0):
            for request, token in self._next({r: tokens[-1:] for r, tokens in proposed.items()}).items():
                proposed[request].append(token)
        return proposed

    def forget(self, request: Request) -> None:
        """See `stepper.Proposer`."""
        state = self._states.pop(request, None)
        if state is not None:
            self._rows.free(state.row)

    def _room(self, request: Request) -> bool:
        """A row that holds the request's tokens and the guesses; False if there is none."""
        needed = len(request.tokens) + self.count
        if needed > self.max_length:
            return False
        state = self._states.get(request)
        if state is not None and needed <= state.row.pool.capacity:
            return True
        row, _ = self._rows.allocate(needed, 0)
        if row is None:
            return False
        if state is None:
            self._states[request] = _State(row)
        else:
            self._rows.copy(state.row, row)
            self._rows.free(state.row)
            state.row = row
        return True

    def _missing(self, request: Request) -> list[int]:
        """Tokens that the draft has not read; guesses that were wrong are forgotten first."""
        state = self._states[request]
        same, upto = state.sure, min(len(state.fed), len(request.tokens) - 1)
        while same < upto and state.fed[same] == request.tokens[same]:
            same += 1
        state.sure = same
        del state.fed[same:]
        self._rows.lengths[state.row] = same
        return request.tokens[same:]

    def _next(self, fresh: dict[Request, list[int]]) -> dict[Request, int]:
        """Reads `fresh` tokens of each request and says what comes next."""
        placed = [
            (Segment(self._states[r].row, len(self._states[r].fed), len(ids)), r) for r, ids in fresh.items()
        ]
        placed.sort(key=lambda pair: in_order(pair[0]))
        tokens = [token for _, r in placed for token in fresh[r]]
        positions = [p for s, _ in placed for p in range(s.start, s.start + s.count)]
        self.model.ensure_context(max(positions) + 1)
        self._cache.begin([segment for segment, _ in placed])
        hidden = self.model(self._tensor(tokens), self._tensor(positions), self._cache)
        ends = torch.tensor([s.count for s, _ in placed], device=self.device).cumsum(0) - 1
        best = self.model.logits(hidden[ends]).argmax(-1).tolist()
        for _, request in placed:
            state = self._states[request]
            state.fed += fresh[request]
            self._rows.lengths[state.row] = len(state.fed)
        return {request: token for (_, request), token in zip(placed, best, strict=True)}

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
