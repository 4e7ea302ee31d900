"""The answer of one round whose calls the server runs: nothing in a call is the client's text.

So stop strings end the content only, and log-probabilities are those of what the client gets to read.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kllm.engine.answer import Answer, Reading
from kllm.engine.request import answer_decoder
from kllm.engine.stops import StopMatcher
from kllm.tokenizer.parts import Lexer, Mark, Part
from kllm.tokenizer.thinking import END_THINK, THINK
from kllm.tokenizer.toolcalls import END_TOOL_CALL, TOOL_CALL, read_call

if TYPE_CHECKING:
    from kllm.engine.params import Event, SamplingParams, TokenLogprob
    from kllm.serve.ticket import Batch


def without_stops(params: SamplingParams, reading: Reading) -> tuple[SamplingParams, RoundAnswer]:
    """What the engine is asked, and the answer that looks for the stop strings instead."""
    special = reading.tokenizer.special_tokens
    tokens = [*params.stop_token_ids, *(special[stop] for stop in params.stop if stop in special)]
    asked = replace(params, stop=(), stop_token_ids=tuple(dict.fromkeys(tokens)))
    return asked, RoundAnswer(reading, stops=params.stop, least=params.min_tokens)


def taken(answer: RoundAnswer, batch: Batch) -> list[Part]:
    """The parts that a batch of its events completes, up to the end of the answer."""
    return [part for _, news in batch if answer.finish_reason is None for part in answer.take(news)]


@dataclass
class RoundAnswer(Answer):
    """Collects it. Once it has a `finish_reason` no more is to be taken, though the engine may go on.

    Attributes:
        stops: the request's stop strings, which the engine must not have been told.
        least: they count after so many tokens.
        stopped: one of them ended it.
    """

    stops: tuple[str, ...] = ()
    least: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cutter = ContentStops(self.reading, self.stops, self.least) if self.stops else None
        self._open: int | None = None  # where what may be a call begins, in characters
        self._calls: list[tuple[int, float]] = []  # where calls are, those behind what was given out
        self._held: list[TokenLogprob] = []  # entries of which it is not certain yet
        self._popped = 0  # entries before those

    def take(self, event: Event) -> list[Part]:
        """The parts that an event completes, up to a stop string."""
        if self._cutter is not None:
            event = self._cutter.cut(event)
            self.stopped = self._cutter.stopped
        return super().take(event)

    def pop_entries(self) -> list[TokenLogprob]:
        """Log-probabilities of what was given out since the last call, but for those of calls."""
        self._held += super().pop_entries()
        ends = self._lexer.ends
        given: list[TokenLogprob] = []
        ready = 0
        for entry in self._held:
            start, end = ends[self._popped - 1] if self._popped else 0, ends[self._popped]
            if self._open is not None and end > self._open:
                break
            while self._calls and self._calls[0][1] <= start:
                self._calls.pop(0)
            if not (self._calls and end > self._calls[0][0]):
                given.append(entry)
            ready += 1
            self._popped += 1
        del self._held[:ready]
        return given

    def _content(self, item: str | Mark) -> list[Part]:
        before = self._tools.calls if self._tools else 0
        parts = super()._content(item)
        if isinstance(item, Mark):
            if item.text == TOOL_CALL and self._open is None and self._tools:
                self._open = item.at
            elif item.text == END_TOOL_CALL:
                self._close(before, item.at + len(item.text))
        return parts

    def _finish(self, event: Event) -> list[Part]:
        before = self._tools.calls if self._tools else 0
        parts = super()._finish(event)
        self._close(before, math.inf)
        return parts

    def _close(self, before: int, end: float) -> None:
        """What was open has ended: a call if there is one more than before."""
        if self._tools and self._tools.calls > before and self._open is not None:
            # Where one call is allowed, all that follows it is dropped.
            self._calls.append((self._open, end if self.reading.several else math.inf))
        self._open = None


class ContentStops:
    """Ends an answer where its content has a stop string, as the engine would; the calls in it are whole.

    What is thought or called does not count, nor white space behind it, which is no content either.

    Args:
        reading: how the answer is read.
        stops: the strings.
        least: they count after so many tokens.
    """

    def __init__(self, reading: Reading, stops: Sequence[str], least: int = 0) -> None:
        decoder = answer_decoder(reading.tokenizer, reading.prompt, reading.shown())
        self._lexer = Lexer(reading.marks(), decoder)
        self._matcher, self._least = StopMatcher(stops), least
        self._several = reading.several
        self._state = "reasoning" if reading.thinking and reading.split else "start"
        self._gap = False  # only white space since the thinking or a call
        self._call = ""  # held until it is certain that it is one
        self._at = 0  # characters behind us

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._matcher.stopped

    def cut(self, event: Event) -> Event:
        """The event with the text that is certain; the last one where a stop string ends."""
        self._lexer.saw(event.token_ids)
        ended = event.finish_reason is not None
        text = ""
        for item in [*self._lexer.feed(event.text), *(self._lexer.finish() if ended else ())]:
            text += self._item(item)
            if self.stopped:
                return self._last(event, text)
        if ended:
            text += self._end_of_call() if self._state == "call" else ""
            if self.stopped:
                return self._last(event, text)
            text += self._matcher.flush()
        return replace(event, text=text)

    def _last(self, event: Event, text: str) -> Event:
        """The end of the answer, without the tokens behind the one that completed the stop string."""
        ends = self._lexer.ends
        kept = max(1, bisect_left(ends, self._at) + 1 - (len(ends) - len(event.token_ids)))
        tokens, logprobs = event.token_ids[:kept], event.logprobs[:kept]
        return replace(event, token_ids=tokens, text=text, finish_reason="stop", logprobs=logprobs)

    def _item(self, item: str | Mark) -> str:
        """What may be shown after it."""
        mark, text = (item.text, item.text) if isinstance(item, Mark) else ("", item)
        if self._state == "call":
            self._call += text
            return self._end_of_call() if mark == END_TOOL_CALL else ""
        if self._state in ("reasoning", "over"):
            if self._state == "reasoning" and mark == END_THINK:
                self._state, self._gap = "content", True
            return self._passed(text)
        if mark == TOOL_CALL:
            self._state, self._call = "call", text
            return ""
        if mark == THINK and self._state == "start":
            self._state = "reasoning"
            return self._passed(text)
        return self._content(text)

    def _end_of_call(self) -> str:
        """The call as it is; if it is none, it is content."""
        text, self._call = self._call, ""
        self._state = "content" if self._several else "over"
        self._gap = read_call(text.removeprefix(TOOL_CALL).removesuffix(END_TOOL_CALL)) is not None
        if self._gap:
            return self._passed(text)
        self._state = "content"
        return self._content(text)

    def _passed(self, text: str) -> str:
        """Text in which no stop string counts; none goes on behind it either."""
        self._at += len(text)
        return self._matcher.flush() + text

    def _content(self, text: str) -> str:
        """Text in which they do, up to the token that completes one."""
        shown = ""
        for piece, number in self._pieces(text):
            self._gap = self._gap and piece.isspace()
            if piece.strip():
                self._state = "content"
            self._at += len(piece)
            shown += piece if self._gap or number <= self._least else self._matcher.feed(piece)
            if self.stopped:
                break
        return shown

    def _pieces(self, text: str) -> Iterator[tuple[str, int]]:
        """The text cut at the ends of tokens and of white space before it: (piece, number of its token)."""
        ends, at = self._lexer.ends, self._at
        number = bisect_left(ends, at + 1)
        space = len(text) - len(text.lstrip())
        start = 0
        while start < len(text):
            token = ends[number] - at if number < len(ends) else len(text)
            end = min(token, len(text), space if start < space else len(text))
            if end > start:  # a token may add nothing yet: a part of a character
                yield text[start:end], number + 1
            start, number = end, number + (end == token)
