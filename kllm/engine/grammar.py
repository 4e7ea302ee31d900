"""Constrained decoding: answers that obey a JSON schema, a regex, a list of choices or a grammar.

A `GrammarCompiler` (one per tokenizer) turns what a user asks for into a `Constraint`; each request takes
a `Matcher` from it, which follows the tokens drawn; `fill_masks` says for a whole batch what may come
next. The work is done by llguidance, which is imported only when the first grammar is compiled.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kllm.engine import grammar_text as text
from kllm.engine.grammar_native import bounded, build, native_masks
from kllm.engine.grammar_vocab import MAX_NEWLINES, Closer, Vocabulary
from kllm.errors import KllmError, UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from kllm.tokenizer.tokenizer import Tokenizer

_CACHED = 32


@dataclass(frozen=True, eq=False)
class Constraint:
    """A compiled grammar. Immutable; requests and threads share it.

    Attributes:
        vocabulary: the tokens it was compiled for.
        closer: what must have been generated before it holds; None if it holds from the start.
    """

    vocabulary: Vocabulary
    closer: Closer | None
    _fresh: LLMatcher = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def matcher(self) -> Matcher:
        """A matcher at the grammar's beginning."""
        with self._lock:  # the library's objects refuse two threads at a time
            return Matcher(self, self._fresh.deep_copy())


class Matcher:
    """Follows one answer through a grammar. One thread at a time.

    Attributes:
        active: False until the constraint's `closer` has been generated; until then any token but an end
            may come.
        stopped: the grammar is complete and allows nothing more; the answer ends without a stop token.
        error: why the grammar broke while matching, "" if it did not. A broken matcher allows only the end.
    """

    def __init__(self, constraint: Constraint, native: LLMatcher) -> None:
        self.vocabulary = constraint.vocabulary
        self.native = native
        self._closer = constraint.closer
        self.active = constraint.closer is None
        self.error = ""
        self.stopped = False
        self._tail = b""
        self._newlines: int | None = None if self.active else 0  # so far, until the grammar has begun

    def accept(self, token: int) -> None:
        """Takes the token that was drawn.

        Raises:
            KllmError: the grammar broke; `error` says how. The answer cannot go on.
        """
        if self.error or self.stopped:
            return
        if token in self.vocabulary.stops:
            self.stopped = True
        elif not self.active:
            self._wait(token)
        elif self._is_gap(token):
            self._newlines = (self._newlines or 0) + self.vocabulary.newlines[token]
        else:
            self._newlines = None
            if not self._consume(token):
                raise KllmError(self.error)
            self.stopped = self.native.is_stopped()

    def _consume(self, token: int) -> bool:
        try:
            if self.native.consume_token(token):
                return True
            self.fail(self.native.get_error())
        except BaseException as e:  # a panic of the library derives from BaseException
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            self.fail(str(e))
        return False

    def fail(self, message: str) -> None:
        """Marks the matcher as broken."""
        self.error = "the grammar cannot go on: " + (text.one_line(message) or "no token fits")

    def copy(self) -> Matcher:
        """An independent matcher in the same state."""
        twin = object.__new__(Matcher)
        twin.__dict__.update(self.__dict__)
        twin.native = self.native.deep_copy()
        return twin

    def adjust(self, row: np.ndarray) -> None:
        """Turns the native mask, bool [vocabulary.size], into this matcher's."""
        if self.error or self.stopped:
            row[:] = False
            row[list(self.vocabulary.stops)] = True
        elif self._closer is not None and not self.active:
            row[:] = True
            row[list(self.vocabulary.stops)] = False
            row[self._closer.barred(self._tail)] = False
        elif self._newlines is not None and self._newlines < MAX_NEWLINES:
            row[self.vocabulary.newline_ids(MAX_NEWLINES - self._newlines)] = True

    @property
    def needs_native(self) -> bool:
        """Whether the next mask comes from the grammar."""
        return self.active and not self.error and not self.stopped

    def _wait(self, token: int) -> None:
        assert self._closer is not None
        if not 0 <= token < self.vocabulary.size:
            return
        self._tail, newlines = self._closer.after(self._tail, token)
        if newlines is not None:
            self.active, self._newlines = True, newlines

    def _is_gap(self, token: int) -> bool:
        """Whether `token` is a line break between the closer and the grammar, and not the grammar's own."""
        count = self.vocabulary.newlines.get(token)
        if count is None or self._newlines is None or self._newlines + count > MAX_NEWLINES:
            return False
        return not self.native.validate_tokens([token])


