"""Records to documents of token ids, a batch at a time.

Augmentation (a random system prompt, empty think blocks removed) has to be drawn afresh in every
epoch without tokenising again. So each conversation is stored in the renderings that can occur, at
most four, and the loader picks one by (seed, epoch, row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kllm.data.formats import ChatRecord, TextRecord
from kllm.data.messages import BadRow, Message, join_reasoning
from kllm.errors import UserError
from kllm.tokenizer.chat import ChatEncoder, Encoded
from kllm.tokenizer.tokenizer import Tokenizer

Request = tuple[list[Message], list[Any] | None]  # messages and tools

_PIECE = 100_000  # characters of a text that are tokenised at once
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a small language model that answers questions clearly and honestly.",
    "Answer the user's questions. Say so when you do not know.",
    "You are a friendly assistant. Keep answers short and correct.",
    "You are kllm, an assistant that speaks Chinese and English.",
    "你是一个乐于助人的助手。",
    "你是一个小型语言模型，请清楚、诚实地回答问题。",
    "请回答用户的问题，不知道时直说不知道。",
    "你是一个友好的助手，回答简短而准确。",
    "你是 kllm，一个会说中文和英文的助手。",
)


@dataclass
class Document:
    """One record as ids [n], with a mask [n] of trained tokens for conversations.

    renderings: the distinct forms; choice: which of them serves as plain, with a system prompt, without
    empty think blocks, with and without both; size: UTF-8 bytes of the record's text.
    """

    renderings: list[tuple[NDArray[np.uint32], NDArray[np.uint8] | None]]
    size: int
    choice: tuple[int, int, int, int] = (0, 0, 0, 0)
    cut: bool = False


@dataclass(frozen=True)
class EncodeOptions:
    """What shapes the tokens of a conversation; see config's DatasetSection."""

    seq_len: int
    system_prompt_ratio: float = 0.0
    keep_empty_think: float = 1.0
    seed: int = 0


class Encoder(Protocol):
    """Records of one kind to documents; `drawn` if a document may have several renderings."""

    drawn: bool

    def __call__(self, records: Sequence[Any]) -> Iterator[Document | BadRow]: ...


class TextEncoder:
    """Documents of plain text: [beginning-of-text if the tokenizer itself puts one] ids [end-of-text].

    The end-of-text token stands only where the document really ends.
    """

    drawn = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        around = tokenizer.encode_raw("", add_special_tokens=True)
        self._head = [tokenizer.bos_token_id] if tokenizer.bos_token_id in around[:1] else []

    def __call__(self, records: Sequence[TextRecord]) -> Iterator[Document | BadRow]:
        pieces = [list(_pieces(record.text)) for record in records]
        encoded = iter(self._tokenizer.encode_batch(list(chain.from_iterable(pieces))))
        for record, parts in zip(records, pieces, strict=True):
            ids = list(self._head)
            for _ in parts:
                ids += next(encoded)
            if record.last:
                ids.append(self._tokenizer.eot_token_id)
            if len(ids) < 2:
                yield BadRow("no token to learn")
            else:
                yield Document([(np.array(ids, dtype=np.uint32), None)], len(record.text.encode("utf-8")))


