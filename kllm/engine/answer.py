"""One choice of a chat answer while it is written: from the engine's events to parts and figures.

Whole answers and streams are both the sum of the parts that `Answer.take` gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kllm.engine.request import answer_decoder
from kllm.tokenizer.parts import Lexer, Mark, Part, merged
from kllm.tokenizer.thinking import END_THINK, THINK, ThinkingSplitter
from kllm.tokenizer.toolcalls import END_TOOL_CALL, TOOL_CALL, ToolCallParser

if TYPE_CHECKING:
    from kllm.engine.params import Event, TokenLogprob
    from kllm.tokenizer.tokenizer import Tokenizer

_NEVER_DRAWN = -100.0
_PAIRS = ((THINK, END_THINK), (TOOL_CALL, END_TOOL_CALL))


def no_calls(tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """The `logit_bias` of an answer that may not call tools; () where the mark of a call is no token."""
    call = tokenizer.added_tokens.get(TOOL_CALL)
    return () if call is None else ((call, _NEVER_DRAWN),)


@dataclass(frozen=True)
class Reading:
    """How the answers to one request are read; the same for all its choices.

    Attributes:
        tokenizer: the model's.
        thinking: the prompt ends inside a think block.
        split: reasoning is told apart from content; else its tags stay in the content.
        parsed: tool calls are looked for.
        guaranteed: a grammar makes the calls.
        several: more than one call is allowed.
        constrained: a grammar of the request makes the content, so only marks that are tokens count in it.
        stop_ids: tokens that end an answer and are no part of its text.
        prompt: its tokens; an answer may go on in the middle of a word.
    """

    tokenizer: Tokenizer
    thinking: bool
    split: bool
    parsed: bool = False
    guaranteed: bool = False
    several: bool = True
    constrained: bool = False
    stop_ids: frozenset[int] = frozenset()
    prompt: Sequence[int] = ()

    def marks(self) -> dict[str, int | None]:
        """The marks to look for, with their tokens."""
        added = self.tokenizer.added_tokens
        wanted = [*(_PAIRS[0] if self.split else ()), *(_PAIRS[1] if self.parsed else ())]
        marks = {text: added.get(text) for text in wanted}
        if self.constrained:
            kept = {END_THINK} if self.thinking else set()
            marks = {text: token for text, token in marks.items() if token is not None or text in kept}
        return marks

    def shown(self) -> tuple[int, ...]:
        """Marks that decoding would leave out of the text."""
        special = self.tokenizer.special_tokens
        wanted = [text for pair in _PAIRS for text in pair if text in special]
        return tuple(special[text] for text in wanted)


@dataclass
class Answer:
    """Collects one choice.

    Attributes:
        tokens: drawn so far.
        finish_reason: OpenAI's word, once the answer has ended.
        cached_tokens: of the prompt.
        entries: log-probabilities whose text is out, for `pop_entries`.
        overhang: how many characters of the last token are behind the text's end: a stop string began in it.
    """

    reading: Reading
    tokens: int = 0
    finish_reason: str | None = None
    cached_tokens: int = 0
    entries: list[TokenLogprob] = field(default_factory=list)
    overhang: int = 0

    def __post_init__(self) -> None:
        reading = self.reading
        shown = reading.shown()
        self._lexer = Lexer(reading.marks(), answer_decoder(reading.tokenizer, reading.prompt, shown))
        self._splitter = ThinkingSplitter(thinking=reading.thinking) if reading.split else None
        self._tools: ToolCallParser | None = None
        if reading.parsed:
            self._tools = ToolCallParser(guaranteed=reading.guaranteed, single=not reading.several)
        # Where tags stay in the content, the one that the prompt opened is put back, or nothing closes.
        self._opening = f"{THINK}\n" if reading.thinking and not reading.split else ""
        self._waiting: list[TokenLogprob] = []
        self._begun = 0  # entries before the waiting ones

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens were thinking, its marks included."""
        splitter = self._splitter
        if splitter is None or not splitter.began:
            return 0
        if splitter.end is None:
            return self.tokens
        return sum(end <= splitter.end for end in self._lexer.ends)

    def take(self, event: Event) -> list[Part]:
        """The parts that an event completes; neighbours of one kind are one."""
        self.tokens += len(event.token_ids)
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        self._lexer.saw(event.token_ids)
        self._waiting += event.logprobs
        parts = self._content(self._opening)
        self._opening = ""
        for item in self._lexer.feed(event.text):
            parts += self._item(item)
        if event.finish_reason is not None:
            parts += self._finish(event)
        self._release(event)
        return merged(parts)

    def pop_entries(self) -> list[TokenLogprob]:
        """Log-probabilities that belong to what was given out since the last call."""
        entries, self.entries = self.entries, []
        return entries

    def _item(self, item: str | Mark) -> list[Part]:
        if self._splitter is None:
            return self._content(item)
        return self._split(self._splitter.feed(item))

    def _split(self, items: Iterable[Part | str | Mark]) -> list[Part]:
        parts: list[Part] = []
        for item in items:
            parts += [item] if isinstance(item, Part) else self._content(item)
        return parts

    def _content(self, item: str | Mark) -> list[Part]:
        if self._tools is not None:
            return self._tools.feed(item)
        return [Part("content", item.text if isinstance(item, Mark) else item)]

    def _finish(self, event: Event) -> list[Part]:
        parts: list[Part] = []
        for item in self._lexer.finish():
            parts += self._item(item)
        if self._splitter is not None:
            parts += self._split(self._splitter.finish())
        if self._tools is not None:
            parts += self._tools.finish()
        called = self._tools is not None and self._tools.calls > 0
        self.finish_reason = "tool_calls" if called and event.finish_reason == "stop" else event.finish_reason
        return parts

    def _release(self, event: Event) -> None:
        """Lets go of the entries of tokens whose text has come.

        Those of a token or string that stopped the answer are dropped, so that the bytes of all entries
        are those of the text.
        """
        ended = event.finish_reason is not None
        ends, fed = self._lexer.ends, self._lexer.fed
        if event.finish_reason == "stop" and self._waiting and event.token_ids:
            if event.token_ids[-1] in self.reading.stop_ids:
                self._waiting.pop()
            else:
                while self._waiting and self._start(len(self._waiting) - 1) >= fed:
                    self._waiting.pop()
                if self._waiting:
                    self.overhang = max(0, ends[self._begun + len(self._waiting) - 1] - fed)
        ready = 0
        while ready < len(self._waiting) and (ended or ends[self._begun + ready] <= fed):
            ready += 1
        self.entries += self._waiting[:ready]
        self._begun += ready
        del self._waiting[:ready]

    def _start(self, waiting: int) -> int:
        """Characters of the answer before a waiting entry's token."""
        index = self._begun + waiting
        return self._lexer.ends[index - 1] if index else 0


