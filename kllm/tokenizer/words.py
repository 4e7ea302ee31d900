"""Counting words in bounded memory, whatever the language.

The tokenizer's own pattern takes a whole Chinese clause for one word, and nearly every clause is new: a
plain word table grows by 100 MB for each MB of text. So while counting (and only then) runs of letters are
cut: Han to a few characters, other scripts without spaces a little longer, anything else where words are
no longer words. The table itself is pruned of its rarest entries whenever it passes its limit.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pre-tokenizer's pattern: the one that llama.cpp knows as "qwen2". Digits stand alone."""

_SPACE = r"\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_HAN = r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# kana, Thai, Lao, Tibetan, Myanmar, Khmer: words are not set apart by spaces either
_UNSPACED = r"\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
_UNSPACED_CUT, _LETTERS_CUT, _OTHER_CUT = 6, 24, 16

_CHUNK = re.compile(r"[^\S\r\n]{0,16}(?:\S{1,64}[\r\n]{0,16}|[\r\n]{1,16})|\s{1,16}")
_BLOCK = 1 << 18  # characters counted at a time, so that one huge text needs no huge list
_CHUNKS = 200_000
_BYTES = 8_000_000  # of distinct words, at about 60 bytes of memory each while merging


class WordCounter:
    """Counts the words of texts.

    Args:
        han_cut: longest run of Han characters counted as one word; 0 leaves them as long as other words.
        limit: distinct words kept; the rarest go when the table passes it.

    Attributes:
        counts: word -> occurrences.
        pruned: occurrences that went with pruned words.
    """

    def __init__(self, han_cut: int = 2, limit: int = 1_000_000) -> None:
        self.counts: Counter[str] = Counter()
        self.pruned = 0
        self._limit = limit
        self._find = _counting_pattern(han_cut).findall
        self._chunks: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Counts a text."""
        for block in _blocks(text):
            if block.count(" ") * 12 < len(block):
                self.counts.update(self._find(block))
                self._prune()
            else:  # spaced text repeats its space-separated pieces: match the pattern once for each
                self._chunks.update(_CHUNK.findall(block))
                if len(self._chunks) > _CHUNKS:
                    self._drain()

    def finish(self) -> Counter[str]:
        """The table, complete; the rarest words go if all together are too long."""
        self._drain()
        sizes = {word: len(word.encode("utf-8", "replace")) for word in self.counts}
        room = _BYTES
        if sum(sizes.values()) > room:
            kept: Counter[str] = Counter()
            for word in sorted(sizes, key=lambda word: (-self.counts[word], word)):
                room -= sizes[word]
                if room < 0:
                    break
                kept[word] = self.counts[word]
            self.pruned += self.counts.total() - kept.total()
            self.counts = kept
        return self.counts

    def _drain(self) -> None:
        counts, find = self.counts, self._find
        for chunk, times in self._chunks.items():
            for word in find(chunk):
                counts[word] += times
        self._chunks.clear()
        self._prune()

    def _prune(self) -> None:
        """Drops the rarest words until the table is half full. Deterministic: by count alone."""
        if len(self.counts) <= self._limit:
            return
        sizes = Counter(self.counts.values())
        floor, kept = 1, len(self.counts)
        while kept - sizes[floor] > self._limit // 2:
            kept -= sizes[floor]
            floor += 1
        self.pruned += sum(count for count in self.counts.values() if count <= floor)
        self.counts = Counter({word: count for word, count in self.counts.items() if count > floor})


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces, cut at a line end or a space where there is one near."""
    at = 0
    while len(text) - at > _BLOCK:
        end = at + _BLOCK
        cut = max(text.rfind("\n", at + _BLOCK // 2, end) + 1, 0) or text.rfind(" ", at + _BLOCK // 2, end)
        cut = cut if cut > at else end
        yield text[at:cut]
        at = cut
    yield text[at:]


@lru_cache(maxsize=4)
def _counting_pattern(han_cut: int) -> re.Pattern[str]:
    """`PATTERN` for Python's `re`, its runs cut."""
    letter, number = _category("L"), _category("N")
    other = f"(?:(?![{_HAN}{_UNSPACED}])[{letter}]){{1,{_LETTERS_CUT}}}"
    unspaced = f"(?:(?=[{_UNSPACED}])[{letter}]){{1,{_UNSPACED_CUT}}}"
    han = f"[{_HAN}]{{1,{han_cut or _LETTERS_CUT}}}"
    return re.compile(
        rf"'(?i:s|t|re|ve|m|ll|d)|[^\r\n{letter}{number}]?(?:[A-Za-z]{{1,{_LETTERS_CUT}}}(?![{letter}])"
        rf"|{han}|{unspaced}|{other})"
        rf"|[{number}]| ?[^{_SPACE}{letter}{number}]{{1,{_OTHER_CUT}}}[\r\n]{{0,{_OTHER_CUT}}}"
        rf"|[{_SPACE}]{{0,{_OTHER_CUT}}}[\r\n]{{1,{_OTHER_CUT}}}|[{_SPACE}]{{1,{_OTHER_CUT}}}(?![^{_SPACE}])"
        rf"|[{_SPACE}]{{1,{_OTHER_CUT}}}"
    )


@lru_cache(maxsize=2)
def _category(major: str) -> str:
    """The body of a character class with every character of a Unicode major category."""
    ranges: list[list[int]] = []
    for code in range(0x110000):
        if unicodedata.category(chr(code))[0] == major:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
