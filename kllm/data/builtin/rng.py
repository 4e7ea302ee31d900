"""Random choices that are the same on every platform and Python version.

`random.Random` keeps only `random()` and `getrandbits()` fixed between releases; `choice`, `shuffle`
and `sample` changed before and may change again. Everything here is built on `getrandbits`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Dice:
    """A seeded source of choices; `key` is any text, equal keys give equal sequences."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key)  # a str seed goes through SHA-512, never through hash()

    def below(self, n: int) -> int:
        """A uniform integer in [0, n); n must be positive."""
        bits = n.bit_length()
        while True:
            value = self._random.getrandbits(bits)
            if value < n:
                return value

    def between(self, low: int, high: int) -> int:
        """A uniform integer in [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self.below(1 << 20) < int(probability * (1 << 20))

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list in random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def some(self, items: Sequence[T], n: int) -> list[T]:
        """`n` different items (all of them if there are fewer)."""
        return self.shuffled(items)[:n]

    def weighted(self, table: Sequence[tuple[T, int]]) -> T:
        """One item of (item, whole-number weight) pairs."""
        point = self.below(sum(weight for _, weight in table))
        for item, weight in table:
            point -= weight
            if point < 0:
                return item
        raise AssertionError("unreachable: the weights cover every point")


class Deck(Generic[T]):
    """Deals items for ever: every item once, in random order, before any item again."""

    def __init__(self, items: Sequence[T], dice: Dice) -> None:
        self._items, self._dice = list(items), dice
        self._left: list[T] = []

    def deal(self) -> T:
        if not self._left:
            self._left = self._dice.shuffled(self._items)
        return self._left.pop()