def message_of(parts: Iterable[Part], reasoning_field: str) -> dict[str, Any]:
    """The `message` of a whole answer."""
    whole = merged(sorted(parts, key=lambda part: part.kind in ("call", "arguments")))
    reasoning = "".join(part.text for part in whole if part.kind == "reasoning")
    content = "".join(part.text for part in whole if part.kind == "content")
    calls: list[dict[str, Any]] = []
    for part in whole:
        if part.kind == "call":
            function = {"name": part.name, "arguments": ""}
            calls.append({"id": part.id, "type": "function", "function": function})
        elif part.kind == "arguments":
            calls[part.index]["function"]["arguments"] += part.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        message[reasoning_field] = reasoning
    if calls:
        message["content"] = content or None
        message["tool_calls"] = calls
    return message


def delta_of(part: Part, reasoning_field: str) -> dict[str, Any]:
    """The `delta` of one part of a stream."""
    if part.kind == "content":
        return {"content": part.text}
    if part.kind == "reasoning":
        return {reasoning_field: part.text}
    if part.kind == "call":
        function = {"name": part.name, "arguments": ""}
        return {
            "tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]
        }
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


def usage_of(prompt_tokens: int, answers: Iterable[Answer]) -> dict[str, Any]:
    """The `usage` of a request: the prompt once, the answers all."""
    answers = list(answers)
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(a.reasoning_tokens for a in answers)},
    }
