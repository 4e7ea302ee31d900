"""Texts that must stay short."""

from __future__ import annotations


def clipped(text: str, most: int) -> str:
    """`text` in at most about `most` bytes of UTF-8: the middle goes, and a line says how much of it."""
    data = text.encode("utf-8", "replace")
    if len(data) <= most:
        return data.decode()
    head, tail = data[: most * 2 // 3], data[-(most // 3) :]
    note = f"\n[{len(data) - len(head) - len(tail):,} bytes cut]\n"
    return head.decode("utf-8", "ignore") + note + tail.decode("utf-8", "ignore")
