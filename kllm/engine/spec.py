"""Prompt lookup: guesses that what follows now is what followed the same words before.

Saxena 2023 (prompt lookup decoding). Free to compute, right in summaries, edits, code and lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from kllm.engine.request import Request

_LENGTHS = (3, 2)  # of the words that must have come before, the longer first


class PromptLookup:
    """Proposes the continuation of the latest earlier place with the same last tokens.

    Args:
        count: most tokens proposed at once.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._places: dict[Request, _Places] = {}

    def propose(self, requests: Sequence[Request]) -> dict[Request, list[int]]:
        """See `stepper.Proposer`."""
        found = {}
        for request in requests:
            places = self._places.get(request)
            if places is None:
                places = self._places[request] = _Places()
            at = places.find(request.tokens)
            if at is not None:
                found[request] = request.tokens[at : at + self.count]
        return found

    def forget(self, request: Request) -> None:
        """See `stepper.Proposer`."""
        self._places.pop(request, None)


class _Places:
    """Where each run of two or three tokens of one request was followed by something, kept as it grows."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._upto = 0

    def find(self, tokens: list[int]) -> int | None:
        """Index of what followed the latest earlier occurrence of the last tokens."""
        for end in range(max(self._upto, 1), len(tokens)):  # tokens[end] is known to follow
            for n in _LENGTHS:
                if end >= n:
                    self._after[tuple(tokens[end - n : end])] = end
        self._upto = len(tokens)
        for n in _LENGTHS:
            at = self._after.get(tuple(tokens[-n:])) if len(tokens) >= n else None
            if at is not None:
                return at
        return None
