"""Records to documents of token ids, a batch at a time.

Augmentation (a random system prompt, empty think blocks removed) has to be drawn afresh in every
epoch without tokenising again. So each conversation is stored in the renderings that can occur, at
most four, and the loader picks one by (seed, epoch, row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kllm.data.formats import ChatRecord, PreferenceRecord, RatedRecord, TextRecord
from kllm.data.messages import BadRow, Message, join_reasoning
from kllm.data.reasoning import ThinkOptions, place_empty, renders_empty
from kllm.errors import UserError
from kllm.tokenizer.chat import ChatEncoder, Encoded
from kllm.tokenizer.tokenizer import Tokenizer

Request = tuple[list[Message], list[Any] | None]  # messages and tools
Talk = ChatRecord | PreferenceRecord | RatedRecord

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


Rendering = tuple[NDArray[np.uint32], NDArray[np.uint8] | None]  # ids and mask


@dataclass
class Document:
    """One record as ids [n], with a mask [n] of trained tokens for conversations.

    renderings: the distinct forms; choice: which of them serves as plain, with a system prompt, without
    empty think blocks, with and without both; size: UTF-8 bytes of the record's text; cut: something
    of it was left out to fit; splits: of pairs, for each rendering the tokens of the shared beginning
    and of the chosen answer, the rejected one is the rest; good: the rating.
    """

    renderings: list[Rendering]
    size: int
    choice: tuple[int, int, int, int] = (0, 0, 0, 0)
    cut: bool = False
    splits: list[tuple[int, int]] | None = None
    good: bool | None = None


class TooLong(BadRow):
    """A record that does not fit seq_len and must not be cut: nothing is wrong with it."""


@dataclass(frozen=True)
class EncodeOptions:
    """What shapes the tokens of a conversation; see config's DatasetSection, and `reasoning` for `think`."""

    seq_len: int
    system_prompt_ratio: float = 0.0
    keep_empty_think: float = 1.0
    seed: int = 0
    think: ThinkOptions | None = None


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
    """A record on its way through the chat encoder: what is asked for each of its views.

    A view is the record as it is or with a system prompt added; it may take several conversations.
    """

    record: Any
    views: list[list[Request]] = field(default_factory=list)
    results: list[list[Encoded | BadRow]] = field(default_factory=list)
    bad: BadRow | None = None


@dataclass(frozen=True)
class Form:
    """One rendering of a record; see `Document`."""

    ids: NDArray[np.uint32]
    mask: NDArray[np.uint8]
    split: tuple[int, int] = (0, 0)


class ChatDocuments:
    """Conversations through the chat template, cut to `seq_len` at the end of a turn if need be."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        self._encoder = ChatEncoder(tokenizer)
        self._options = options
        self.drawn = 0 < options.system_prompt_ratio < 1 or 0 < options.keep_empty_think < 1
        self._knows_reasoning = "reasoning_content" in self._encoder.template
        # where the template writes it, its tokens are exactly those that a prompt without thinking has
        self._empty_in_field = self._knows_reasoning and renders_empty(self._encoder)
        self._empty_thinks = _empty_thinks(tokenizer)

    def __call__(self, records: Sequence[Any]) -> Iterator[Document | BadRow]:
        jobs = [self._job(record) for record in records]
        requests = [request for job in jobs for view in job.views for request in view]
        results = iter(encode_each(self._encoder, requests))
        for job in jobs:
            job.results = [[next(results) for _ in view] for view in job.views]
            try:
                yield self._document(job)
            except BadRow as bad:
                yield bad

    def _sides(self, record: Any) -> list[list[Message]]:
        """The conversations that a record takes."""
        return [record.messages]

    def _thinking(self, record: Talk) -> list[list[Message]]:
        """The record's conversations with their thinking as the options and the template want it."""
        sides, think = self._sides(record), self._options.think
        if think is not None:
            sides = think.apply(sides, asked(record), self._options.seed)
        sides = [place_empty(messages, self._empty_in_field) for messages in sides]
        return sides if self._knows_reasoning else [join_reasoning(messages) for messages in sides]

    def _job(self, record: Talk) -> _Job:
        ratio = self._options.system_prompt_ratio
        job = _Job(record)
        try:
            sides = self._thinking(record)
        except BadRow as bad:
            job.bad = bad
            return job
        free = sides[0][0]["role"] != "system" and not record.tools
        if ratio < 1 or not free:
            job.views.append([(messages, record.tools) for messages in sides])
        if ratio > 0 and free:
            prompt = SYSTEM_PROMPTS[_draw(asked(record), self._options.seed) % len(SYSTEM_PROMPTS)]
            system = {"role": "system", "content": prompt}
            job.views.append([([system, *messages], None) for messages in sides])
        return job

    def _document(self, job: _Job) -> Document:
        if job.bad is not None:
            raise job.bad
        forms: list[Form] = []
        columns: list[tuple[int, int]] = []  # (as it is, without empty think) of each view
        cut = False
        for number, (view, results) in enumerate(zip(job.views, job.results, strict=True)):
            try:
                plain, thoughtless, shortened = self._forms(view, results)
            except BadRow:
                if number:
                    continue  # only the added system prompt makes it too long: go without
                raise
            cut |= shortened and not number
            at = len(forms)
            forms.append(plain)
            if thoughtless is not None:
                forms.append(thoughtless)
            columns.append((at, len(forms) - 1))
        if self._options.keep_empty_think <= 0:
            columns = [(without, without) for _, without in columns]
        first, last = columns[0], columns[-1]
        choice = (first[0], last[0], first[1], last[1])
        used = sorted(set(choice))
        a, b, c, d = (used.index(number) for number in choice)
        size = sum(len(message["content"].encode("utf-8")) for message in words(job.record))
        some = [self._given(forms[number]) for number in used]
        document = Document([(form.ids, form.mask) for form in some], size, (a, b, c, d), cut)
        return self._labelled(document, job.record, some)

    def _given(self, form: Form) -> Form:
        """Empty think blocks are context, unless they are to be learned."""
        if self._options.think is None or self._options.think.train_empty:
            return form
        mask = form.mask.copy()
        for block in self._empty_thinks:
            mask[~_outside(form.ids, form.mask, block)] = 0
        return replace(form, mask=mask)

    def _labelled(self, document: Document, record: Any, forms: list[Form]) -> Document:
        """What a kind of record has besides its tokens."""
        return document

    def _forms(self, view: list[Request], results: list[Encoded | BadRow]) -> tuple[Form, Form | None, bool]:
        """(as rendered, without empty think blocks or None, whether it was cut)."""
        ids, mask = arrays(results[0])
        plain, shortened = _fit(ids, mask, self._options.seq_len)
        if self._options.keep_empty_think >= 1:
            return plain, None, shortened
        without = self._without_empty_think(ids, mask)
        if len(without[0]) == len(ids):
            return plain, None, shortened
        return plain, _fit(*without, self._options.seq_len)[0], shortened

    def _without_empty_think(self, ids: NDArray[np.uint32], mask: NDArray[np.uint8]) -> Arrays:
        keep = np.ones(len(ids), dtype=bool)
        for block in self._empty_thinks:
            keep &= _outside(ids, mask, block)
        return ids[keep], mask[keep]


