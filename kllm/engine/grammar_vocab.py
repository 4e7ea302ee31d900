"""A tokenizer as llguidance sees it, and the text that must come before a grammar starts.

Control tokens are marked special, so no free string can contain one; a grammar names them by id. Text
that a grammar forces is cut into tokens by the tokenizer itself, as plain text.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kllm.errors import UserError

if TYPE_CHECKING:
    from kllm.tokenizer.tokenizer import Tokenizer

_FORCED_CHARS = 1024  # only the first token of forced text is used, so a long text is cut
MAX_NEWLINES = 2
"""Line breaks allowed between the closing marker and the grammar, as chat formats write them."""


class Vocabulary:
    """The tokens of a model.

    Args:
        tokenizer: gives the bytes of each token and cuts text.
        size: width of the model's logits; ids beyond the tokenizer's own stand for nothing.

    Attributes:
        tokens: the bytes of each id, b"" for those that can never be part of a text.
        control: ids of the control tokens (special or not): never part of a free text.
        stops: ids that end an answer, the end token first.

    Raises:
        UserError: a tokenizer whose text is not its tokens' bytes put together (WordPiece).
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        import llguidance

        self.tokenizer, self.size = tokenizer, size
        self.control = {text: i for text, (i, _, _) in tokenizer.control_tokens.items() if i < size}
        self.stops = tuple(i for i in tokenizer.stop_token_ids if i < size)
        self.tokens = [tokenizer.bytes_of(i) for i in range(size)]
        for i, piece in enumerate(self.tokens):
            if piece[:1] == b"\xff":  # never in UTF-8, and the library's mark of special tokens
                self.tokens[i] = b""
        self._check_spelling()
        wrapper = cast(Any, _Wrapper(self))  # the library's own class adds nothing
        self.native = llguidance.LLTokenizer(wrapper, n_vocab=size, eos_token=list(self.stops))

    def cut(self, text: str) -> list[int]:
        """Ids of a plain text whose bytes are exactly the text's (SentencePiece adds a space in front)."""
        data = text.encode()
        ids = self.tokenizer.encode(text)
        if self._spells(ids, data):
            return ids
        marked = self.tokenizer.encode("\n" + text)
        for start in (1, 2):
            if self._spells(marked[start:], data):
                return marked[start:]
        return self._greedy(data)

    @cached_property
    def text_ids(self) -> dict[bytes, int]:
        """Bytes -> id of the ordinary tokens; the lowest id where several are spelled alike."""
        control = set(self.control.values())
        ids = (i for i in range(self.size - 1, -1, -1) if i not in control)
        return {self.tokens[i]: i for i in ids if self.tokens[i]}

    @cached_property
    def newlines(self) -> dict[int, int]:
        """The ordinary tokens of one or two line breaks: id -> how many."""
        control = set(self.control.values())
        kinds = {b"\n" * n: n for n in range(1, MAX_NEWLINES + 1)}
        return {i: kinds[t] for i, t in enumerate(self.tokens) if t in kinds and i not in control}

    def newline_ids(self, most: int) -> np.ndarray:
        """Ids of tokens of at most `most` line breaks."""
        return np.array([i for i, n in self.newlines.items() if n <= most], dtype=np.int64)

    def _check_spelling(self) -> None:
        ids = self.tokenizer.encode("one two, three")  # also builds the plain-text half outside a compilation
        spelled = b"".join(self.tokenizer.bytes_of(i) for i in ids).decode("utf-8", "replace")
        if spelled.strip() != self.tokenizer.decode(ids).strip():
            raise UserError("structured output needs a byte-level or SentencePiece tokenizer")

    def _spells(self, ids: list[int], data: bytes) -> bool:
        return all(i < self.size for i in ids) and b"".join(self.tokens[i] for i in ids) == data

    def _greedy(self, data: bytes) -> list[int]:
        """Longest tokens from the left; stops at a byte that no token stands for."""
        ids: list[int] = []
        longest = max(map(len, self.text_ids), default=1)
        at = 0
        while at < len(data):
            for end in range(min(at + longest, len(data)), at, -1):
                found = self.text_ids.get(data[at:end])
                if found is not None:
                    break
            else:
                return ids
            ids.append(found)
            at = end
        return ids


class _Wrapper:
    """The attributes that llguidance reads from a tokenizer written in Python."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.stops[0]
        self.bos_token_id: int | None = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.control.values())
        self._cut = vocabulary.cut

    def __call__(self, text: str) -> list[int]:
        return self._cut(text[:_FORCED_CHARS])


class Closer:
    """Recognises the text (e.g. `</think>`) after which a grammar starts. Immutable.

    Where the tokenizer has the text as one control token only that token counts, and the same text in
    ordinary tokens is kept from being completed, so that a reader of ids and one of text agree. Tokens that
    complete the text and go on with more than line breaks are kept out too: the grammar starts with a
    token of its own.
    """

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        self.data = text.encode()
        self.token = vocabulary.control.get(text)
        self._vocabulary = vocabulary
        self._barred = self._bars()

    def barred(self, tail: bytes) -> np.ndarray:
        """Ids that must not come after text that ends with `tail`."""
        longest = min(len(tail), len(self.data) - 1)
        open_ = [n for n in range(1, longest + 1) if tail.endswith(self.data[:n])]
        return np.concatenate([self._barred[n] for n in (0, *open_)])

    def after(self, tail: bytes, token: int) -> tuple[bytes, int | None]:
        """Takes one more token.

        Returns:
            (the new tail, how many line breaks follow the closing text; None if it has not come yet).
        """
        if self.token is not None:
            if token == self.token:
                return b"", 0
            piece = b"" if token in self._special else self._vocabulary.tokens[token]
            return (tail + piece)[-len(self.data) :], None
        text = tail + self._vocabulary.tokens[token]
        at = text.find(self.data)
        if at < 0:
            return text[-len(self.data) + 1 :] if len(self.data) > 1 else b"", None
        return b"", text[at + len(self.data) :].count(b"\n")

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._vocabulary.control.values())

    def _bars(self) -> list[np.ndarray]:
        """For each count of bytes of the text that have come: the ids that must not follow."""
        goal = self.data
        clean = () if self.token is not None else tuple(b"\n" * n for n in range(MAX_NEWLINES + 1))
        barred: list[list[int]] = [[] for _ in goal]
        firsts = {goal[k : k + 1] for k in range(1, len(goal))}
        for i, piece in enumerate(self._vocabulary.tokens):
            if i in self._special:
                continue
            if (
                len(piece) >= len(goal)
                and (at := piece.find(goal)) >= 0
                and piece[at + len(goal) :] not in clean
            ):
                barred[0].append(i)
            if piece[:1] in firsts:
                for k in range(1, len(goal)):
                    rest = goal[k:]
                    if piece.startswith(rest) and piece[len(rest) :] not in clean:
                        barred[k].append(i)
        return [np.array(ids, dtype=np.int64) for ids in barred]
