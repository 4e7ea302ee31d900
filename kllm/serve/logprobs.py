"""Tokens and their log-probabilities as the API writes them.

Every token has one name: its text, or `bytes:\\xe4\\xbd` where its bytes are no UTF-8 by themselves, or
`token_id:7` where neither is its own (another token has the same bytes, or it has none). Names are unique
and reversible, so an object keyed by them loses no entry. Numbers are passed on as the engine computed
them: a client that compares the best one with the drawn token's finds them equal to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kllm.engine.params import TokenLogprob
    from kllm.tokenizer.pieces import StreamDecoder
    from kllm.tokenizer.tokenizer import Tokenizer

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""

_BYTES_NAME = re.compile(r"bytes:(?:\\x[0-9a-f]{2})+")
_ID_NAME = re.compile(r"token_id:(\d+)")


def token_name(tokenizer: Tokenizer, token_id: int, *, as_id: bool = False) -> str:
    """The name of a token.

    Args:
        tokenizer: gives the tokens their bytes.
        token_id: also one that the model has and the tokenizer has not.
        as_id: name it `token_id:7` whatever it is (vLLM's `return_tokens_as_token_ids`).
    """
    if as_id or not 0 <= token_id < tokenizer.vocab_size:
        return f"token_id:{token_id}"
    return _names(tokenizer)[0][token_id]


def token_of_name(tokenizer: Tokenizer, name: str) -> int | None:
    """The token that `token_name` gave this name, None if there is none."""
    found = _names(tokenizer)[1].get(name)
    match = _ID_NAME.fullmatch(name)
    return found if found is not None or match is None else int(match[1])


def number(logprob: float) -> float:
    """A log-probability that JSON can hold; every finite one above the floor stays as it is."""
    return logprob if logprob >= FLOOR else FLOOR  # NaN, too, is not above it


def chat_entry(
    tokenizer: Tokenizer, entry: TokenLogprob, *, shown: Collection[int] = (), as_ids: bool = False
) -> dict[str, Any]:
    """One item of a chat choice's `logprobs.content`.

    `token` is the token's text, with U+FFFD for bytes that are no character; `bytes` are those that it adds
    to the answer: none for a control token, which is not part of the text, unless it is among `shown`.
    """

    def item(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.bytes_of(token_id)
        text = data.decode("utf-8", "replace")
        hidden = token_id in _hidden(tokenizer) and token_id not in shown
        return {
            "token": token_name(tokenizer, token_id, as_id=True) if as_ids else text,
            "logprob": number(logprob),
            "bytes": [] if hidden else list(data),
        }

    top = [item(token_id, logprob) for token_id, logprob in entry.top]
    return {**item(entry.token_id, entry.logprob), "top_logprobs": top}


class CompletionLogprobs:
    """Writes the `logprobs` objects of one choice of /v1/completions, part after part.

    Args:
        tokenizer: the model's.
        as_ids: name tokens by their ids.
        prompt: what the answer continues; only its last tokens matter.
        start: characters of the text that are sent before the first token of `add`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, as_ids: bool = False, prompt: Sequence[int] = (), start: int = 0
    ) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids
        self._decoder = continuation(tokenizer, prompt)
        self._sent = start

    def add(self, entries: Iterable[TokenLogprob]) -> dict[str, list[Any]]:
        """The object for the next tokens of the answer."""
        part: dict[str, list[Any]] = empty()
        for entry in entries:
            behind, fresh = _place(self._tokenizer, entry.token_id, self._decoder)
            self._append(part, entry.token_id, entry, self._sent + behind)
            self._sent += len(fresh)
        return part

    def prompt(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None], text: str) -> dict[str, Any]:
        """The object for an echoed prompt; its first token has null for its numbers.

        Args:
            ids: the prompt's tokens.
            entries: one for each of them, None for the first.
            text: the prompt as it is sent.
        """
        part: dict[str, list[Any]] = empty()
        offsets = text_offsets(self._tokenizer, ids, text)
        for token_id, entry, at in zip(ids, entries, offsets, strict=True):
            self._append(part, token_id, entry, at)
        return part

    def _append(self, part: dict[str, list[Any]], token_id: int, entry: TokenLogprob | None, at: int) -> None:
        name = self._name(token_id)
        part["tokens"].append(name)
        part["text_offset"].append(at)
        part["token_logprobs"].append(None if entry is None else number(entry.logprob))
        top = None
        if entry is not None:
            top = {self._name(other): number(logprob) for other, logprob in entry.top}
            top.setdefault(name, number(entry.logprob))
        part["top_logprobs"].append(top)

    def _name(self, token_id: int) -> str:
        return token_name(self._tokenizer, token_id, as_id=self._as_ids)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int]) -> StreamDecoder:
    """A decoder for what follows `prompt`: it keeps a space at the start, but no half of a character."""
    decoder = tokenizer.stream_decoder(prompt=prompt[-16:])
    decoder.flush()
    return decoder


def empty() -> dict[str, list[Any]]:
    """The object for no tokens."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Two parts of a choice's object as one."""
    return {key: first[key] + second[key] for key in first}


def text_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Where in `text` each of its tokens begins, in characters.

    Control tokens may be part of the text or not; where the text is not what its tokens decode to (a
    normaliser changed it), the places are those of the decoded text, as far as the text goes.
    """
    offsets: list[int] = []
    for skip in (False, True):
        decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
        offsets, parts, sent = [], [], 0
        for token_id in ids:
            behind, fresh = _place(tokenizer, token_id, decoder)
            offsets.append(sent + behind)
            parts.append(fresh)
            sent += len(fresh)
        decoded = "".join(parts)
        if text in (decoded, decoded + decoder.flush()):
            return offsets
    return [min(at, len(text)) for at in offsets]


def _place(tokenizer: Tokenizer, token_id: int, decoder: StreamDecoder) -> tuple[int, str]:
    """(where in the fresh text the token begins, the fresh text)."""
    fresh = decoder.put(token_id)
    own = tokenizer.bytes_of(token_id).decode("utf-8", "replace")
    # A broken character before this token comes out with it, in front of the token's own text.
    ends = own and "\ufffd" not in own and fresh.endswith(own)
    return len(fresh) - len(own) if ends else 0, fresh


@lru_cache(maxsize=16)
def _hidden(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.special_tokens.values())


@lru_cache(maxsize=16)
def _names(tokenizer: Tokenizer) -> tuple[list[str], dict[str, int]]:
    """The name of every id, and back."""
    names: list[str] = []
    taken: dict[str, int] = {}
    added = set(tokenizer.added_tokens.values())
    order = sorted(range(tokenizer.vocab_size), key=lambda i: (i not in added, _byte_token(tokenizer, i)))
    names = [""] * tokenizer.vocab_size
    for token_id in order:
        data = tokenizer.bytes_of(token_id)
        name = next((n for n in (_text(data), _escaped(data)) if n and n not in taken), None)
        names[token_id] = name or f"token_id:{token_id}"
        taken[names[token_id]] = token_id
    return names, taken


def _byte_token(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether it is a fallback byte such as `<0x41>`: the token written as text has the text as its name."""
    token = tokenizer.id_to_token(token_id) or ""
    return len(token) == 6 and token.startswith("<0x")


def _text(data: bytes) -> str:
    """The text of bytes, "" if they are no UTF-8 or would look like another kind of name."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if _BYTES_NAME.fullmatch(text) or _ID_NAME.fullmatch(text) else text


def _escaped(data: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if data else ""
