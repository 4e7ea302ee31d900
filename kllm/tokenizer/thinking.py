"""Thinking told apart from the answer: where an answer starts, and where it stops thinking."""

from __future__ import annotations

from collections.abc import Sequence

from kllm.tokenizer.parts import Mark, Part
from kllm.tokenizer.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"


def starts_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the last think mark of the turn that the prompt opens is an opening one.

    Only what follows the last turn token counts: an earlier turn may have been cut in its thoughts, and
    what users write is never a mark.
    """
    opener, closer = tokenizer.added_tokens.get(THINK), tokenizer.added_tokens.get(END_THINK)
    turns = set(tokenizer.special_tokens.values()) - {opener, closer}
    start = next((i for i in range(len(prompt), 0, -1) if prompt[i - 1] in turns), 0)
    tail = list(prompt[start:])
    if opener is not None and closer is not None:
        last = next((token for token in reversed(tail) if token in (opener, closer)), closer)
        return last == opener
    text = tokenizer.decode(tail, skip_special_tokens=False)
    return text.rfind(THINK) > text.rfind(END_THINK)


class ThinkingSplitter:
    """Cuts an answer, given as text and marks, into reasoning and the rest.

    Newlines after the opener and around the closer belong to neither. An opener counts only at the very
    start; thinking that never ends is all reasoning. However the text is cut, the parts add up the same.

    Args:
        thinking: the prompt already opened the thinking.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._state = "opened" if thinking else "start"
        self._held = ""
        self.began = thinking
        """Whether there is any reasoning."""
        self.end: int | None = None
        """The character behind the closer."""

    def feed(self, item: str | Mark) -> list[Part | str | Mark]:
        """What `item` makes certain: reasoning as parts, the rest as it came."""
        if isinstance(item, Mark):
            return self._mark(item)
        return self._text(item)

    def finish(self) -> list[Part | str | Mark]:
        """What is held back, once no more text comes."""
        held, self._held = self._held, ""
        if not held or self._state in ("opened", "closed"):
            return []
        return [Part("reasoning", held) if self._state == "reasoning" else held]

    def _mark(self, mark: Mark) -> list[Part | str | Mark]:
        if self._state == "start" and mark.text == THINK:
            self._state, self._held, self.began = "opened", "", True
            return []
        if self._state in ("opened", "reasoning"):
            if mark.text != END_THINK:
                return self._text(mark.text)
            self._state, self._held = "closed", ""
            self.end = mark.at + len(mark.text)
            return []
        held, self._held = self._held, ""
        self._state = "content"
        rest = mark.text if mark.text in (THINK, END_THINK) else mark
        return [held, rest] if held else [rest]

    def _text(self, text: str) -> list[Part | str | Mark]:
        if self._state == "start":
            text = self._held + text
            self._state = "content" if text.strip() else "start"
            self._held = "" if text.strip() else text
        elif self._state in ("opened", "reasoning"):
            return self._reasoning(text)
        elif self._state == "closed":
            text = text.lstrip("\n")
            self._state = "content" if text else "closed"
        return [text] if text and self._state == "content" else []

    def _reasoning(self, text: str) -> list[Part | str | Mark]:
        if self._state == "opened":
            text = text.lstrip("\n")
            self._state = "reasoning" if text else "opened"
        text = self._held + text
        safe = text.rstrip("\n")
        self._held = text[len(safe) :]
        return [Part("reasoning", safe)] if safe else []
