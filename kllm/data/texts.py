"""Every text of a record, whatever its dialect: what a tokenizer learns from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

from kllm.data.formats import (
    KIND,
    ChatRecord,
    PreferenceRecord,
    PromptRecord,
    RatedRecord,
    TextRecord,
    detect,
    normalise,
)
from kllm.data.messages import BadRow, Message
from kllm.data.sources import expand, iter_records

STREAMS = 16  # files read side by side; more are read one after another in as many rows


class Weighted(Protocol):
    """A source and its share (`kllm.config.parts.DataSource`)."""

    @property
    def path(self) -> str: ...

    @property
    def weight(self) -> float: ...


def all_texts(obj: Any) -> Iterator[str]:
    """The texts of one raw record; a row that cannot be read gives none (training will report it)."""
    with contextlib.suppress(BadRow):
        record = normalise(obj, KIND[detect(obj)])
        if isinstance(record, TextRecord):
            yield record.text
        elif isinstance(record, ChatRecord | PromptRecord):
            yield from _messages(record.messages)
        elif isinstance(record, PreferenceRecord):
            yield from _messages([*record.prompt, *record.chosen, *record.rejected])
        elif isinstance(record, RatedRecord):
            yield from _messages([*record.prompt, *record.completion])


def _messages(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        for key in ("reasoning_content", "content"):
            if isinstance(message.get(key), str) and message[key]:
                yield message[key]
        for call in message.get("tool_calls") or []:
            yield json.dumps(call.get("function", call), ensure_ascii=False)


def mixed_texts(sources: Sequence[Weighted]) -> Iterator[str]:
    """All texts of all sources, side by side by weight, a source's files by their size.

    So that whoever stops reading early (a tokenizer's cap) has seen every source and file.
    """
    shares: list[float] = []
    streams: list[Iterator[str]] = []
    for source in sources:
        files = [(str(f), f.stat().st_size) for f in expand(source.path)]
        if len(files) < 2:
            files = [(source.path, 1)]
        # the largest lead the streams: none has to wait behind small ones
        files = sorted(((name, size) for name, size in files if size), key=lambda f: (-f[1], f[0]))
        bytes_ = sum(size for _, size in files)
        for i in range(min(STREAMS, len(files))):
            part = files[i::STREAMS]
            shares.append(source.weight * sum(size for _, size in part) / bytes_)
            streams.append(chain.from_iterable(_file_texts(name) for name, _ in part))
    taken, total, texts = [0.0] * len(streams), 0.0, 0
    live = list(range(len(streams)))
    while live:
        # who would be least ahead of its share after one more text of the usual length
        usual = total / texts if texts else 1.0
        ahead = [(taken[k] + usual) / shares[k] for k in live]
        i = live[ahead.index(min(ahead))]
        text = next(streams[i], None)
        if text is None:
            live.remove(i)
            continue
        taken[i], total, texts = taken[i] + len(text), total + len(text), texts + 1
        yield text


def _file_texts(path: str) -> Iterator[str]:
    for _, record in iter_records(path):
        yield from all_texts(record)
