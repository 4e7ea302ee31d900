"""What an answer is made of, and how its text is cut at the marks that tell the parts apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kllm.tokenizer.pieces import StreamDecoder

Kind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True)
class Part:
    """A piece of an answer.

    "reasoning" and "content" carry `text`. "call" begins tool call `index` with its `id` and `name`;
    "arguments" carries `text`, a piece of that call's JSON.
    """

    kind: Kind
    text: str = ""
    index: int = 0
    id: str = ""
    name: str = ""


def merged(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind joined, empty ones dropped."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if last and part.kind != "call" and (last.kind, last.index) == (part.kind, part.index):
            out[-1] = replace(last, text=last.text + part.text)
        elif part.text or part.kind == "call":
            out.append(part)
    return out


@dataclass(frozen=True)
class Mark:
    """A mark such as `</think>` found in the text, from character `at` on."""

    text: str
    at: int


class Lexer:
    """Finds marks in an answer's text while it comes.

    A mark that the tokenizer has as one token is found by that token: the same letters in a JSON string
    or spelt out are text. Other marks are found by their text, of which an end that may become one is
    held back.

    Args:
        marks: mark -> its token id, None where the tokenizer has no such token.
        decoder: decodes the answer's tokens as the engine does.
    """

    def __init__(self, marks: Mapping[str, int | None], decoder: StreamDecoder | None = None) -> None:
        self._spelt = [text for text, token in marks.items() if token is None]
        self._by_token = {token: text for text, token in marks.items() if token is not None}
        self._decoder = decoder
        self._found: list[Mark] = []  # by token, in order, not yet given out
        self._held = ""
        self._at = 0  # of the held text, in characters
        self.ends: list[int] = []
        """For each token, how many characters the answer has with it."""

    @property
    def fed(self) -> int:
        """Characters of text so far."""
        return self._at + len(self._held)

    def saw(self, tokens: Iterable[int]) -> None:
        """Takes note of drawn tokens; their text comes with `feed`, at once or later."""
        if self._decoder is None:
            return
        end = self.ends[-1] if self.ends else 0
        for token in tokens:
            end += len(self._decoder.put(token))
            self.ends.append(end)
            mark = self._by_token.get(token)
            if mark is not None:
                self._found.append(Mark(mark, end - len(mark)))

    def feed(self, text: str) -> list[str | Mark]:
        """Text and marks that are certain now."""
        self._held += text
        out: list[str | Mark] = []
        while (mark := self._next()) is not None:
            if mark.at > self._at:
                out.append(self._cut(mark.at - self._at))
            self._cut(len(mark.text))
            out.append(mark)
        if safe := len(self._held) - self._uncertain():
            out.append(self._cut(safe))
        return out

    def finish(self) -> list[str | Mark]:
        """What is held back, once no more text comes."""
        return [self._cut(len(self._held))] if self._held else []

    def _cut(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._at += length
        return text

    def _next(self) -> Mark | None:
        """The first mark that is whole in the held text."""
        found = [Mark(mark, self._at + at) for mark in self._spelt if (at := self._held.find(mark)) >= 0]
        while self._found and self._found[0].at < self._at:
            self._found.pop(0)  # a longer mark went over it
        if self._found and self._held.startswith(self._found[0].text, self._found[0].at - self._at):
            found.append(self._found[0])
        return min(found, key=lambda mark: mark.at, default=None)

    def _uncertain(self) -> int:
        """Length of the end of the held text that may become a mark."""
        limit = len(self._held)
        longest = 0
        for mark in self._spelt:
            for length in range(min(len(mark) - 1, limit), longest, -1):
                if self._held.endswith(mark[:length]):
                    longest = length
                    break
        if self._found:
            longest = max(longest, limit - (self._found[0].at - self._at))
        return min(longest, limit)