def _pieces(text: str) -> Iterator[str]:
    """Long texts in parts, so that the tokenizer's memory stays bounded; cut before a line or a space."""
    at = 0
    while len(text) - at > _PIECE:
        cut = max(text.rfind("\n", at + 1, at + _PIECE), text.rfind(" ", at + _PIECE // 2, at + _PIECE))
        cut = cut if cut > at else at + _PIECE
        yield text[at:cut]
        at = cut
    yield text[at:]


def encode_each(encoder: ChatEncoder, requests: Sequence[Request]) -> list[Encoded | BadRow]:
    """Conversations as ids and mask, a BadRow in the place of those that the template refuses."""
    try:
        return list(encoder.encode_batch(requests))
    except (UserError, ValueError, TypeError) as error:
        if len(requests) == 1:
            return [BadRow(f"the chat template refuses it: {str(error).splitlines()[0]}")]
        return [result for request in requests for result in encode_each(encoder, [request])]


@dataclass
class _Job:
    """A conversation on its way through the chat encoder: the requests made for it."""

    record: ChatRecord
    requests: list[Request] = field(default_factory=list)
    results: list[Encoded | BadRow] = field(default_factory=list)


class ChatDocuments:
    """Conversations through the chat template, cut to `seq_len` at the end of a turn if need be."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        self._encoder = ChatEncoder(tokenizer)
        self._options = options
        self.drawn = 0 < options.system_prompt_ratio < 1 or 0 < options.keep_empty_think < 1
        self._knows_reasoning = "reasoning_content" in self._encoder.template
        self._empty_thinks = _empty_thinks(tokenizer)

    def __call__(self, records: Sequence[ChatRecord]) -> Iterator[Document | BadRow]:
        jobs = [self._job(record) for record in records]
        requests = [request for job in jobs for request in job.requests]
        results = iter(encode_each(self._encoder, requests))
        for job in jobs:
            job.results = [next(results) for _ in job.requests]
            try:
                yield self._document(job)
            except BadRow as bad:
                yield bad

    def _job(self, record: ChatRecord) -> _Job:
        messages = record.messages if self._knows_reasoning else join_reasoning(record.messages)
        ratio = self._options.system_prompt_ratio
        job = _Job(record)
        free = messages[0]["role"] != "system" and not record.tools
        if ratio < 1 or not free:
            job.requests.append((messages, record.tools))
        if ratio > 0 and free:
            prompt = SYSTEM_PROMPTS[_draw(record, self._options.seed) % len(SYSTEM_PROMPTS)]
            job.requests.append(([{"role": "system", "content": prompt}, *messages], None))
        return job

    def _document(self, job: _Job) -> Document:
        size = sum(len(message["content"].encode("utf-8")) for message in job.record.messages)
        renderings: list[tuple[NDArray[np.uint32], NDArray[np.uint8] | None]] = []
        columns: list[tuple[int, int]] = []  # (as it is, without empty think) of each request
        cut = False
        for number, result in enumerate(job.results):
            try:
                plain, thoughtless, shortened = self._forms(result)
            except BadRow:
                if number:
                    continue  # only the added system prompt makes it too long: go without
                raise
            cut |= shortened and not number
            at = len(renderings)
            renderings.append(plain)
            if thoughtless is not None:
                renderings.append(thoughtless)
            columns.append((at, len(renderings) - 1))
        if self._options.keep_empty_think <= 0:
            columns = [(without, without) for _, without in columns]
        first, last = columns[0], columns[-1]
        choice = (first[0], last[0], first[1], last[1])
        used = sorted(set(choice))
        a, b, c, d = (used.index(number) for number in choice)
        return Document([renderings[number] for number in used], size, (a, b, c, d), cut)

    def _forms(self, result: Encoded | BadRow) -> tuple[Any, Any, bool]:
        """(as rendered, without empty think blocks or None, whether it was cut)."""
        if isinstance(result, BadRow):
            raise result
        ids = np.array(result.ids, dtype=np.uint32)
        mask = np.array(result.mask, dtype=np.uint8)
        plain, shortened = _fit(ids, mask, self._options.seq_len)
        if self._options.keep_empty_think >= 1:
            return plain, None, shortened
        keep = np.ones(len(ids), dtype=bool)
        for block in self._empty_thinks:
            keep &= _outside(ids, mask, block)
        if keep.all():
            return plain, None, shortened
        return plain, _fit(ids[keep], mask[keep], self._options.seq_len)[0], shortened


def _fit(
    ids: NDArray[np.uint32], mask: NDArray[np.uint8], seq_len: int
) -> tuple[tuple[NDArray[np.uint32], NDArray[np.uint8]], bool]:
    """The conversation up to its last trained token, or up to the last turn that ends within seq_len.

    Where not even the first answer ends within it, as much of that answer as fits.

    What follows the last trained token can neither be learned nor help to learn, so it is left out.
    """
    trained = np.flatnonzero(mask)
    if not len(trained) or trained[-1] == 0:
        raise BadRow("no trained token: the template marks nothing of it as the assistant's")
    end = int(trained[-1]) + 1
    if end <= seq_len:
        return (ids[:end], mask[:end]), False
    turn_ends = trained[np.flatnonzero(np.diff(trained, append=len(mask) + 1) > 1)] + 1
    fitting = turn_ends[turn_ends <= seq_len]
    if len(fitting):
        end = int(fitting[-1])
        return (ids[:end], mask[:end]), True
    prompt = int(trained[0])
    if prompt >= seq_len:
        raise BadRow(f"the prompt alone has {prompt} tokens, seq_len is {seq_len}")
    # the one answer that fits only in part is learned in part; it gets no end token, which would lie
    return (ids[:seq_len], mask[:seq_len]), True


def _empty_thinks(tokenizer: Tokenizer) -> list[NDArray[np.uint32]]:
    """The ids that `<think>\\n\\n</think>\\n\\n` can have.

    Two, if the tokenizer cuts a blank line otherwise when words follow it (GPT-2's rule does).
    """
    added = tokenizer.added_tokens
    words = tokenizer.encode("so")
    forms: dict[tuple[int, ...], None] = {}
    for text, after in (("\n\n", 0), ("\n\nso", len(words))):
        if "<think>" in added and "</think>" in added:
            inside = [added["<think>"], *tokenizer.encode("\n\n"), added["</think>"]]
            ids = [*inside, *tokenizer.encode(text)]
        else:
            ids = tokenizer.encode(f"<think>\n\n</think>{text}")
        if ids[len(ids) - after :] == words[:after]:
            forms[tuple(ids[: len(ids) - after])] = None
    return [np.array(form, dtype=np.uint32) for form in forms]


def _outside(
    ids: NDArray[np.uint32], mask: NDArray[np.uint8], block: NDArray[np.uint32]
) -> NDArray[np.bool_]:
    """True [n] where no trained occurrence of `block` stands."""
    keep = np.ones(len(ids), dtype=bool)
    if len(block) > len(ids):
        return keep
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(block))
    for start in np.flatnonzero((windows == block).all(axis=1)):
        if mask[start : start + len(block)].all():
            keep[start : start + len(block)] = False
    return keep


def _draw(record: ChatRecord, seed: int) -> int:
    """A number that depends on the conversation's words and the seed only."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=8)
    for message in record.messages:
        digest.update(message["content"].encode("utf-8"))
    return int.from_bytes(digest.digest(), "little")


def record_hash(record: TextRecord | ChatRecord) -> int:
    """64 bits that depend on the record's content only: equal records fall on the same side of a split."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(record, TextRecord):
        digest.update(record.text.encode("utf-8"))
    else:
        for message in record.messages:
            for key in sorted(message):
                digest.update(f"{key}={message[key]}\0".encode("utf-8", "surrogatepass"))
        digest.update(repr(record.tools).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")
