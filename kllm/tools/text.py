"""Texts that must stay short: the middle goes, and a line says how much of it."""

from __future__ import annotations


class Kept:
    """The first and the last half of `limit` bytes of a stream of any length."""

    def __init__(self, limit: int) -> None:
        self.last = max(1, limit // 2)
        self.first = max(1, limit - self.last)
        self.head = b""
        self.tail = b""
        self.total = 0

    def add(self, chunk: bytes) -> None:
        self.total += len(chunk)
        room = self.first - len(self.head)
        self.head += chunk[:room]
        self.tail = (self.tail + chunk[room:])[-self.last :]

    def text(self) -> str:
        """As UTF-8, with a line that says how much was cut, if anything was."""
        cut = self.total - len(self.head) - len(self.tail)
        if not cut:
            return (self.head + self.tail).decode("utf-8", "replace")
        head = self.head.decode("utf-8", "replace").rstrip("\ufffd")
        tail = self.tail.decode("utf-8", "replace").lstrip("\ufffd")
        return f"{head}\n[... {cut:,} bytes cut ...]\n{tail}"


def clipped(text: str, most: int) -> str:
    """`text` in at most about `most` bytes of UTF-8."""
    kept = Kept(most)
    kept.add(text.encode("utf-8", "replace"))
    return kept.text()
