"""Byte-pair merges from a table of word counts.

The greedy rule of every BPE trainer: merge the most frequent adjacent pair, ties to the smallest ids.
All words lie end to end in one array with links between neighbours, and a pair's positions are noted when
its later symbol is made: from then on its count only falls. So the heap holds upper bounds, and a count is
made exact only when its pair reaches the top.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

Pair = tuple[int, int]


def learn_merges(
    symbols: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    *,
    tokens: int,
    min_frequency: int,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[int, int, int]]:
    """Learns merges until they make `tokens` new symbols, numbered from 256 in the order they are made.

    Args:
        symbols: uint8 [sum(lengths)], every distinct word's symbols (0..255), end to end.
        lengths: [words], symbols per word, at least 1.
        counts: [words], how often each word occurs.
        tokens: how many new symbols to make at most.
        min_frequency: a pair that occurs less often is never merged.
        progress: called with the number of symbols made.

    Returns:
        (first, second, made), best first. Two merges may make the same symbol: a+bc and ab+c.
    """
    table = _Pairs(symbols, lengths, counts, max(min_frequency, 1))
    texts = [bytes([i]) for i in range(256)]
    number = {text: i for i, text in enumerate(texts)}
    learnt: dict[Pair, int] = {}
    while len(texts) < 256 + tokens:
        pair = table.most_frequent()
        if pair is None:
            break
        text = texts[pair[0]] + texts[pair[1]]
        made = number.setdefault(text, len(texts))
        table.merge(pair, made)
        learnt.setdefault(pair, made)
        if made == len(texts):
            texts.append(text)
            if progress and len(texts) % 64 == 0:
                progress(len(texts) - 256)
    return [(first, second, made) for (first, second), made in learnt.items()]


class _Pairs:
    """The words as linked symbols, and where each frequent pair stands (its left symbol's position)."""

    def __init__(self, symbols: np.ndarray, lengths: np.ndarray, counts: np.ndarray, least: int) -> None:
        size = len(symbols)
        ends = np.cumsum(lengths)
        self.symbol = symbols.astype(np.int32)
        self.weight = np.repeat(counts.astype(np.int64), lengths)
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.next[ends - 1] = -1
        self.prev = np.arange(-1, size - 1, dtype=np.int32)
        self.prev[(ends - lengths)] = -1
        self.fresh = np.zeros(size, bool)
        self.least = least
        self.where: dict[Pair, np.ndarray] = {}
        self.heap: list[tuple[int, int, int]] = []
        left = np.flatnonzero(self.next >= 0).astype(np.int32)
        keys = symbols[left].astype(np.uint16) * np.uint16(256) + symbols[left + 1]
        for key, positions, count in self._grouped(keys, left):
            self._add((key >> 8, key & 255), positions, count)

    def most_frequent(self) -> Pair | None:
        """Takes the most frequent pair off the table; None when none is frequent enough."""
        while self.heap:
            bound, first, second = heapq.heappop(self.heap)
            pair = (first, second)
            if pair not in self.where:
                continue
            positions = self._current(pair)
            count = int(self.weight[positions].sum())
            if count == -bound:
                return pair
            if count < self.least:
                del self.where[pair]
            elif count < -bound:  # otherwise a newer entry stands for it
                self.where[pair] = positions
                heapq.heappush(self.heap, (-count, first, second))
        return None

    def merge(self, pair: Pair, new: int) -> None:
        """Writes symbol `new` for every occurrence of `pair`, and enters the pairs that this makes."""
        left = self._current(pair)
        del self.where[pair]
        if pair[0] == pair[1]:
            left = self._without_overlaps(left)
        middle = self.next[left]
        right = self.next[middle]
        self.symbol[left] = new
        self.symbol[middle] = -1
        self.next[left] = right
        followed = right >= 0
        self.prev[right[followed]] = left[followed]
        starts = left[followed]
        for other, positions, count in self._grouped(self.symbol[right[followed]], starts):
            self._add((new, other), positions, count)
        before = self.prev[left]
        before = before[before >= 0]
        others = self.symbol[before]
        self.fresh[left] = True
        apart = ~self.fresh[before]  # two fresh symbols side by side were entered above
        self.fresh[left] = False
        for other, positions, count in self._grouped(others[apart], before[apart]):
            self._add((other, new), positions, count)

    def _current(self, pair: Pair) -> np.ndarray:
        """Where the pair still stands."""
        positions = self.where[pair]
        following = self.next[positions]
        valid = (self.symbol[positions] == pair[0]) & (following >= 0) & (self.symbol[following] == pair[1])
        return positions[valid]

    def _without_overlaps(self, left: np.ndarray) -> np.ndarray:
        """Of "aaaa" the pairs at 0 and 2: every second one of a run."""
        left = np.sort(left)
        index = np.arange(len(left))
        linked = np.zeros(len(left), bool)
        linked[1:] = self.next[left[:-1]] == left[1:]
        run_start = np.maximum.accumulate(np.where(linked, 0, index))
        return left[(index - run_start) % 2 == 0]

    def _grouped(self, keys: np.ndarray, positions: np.ndarray) -> list[tuple[int, np.ndarray, int]]:
        """(key, its positions, their weight) for every key that is frequent enough."""
        if len(keys) == 0:
            return []
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        cuts = np.flatnonzero(keys[1:] != keys[:-1]) + 1
        starts = np.concatenate(([0], cuts))
        stops = np.concatenate((cuts, [len(keys)]))
        counts = np.add.reduceat(self.weight[positions], starts)
        kept = np.flatnonzero(counts >= self.least)
        chosen = zip(keys[starts[kept]].tolist(), starts[kept].tolist(), stops[kept].tolist(), strict=True)
        return [
            (key, positions[start:stop], count)
            for (key, start, stop), count in zip(chosen, counts[kept].tolist(), strict=True)
        ]

    def _add(self, pair: Pair, positions: np.ndarray, count: int) -> None:
        if pair in self.where:  # a symbol made a second time
            known = self._current(pair)
            count += int(self.weight[known].sum())
            positions = np.concatenate((known, positions))
        self.where[pair] = positions
        heapq.heappush(self.heap, (-count, *pair))
