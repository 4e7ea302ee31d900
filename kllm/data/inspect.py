"""What is in a data file, as a model would see it: for `kllm data inspect`."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kllm.data.build import BATCH_CHARS, BATCH_DOCS, KEPT_BAD_ROWS, record_size
from kllm.data.encode import EncodeOptions, encode_each
from kllm.data.encode_pairs import encoder_for, sections
from kllm.data.formats import (
    KIND,
    ChatRecord,
    PreferenceRecord,
    PromptRecord,
    RatedRecord,
    Record,
    TextRecord,
    Want,
    detect,
    normalise,
)
from kllm.data.messages import BadRow, Message, join_reasoning
from kllm.data.sources import expand, iter_records
from kllm.errors import UserError
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.tokenizer import Tokenizer

WHOLE = 1 << 40  # a seq_len that every conversation fits
PARTS = ("prompt", "chosen", "rejected")
LIMITS = (256, 512, 1024, 2048, 4096)
SAMPLE_TOKENS = 1024

Part = tuple[str, list[int], list[bool]]  # name ("" unless it is of a pair), ids, mask


@dataclass
class _Seen:
    """What has been counted so far."""

    dialects: Counter[str] = field(default_factory=Counter)
    bad: list[dict[str, str]] = field(default_factory=list)
    bad_count: int = 0
    rows: int = 0
    kind: Want | None = None
    chars: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    trained: int = 0
    good: int = 0
    parts: dict[str, array[int]] = field(default_factory=lambda: {name: array("q") for name in PARTS})
    sample: dict[str, Any] | None = None

    def refuse(self, where: str, reason: str) -> None:
        self.bad_count += 1
        if len(self.bad) < KEPT_BAD_ROWS:
            self.bad.append({"where": where, "reason": reason})


def inspect_file(
    path: str | Path, tokenizer: Tokenizer | None = None, *, rows: int | None = None, sample: int = 0
) -> dict[str, Any]:
    """Reads a source once and tells what is in it.

    Args:
        path: any source that `sources.iter_records` takes.
        tokenizer: with it lengths are in tokens and the sample has ids and mask.
        rows: read at most this many rows.
        sample: which good row to show, from 0.

    Returns:
        path, files (list of names), kind (text, chat, preference, rated or prompt, by the first good row),
        dialects {name: rows}, rows (good ones), complete (False if `rows` stopped it),
        bad_rows (count), bad (list of {where, reason}, the first 100),
        chars {total, mean, min, p50, p90, p99, max}, tokens (alike, or None without a tokenizer),
        trained_tokens, unit ("tokens" or "chars"), histogram (list of {low, high, rows}, in `unit`),
        fits {length: share of rows no longer than it, in `unit`}; the length of a pair is its longer side's,
        pairs (None for other kinds) {prompt, chosen, rejected (spreads like chars, in `unit`), chosen_longer
        (share of the pairs), saved (share of the tokens that are computed once for both sides, not twice)},
        good (share of the ratings; None for other kinds),
        sample {where, dialect, text, messages, ids, mask, pieces (the text of each id), truncated,
        sections} or None; ids, mask and pieces are [] without a tokenizer. The mask is True on trained
        tokens. sections (of pairs) lists {name: prompt, chosen or rejected, messages, ids, mask, pieces}.

    Raises:
        UserError: nothing there to read, or no row that can be understood.
    """
    seen = _Seen()
    read = 0
    complete = True
    batch: list[tuple[str, str, Record]] = []
    size = 0
    encoder = _Encoder(tokenizer) if tokenizer is not None else None
    for where, value in iter_records(path, on_bad=seen.refuse):
        if rows is not None and read >= rows:
            complete = False
            break
        read += 1
        found = _normalised(seen, where, value)
        if found is None:
            continue
        batch.append((where, *found))
        size += _chars(found[1])
        if len(batch) >= BATCH_DOCS or size >= BATCH_CHARS:
            _count(seen, batch, encoder, sample)
            batch, size = [], 0
    _count(seen, batch, encoder, sample)
    if not seen.rows:
        first = seen.bad[0] if seen.bad else {"where": str(path), "reason": "there are no records"}
        raise UserError(f"no row can be used; the first: {first['reason']}", first["where"])
    return _report(str(path), seen, complete)


def _normalised(seen: _Seen, where: str, value: Any) -> tuple[str, Record] | None:
    try:
        dialect = detect(value)
        kind = seen.kind or KIND[dialect]
        record = normalise(value, kind, dialect)
    except BadRow as error:
        seen.refuse(where, str(error))
        return None
    seen.kind = kind
    return dialect, record


def _as_chat(record: Record) -> ChatRecord:
    """The record as one conversation; of a pair, the better half. Texts have none."""
    if isinstance(record, ChatRecord):
        return record
    if isinstance(record, TextRecord):
        return ChatRecord([])
    if isinstance(record, PreferenceRecord):
        return ChatRecord([*record.prompt, *record.chosen], record.tools)
    if isinstance(record, RatedRecord):
        return ChatRecord([*record.prompt, *record.completion], record.tools)
    return ChatRecord(record.messages, record.tools)


def _chars(record: Record) -> int:
    return record_size(record if isinstance(record, TextRecord) else _as_chat(record))


def _messages(record: PreferenceRecord, name: str) -> list[Message]:
    messages: list[Message] = getattr(record, name)
    return messages


class _Encoder:
    """Ids and mask of any record, in parts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._chat: ChatEncoder | None = None

    def __call__(self, records: list[Record]) -> Iterator[list[Part] | BadRow]:
        kind = type(records[0]) if records else TextRecord
        if kind in (TextRecord, PreferenceRecord, RatedRecord):
            yield from self._documents(records, kind)
            return
        if self._chat is None:
            self._chat = ChatEncoder(self.tokenizer)
        chat = self._chat
        requests = [(_shown(record, chat.template), _as_chat(record).tools) for record in records]
        if kind is PromptRecord:
            prompts = [chat.prompt(messages, tools) for messages, tools in requests]
            yield from ([("", ids, [False] * len(ids))] for ids in prompts)
        else:
            for result in encode_each(chat, requests):
                yield result if isinstance(result, BadRow) else [("", result.ids, result.mask)]

    def _documents(self, records: list[Record], kind: type) -> Iterator[list[Part] | BadRow]:
        """As they are stored for training."""
        name = {PreferenceRecord: "preference", RatedRecord: "rated"}.get(kind, "text")
        encode = encoder_for(name, self.tokenizer, EncodeOptions(WHOLE))
        for found in encode(records):
            if isinstance(found, BadRow):
                yield found
            else:
                yield [
                    (part, ids.tolist(), mask.astype(bool).tolist()) for part, ids, mask in sections(found)
                ]