Arrays = tuple[NDArray[np.uint32], NDArray[np.uint8]]  # ids and mask


def arrays(result: Encoded | BadRow) -> Arrays:
    """Ids and mask of an encoded conversation. Raises the BadRow that stands in its place."""
    if isinstance(result, BadRow):
        raise result
    return np.array(result.ids, dtype=np.uint32), np.array(result.mask, dtype=np.uint8)


def trained_end(mask: NDArray[np.uint8]) -> int:
    """The place after the last trained token: what follows can neither be learned nor help to learn."""
    trained = np.flatnonzero(mask)
    if not len(trained) or trained[-1] == 0:
        raise BadRow("no trained token: the template marks nothing of it as the assistant's")
    return int(trained[-1]) + 1


def _fit(ids: NDArray[np.uint32], mask: NDArray[np.uint8], seq_len: int) -> tuple[Form, bool]:
    """The conversation up to its last trained token, or up to the last turn that ends within seq_len.

    Where not even the first answer ends within it, as much of that answer as fits.
    """
    end = trained_end(mask)
    if end <= seq_len:
        return Form(ids[:end], mask[:end]), False
    trained = np.flatnonzero(mask)
    turn_ends = trained[np.flatnonzero(np.diff(trained, append=len(mask) + 1) > 1)] + 1
    fitting = turn_ends[turn_ends <= seq_len]
    if len(fitting):
        end = int(fitting[-1])
        return Form(ids[:end], mask[:end]), True
    prompt = int(trained[0])
    if prompt >= seq_len:
        raise BadRow(f"the prompt alone has {prompt} tokens, seq_len is {seq_len}")
    # the one answer that fits only in part is learned in part; it gets no end token, which would lie
    return Form(ids[:seq_len], mask[:seq_len]), True


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


def asked(record: Talk) -> list[Message]:
    """What decides on a record's side of the split and its system prompt: the prompt if it has one apart."""
    return record.messages if isinstance(record, ChatRecord) else record.prompt


def words(record: Talk) -> list[Message]:
    """All messages of a record."""
    if isinstance(record, ChatRecord):
        return record.messages
    if isinstance(record, RatedRecord):
        return [*record.prompt, *record.completion]
    return [*record.prompt, *record.chosen, *record.rejected]


def _draw(messages: list[Message], seed: int) -> int:
    """A number that depends on the conversation's words and the seed only."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=8)
    for message in messages:
        digest.update(message["content"].encode("utf-8"))
    return int.from_bytes(digest.digest(), "little")


def record_hash(record: TextRecord | Talk) -> int:
    """64 bits that depend on the content only: equal records fall on the same side of a split.

    Of pairs and rated answers only the prompt counts: a held-out prompt is never seen in training.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(record, TextRecord):
        digest.update(record.text.encode("utf-8"))
    else:
        for message in asked(record):
            for key in sorted(message):
                digest.update(f"{key}={message[key]}\0".encode("utf-8", "surrogatepass"))
        digest.update(repr(record.tools).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")