def fill_masks(matchers: Sequence[Matcher], vocab: int) -> np.ndarray:
    """What may come next in each answer: bool [len(matchers), vocab], True = allowed.

    An end token is allowed only where the grammar may end. A matcher whose grammar breaks here gets an
    `error`, and its row allows only the end; the other rows are not touched by it. No row is all False.
    """
    size = matchers[0].vocabulary.size if matchers else vocab
    if any(m.vocabulary is not matchers[0].vocabulary for m in matchers):
        return np.concatenate([fill_masks([m], vocab) for m in matchers])
    rows = [i for i, m in enumerate(matchers) if m.needs_native]
    masks = np.zeros((len(matchers), size), np.bool_)
    if rows:
        live = [matchers[i] for i in rows]
        found = native_masks([m.native for m in live], size)
        for matcher, row in zip(live, found, strict=True):
            if matcher.native.is_error():
                matcher.fail(matcher.native.get_error())
            elif not row.any():
                matcher.fail("")
        if len(rows) == len(matchers):
            masks = found
        else:
            masks[rows] = found
    for matcher, row in zip(matchers, masks, strict=True):
        matcher.adjust(row)
    if vocab == size:
        return masks
    fitted = np.zeros((len(matchers), vocab), np.bool_)
    fitted[:, : min(size, vocab)] = masks[:, :vocab]
    return fitted


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe; keeps the latest ones.

    Args:
        tokenizer: of the model that will write.
        vocab_size: width of the model's logits; may exceed the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._closers: dict[str, Closer] = {}
        self._cache: OrderedDict[tuple[str, str, str | None], Constraint] = OrderedDict()

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as the grammars see it; built on first use (20 ms for 6,400 tokens, 0.6 s for 150k).

        Raises:
            UserError: llguidance is not installed, or a tokenizer it cannot work with (WordPiece).
        """
        with self._building:
            if self._vocabulary is None:
                try:
                    self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size)
                except ImportError as e:
                    hint = "pip install llguidance"
                    raise UserError("structured output needs the llguidance package", hint=hint) from e
            return self._vocabulary

    def json_schema(
        self, schema: Any, *, after: str | None = None, where: str = "response_format"
    ) -> Constraint:
        """A JSON value that is valid under `schema`, written without white space between its parts.

        Args:
            schema: a dict, or True for any value.
            after: text after which it holds, e.g. "</think>".
            where: the field of the request, for messages.

        Raises:
            UserError: a broken or unsupported schema, or one too large, deep or slow to compile.
        """
        return self._compile("json", text.schema_text(schema, where), after, where)

    def json_object(self, *, after: str | None = None, where: str = "response_format") -> Constraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, after=after, where=where)

    def regex(
        self, pattern: str, *, after: str | None = None, where: str = "structured_outputs.regex"
    ) -> Constraint:
        """A text that matches the whole pattern, in the syntax of Rust's regex crate.

        Raises:
            UserError: a broken pattern, or one with look-around or back-references.
        """
        pattern = text.ascii_classes(text.checked_text(pattern, where, text.MAX_SCHEMA))
        return self._compile("regex", pattern, after, where)

    def choice(
        self, options: list[str], *, after: str | None = None, where: str = "structured_outputs.choice"
    ) -> Constraint:
        """One of `options`, letter by letter.

        Raises:
            UserError: no options, an empty one, or more than a million characters.
        """
        return self._compile("regex", text.choice_pattern(options, where), after, where)

    def lark(
        self, grammar: str, *, after: str | None = None, where: str = "structured_outputs.grammar"
    ) -> Constraint:
        """A text of the user's grammar: llguidance's Lark, or llama.cpp's GBNF.

        Raises:
            UserError: a broken grammar, or one too large or slow to compile.
        """
        return self._compile("lark", text.lark_text(grammar, where), after, where)

    def tools(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        opener: str = "<tool_call>",
        closer: str = "</tool_call>",
        repeat: bool,
        after: str | None = None,
        where: str = "tools",
    ) -> Constraint:
        """A call of one of `tools`; with `repeat` one or more, a line break between them.

        A call is opener, line break, `{"name": "f", "arguments": {...}}`, line break, closer, spaced as
        `json.dumps` does it, its arguments valid under the tool's schema (`{}` if it has none). Markers
        are control tokens where the tokenizer has them.

        Raises:
            UserError: as `json_schema`; `where` then names the tool.
        """
        marks = [self._term(mark) for mark in (opener, closer)]
        lark = text.tools_lark(tools, *marks, repeat=repeat, where=where)
        try:
            return self._compile("lark", lark, after, where)
        except UserError:
            for i, tool in enumerate(tools):  # whose schema is it?
                if not text.takes_nothing(tool.get("parameters")):
                    self.json_schema(tool["parameters"], where=f"{where}[{i}].function.parameters")
            raise

    def _term(self, mark: str) -> str:
        token = self.vocabulary.control.get(mark)
        return text.lark_string(mark) if token is None else f"<[{token}]>"

    def _compile(self, kind: str, source: str, after: str | None, where: str) -> Constraint:
        key = (kind, source, after)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        vocabulary = self.vocabulary
        native = bounded(lambda: build(vocabulary, kind, source), where)
        constraint = Constraint(vocabulary, self._closer(after), native)
        with self._lock:
            self._cache[key] = constraint
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return constraint

    def _closer(self, after: str | None) -> Closer | None:
        if not after:
            return None
        with self._building:
            assert self._vocabulary is not None
            if after not in self._closers:
                self._closers[after] = Closer(after, self._vocabulary)
            return self._closers[after]