def _shown(record: Record, template: str) -> list[Message]:
    messages = _as_chat(record).messages
    return messages if "reasoning_content" in template else join_reasoning(messages)


def _count(seen: _Seen, batch: list[tuple[str, str, Record]], encoder: _Encoder | None, sample: int) -> None:
    results = encoder([record for _, _, record in batch]) if encoder else iter([[]] * len(batch))
    for (where, dialect, record), parts in zip(batch, results, strict=True):
        if isinstance(parts, BadRow):
            seen.refuse(where, str(parts))
            continue
        if seen.rows == sample or seen.sample is None:
            seen.sample = _sample(where, dialect, record, parts, encoder)
        seen.rows += 1
        seen.dialects[dialect] += 1
        seen.chars.append(_chars(record))
        if isinstance(record, PreferenceRecord):
            sizes = {name: len(ids) for name, ids, _ in parts} if parts else _part_chars(record)
            for name in PARTS:
                seen.parts[name].append(sizes[name])
        elif isinstance(record, RatedRecord):
            seen.good += record.good
        if encoder is not None:
            lengths = [len(ids) for _, ids, _ in parts]
            seen.tokens.append(lengths[0] + max(lengths[1:], default=0))
            seen.trained += sum(sum(mask) for _, _, mask in parts)


def _part_chars(record: PreferenceRecord) -> dict[str, int]:
    return {name: record_size(ChatRecord(_messages(record, name))) for name in PARTS}


def _sample(
    where: str, dialect: str, record: Record, parts: list[Part], encoder: _Encoder | None
) -> dict[str, Any]:
    text = record.text if isinstance(record, TextRecord) else ""
    shown = [_shown_part(*part, encoder) for part in parts]
    whole = {key: [item for part in shown for item in part[key]] for key in ("ids", "mask", "pieces")}
    found = {
        "where": where,
        "dialect": dialect,
        "text": text[: 4 * SAMPLE_TOKENS],
        "messages": _as_chat(record).messages,
        **whole,
        "truncated": any(len(ids) > SAMPLE_TOKENS for _, ids, _ in parts) or len(text) > 4 * SAMPLE_TOKENS,
        "sections": [],
    }
    if isinstance(record, PreferenceRecord):
        shown = shown or [_shown_part(name, [], [], None) for name in PARTS]
        found["sections"] = [{**part, "messages": _messages(record, part["name"])} for part in shown]
    return found


def _shown_part(name: str, ids: list[int], mask: list[bool], encoder: _Encoder | None) -> dict[str, Any]:
    ids = ids[:SAMPLE_TOKENS]
    pieces = token_texts(encoder.tokenizer, ids) if encoder else []
    return {"name": name, "ids": ids, "mask": mask[:SAMPLE_TOKENS], "pieces": pieces}


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each id adds; a character spread over several ids belongs to the last of them."""
    decoder = tokenizer.stream_decoder(skip_special_tokens=False)
    pieces = [decoder.put(number) for number in ids]
    if pieces:
        pieces[-1] += decoder.flush()
    return pieces


def _report(path: str, seen: _Seen, complete: bool) -> dict[str, Any]:
    chars = np.frombuffer(seen.chars, dtype=np.int64)
    tokens = np.frombuffer(seen.tokens, dtype=np.int64) if seen.tokens else None
    lengths = chars if tokens is None else tokens
    return {
        "path": path,
        "files": [str(file) for file in expand(path)],
        "kind": seen.kind,
        "dialects": dict(seen.dialects.most_common()),
        "rows": seen.rows,
        "complete": complete,
        "bad_rows": seen.bad_count,
        "bad": seen.bad,
        "chars": _spread(chars),
        "tokens": None if tokens is None else _spread(tokens),
        "trained_tokens": None if tokens is None else seen.trained,
        "unit": "chars" if tokens is None else "tokens",
        "histogram": _histogram(lengths),
        "fits": {limit: float((lengths <= limit).mean()) for limit in LIMITS},
        "pairs": _pairs(seen, tokens is not None) if seen.kind == "preference" else None,
        "good": seen.good / seen.rows if seen.kind == "rated" else None,
        "sample": seen.sample,
    }


def _pairs(seen: _Seen, tokens: bool) -> dict[str, Any]:
    parts = {name: np.frombuffer(seen.parts[name], dtype=np.int64) for name in PARTS}
    prompt, chosen, rejected = parts.values()
    saved = float(prompt.sum() / (2 * prompt + chosen + rejected).sum()) if tokens else None
    longer = float((chosen > rejected).mean())
    return {**{name: _spread(part) for name, part in parts.items()}, "chosen_longer": longer, "saved": saved}


def _spread(lengths: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99]).round().astype(int).tolist()
    return {
        "total": int(lengths.sum()),
        "mean": float(lengths.mean()),
        "min": int(lengths.min()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": int(lengths.max()),
    }


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Rows by length in bins that double: 1-16, 17-32, 33-64 ... up to the longest."""
    edges = [0, 16]
    while edges[-1] < lengths.max():
        edges.append(edges[-1] * 2)
    counts, _ = np.histogram(lengths, bins=np.array(edges) + 0.5)
    counts[0] += int((lengths == 0).sum())
    bins = zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    return [{"low": low + 1, "high": high, "rows": count} for low, high, count in bins]
