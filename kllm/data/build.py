"""Builds the shard folder of one source: read, normalise, tokenise in batches, write, rename.

Memory stays bounded whatever the source's size: a batch of records, the write buffers, and eight
bytes per document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kllm.data.encode import Document, EncodeOptions, TooLong, record_hash, words
from kllm.data.encode_pairs import encoder_for
from kllm.data.formats import Record, TextRecord, WrongDialect, records
from kllm.data.messages import BadRow
from kllm.data.shards import FORMAT, Kind, Progress, Shard
from kllm.data.sources import content_hash, iter_records
from kllm.errors import UserError
from kllm.files import io_errors, new_directory, write_json
from kllm.tokenizer.tokenizer import Tokenizer

BATCH_DOCS = 1000
BATCH_CHARS = 1_000_000  # the tokenizer needs about 200 bytes for each
KEPT_BAD_ROWS = 100
READERS = {"preference": 2, "rated": 2}
"""Raised by hand when rows of a kind are read otherwise: shards of the older reading are built anew."""
_MIN_DOCS_FOR_VAL = 10


@dataclass(frozen=True)
class BuildOptions:
    """Everything besides data and tokenizer that decides a shard's content, hence part of its key."""

    kind: Kind
    val_fraction: float
    max_bytes: int | None
    min_chars: int
    chat: EncodeOptions | None = None  # texts may have any length


def build(
    source: str,
    tokenizer: Tokenizer,
    options: BuildOptions,
    cache_dir: Path,
    max_bad_rows: int = 0,
    progress: Progress | None = None,
) -> tuple[Path, bool]:
    """The finished shard folder of `source` and whether it was there already."""
    with io_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    data = content_hash(source, memo=cache_dir / "hashes.json")
    parts = {"format": FORMAT, "data": data, "tokenizer": tokenizer.fingerprint, **asdict(options)}
    if parts["chat"] is not None:  # what is not asked for leaves the keys of older shards as they were
        parts["chat"] = {name: value for name, value in parts["chat"].items() if value is not None}
    if options.kind in READERS:
        parts["reader"] = READERS[options.kind]
    key = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = cache_dir / f"{options.kind}-{key}"
    bad = BadRows(source, max_bad_rows)
    if (found := _finished(folder)) is not None:
        bad.recall(found)
        return folder, True
    remove_torn(folder)
    with new_directory(folder) as aside:
        builder = _Builder(source, tokenizer, options, aside, bad)
        builder.run(progress)
        meta = builder.meta()
        # Some of the key's parts (kind, seq_len, ...) are what readers of the shard need as well.
        write_json(
            aside / "meta.json", {**parts, **(parts["chat"] or {}), **meta, "hash": key, "source": source}
        )
    return folder, False


def _finished(folder: Path) -> dict[str, Any] | None:
    try:
        Shard.open(folder, "val")
        return Shard.open(folder, "train").meta
    except (OSError, ValueError, KeyError):
        return None


def remove_torn(folder: Path) -> None:
    """Removes what killed builds of the same folder left behind."""
    for torn in folder.parent.glob(f".{folder.name}.*-*"):
        pid = torn.name.rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), 0)
                continue  # its process lives: another run builds the same data
        shutil.rmtree(torn, ignore_errors=True)


@dataclass
class BadRows:
    """Counts bad rows, keeps the first ones, and gives up above the limit."""

    source: str
    limit: int
    count: int = 0
    kept: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.kept) < KEPT_BAD_ROWS:
            self.kept.append({"where": where, "reason": reason})
        self._check()

    def recall(self, meta: dict[str, Any]) -> None:
        """Takes over what an earlier build found, perhaps under another limit."""
        self.count, self.kept = meta["bad_rows"], meta["bad"]
        self._check()

    def _check(self) -> None:
        if self.count <= self.limit:
            return
        first = self.kept[0]
        allowed = f"max_bad_rows allows {self.limit} here" if self.limit > 0 else "no bad row is allowed"
        hint = f"{allowed}; `kllm data inspect {self.source}` lists them, dataset.max_bad_rows tolerates some"
        raise UserError(first["reason"], first["where"], hint)


class _Builder:
    def __init__(
        self, source: str, tokenizer: Tokenizer, options: BuildOptions, folder: Path, bad: BadRows
    ) -> None:
        self.source, self.options, self.bad = source, options, bad
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.encode = encoder_for(options.kind, tokenizer, options.chat)
        self.train = _Writer(folder, "train", self)
        self.val = _Writer(folder, "val", self)
        self.threshold = int(options.val_fraction * 2**64)
        self.short = self.cut = self.dropped = 0
        self.held: list[Document] = []  # the documents of the least hash: the split's reserve
        self.least = 1 << 64

    def run(self, progress: Progress | None) -> None:
        with self.train, self.val:
            for batch in self._batches():
                hashes = [record_hash(record) for _, record in batch]
                documents = self.encode([record for _, record in batch])
                for (where, _), number, document in zip(batch, hashes, documents, strict=True):
                    if isinstance(document, TooLong):
                        self.dropped += 1
                    elif isinstance(document, BadRow):
                        self.bad.add(where, str(document))
                    else:
                        self._route(number, document)
                if progress is not None:
                    docs, tokens = self.train.docs + self.val.docs, self.train.stored + self.val.stored
                    progress(self.source, docs, tokens)
            self._settle()

    def _batches(self) -> Iterator[list[tuple[str, Any]]]:
        batch: list[tuple[str, Any]] = []
        size = 0
        for where, record in self._records():
            batch.append((where, record))
            size += record_size(record)
            if len(batch) >= BATCH_DOCS or size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _records(self) -> Iterator[tuple[str, Any]]:
        good, least = 0, self.options.min_chars
        for where, value in iter_records(self.source, max_bytes=self.options.max_bytes, on_bad=self.bad.add):
            try:
                found = records(value, self.options.kind)
            except WrongDialect as error:
                if not good:  # the whole file is of another kind: not a matter of counting rows
                    raise UserError(str(error), where, error.hint) from error
                self.bad.add(where, str(error))
            except BadRow as error:
                self.bad.add(where, str(error))
            else:
                good += 1
                for record in found:
                    if _is_short(record, least):
                        self.short += 1
                    else:
                        yield where, record

    def _route(self, number: int, document: Document) -> None:
        """To the side that the hash says; the train document of the least hash waits in reserve."""
        self.cut += document.cut
        if number < self.threshold:
            self.val.add(document)
        elif self.options.val_fraction <= 0 or number > self.least:
            self.train.add(document)
        else:
            if number < self.least:
                self._release(self.train)
            self.least = number
            self.held.append(document)

    def _release(self, writer: _Writer) -> None:
        for document in self.held:
            writer.add(document)
        self.held = []

    def _settle(self) -> None:
        total = self.train.docs + self.val.docs + len(self.held)
        self._release(self.train if self.val.docs or total < _MIN_DOCS_FOR_VAL else self.val)
        if not total:
            found = f"{self.bad.count} bad rows and {self.short} short texts, nothing else"
            if self.dropped:
                found = f"{self.dropped} records are too long, {self.bad.count} bad; nothing is left"
            empty = not (self.bad.count or self.short or self.dropped)
            hint = "raise dataset.seq_len" if self.dropped else None
            raise UserError("there are no records" if empty else found, self.source, hint)
        if not self.train.docs:
            raise UserError("all records fell into the validation split", self.source, "lower val_fraction")

    def meta(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype.str,
            "bad_rows": self.bad.count,
            "bad": self.bad.kept,
            "cut_chats": self.cut,
            "short_docs": self.short,
            "dropped": self.dropped,
            "train": self.train.meta(),
            "val": self.val.meta(),
        }


def record_size(record: Any) -> int:
    """Characters of a record's text."""
    if isinstance(record, TextRecord):
        return len(record.text)
    return sum(len(message["content"]) for message in words(record))


def _is_short(record: Record, least: int) -> bool:
    return isinstance(record, TextRecord) and record.last and len(record.text) < least


class _Writer:
    """Appends documents to the files of one split."""

    def __init__(self, folder: Path, split: str, builder: _Builder) -> None:
        self.folder, self.split, self.builder = folder, split, builder
        self.offsets, self.variants = array("q", [0]), array("i")
        self.splits, self.good = array("i"), array("B")
        self.docs = self.tokens = self.trained = self.bytes = self.stored = self.max_id = self.shared = 0

    def __enter__(self) -> _Writer:
        self.token_file = (self.folder / f"{self.split}.tokens.bin").open("wb")
        self.mask_file = (self.folder / f"{self.split}.mask.bin").open("wb")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.token_file.close()
        self.mask_file.close()
        if kind is not None:
            return
        if self.builder.options.kind == "text":
            (self.folder / f"{self.split}.mask.bin").unlink()
        np.save(self.folder / f"{self.split}.offsets.npy", np.frombuffer(self.offsets, dtype=np.int64))
        if self.builder.encode.drawn:
            table = np.frombuffer(self.variants, dtype=np.int32).reshape(-1, 4)
            np.save(self.folder / f"{self.split}.variants.npy", table)
        if self.builder.options.kind == "preference":
            table = np.frombuffer(self.splits, dtype=np.int32).reshape(-1, 2)
            np.save(self.folder / f"{self.split}.splits.npy", table)
        if self.builder.options.kind == "rated":
            np.save(self.folder / f"{self.split}.good.npy", np.frombuffer(self.good, dtype=np.uint8))

    def add(self, document: Document) -> None:
        first = len(self.offsets) - 1
        if self.builder.encode.drawn:  # else there is one rendering of each
            self.variants.extend(first + number for number in document.choice)
        for ids, mask in document.renderings:
            self._write(ids, mask)
        if document.splits is not None:
            self.splits.extend(number for split in document.splits for number in split)
            self.shared += document.splits[document.choice[0]][0]
        if document.good is not None:
            self.good.extend([document.good] * len(document.renderings))
        ids, mask = document.renderings[document.choice[0]]
        self.docs += 1
        self.tokens += len(ids)
        self.trained += len(ids) - 1 if mask is None else int(mask[1:].sum())
        self.bytes += document.size

    def _write(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        self.max_id = max(self.max_id, int(ids.max()))
        if self.max_id > np.iinfo(self.builder.dtype).max:
            bits = self.builder.dtype.itemsize * 8
            raise UserError(f"token id {self.max_id} does not fit the {bits}-bit shard", self.builder.source)
        self.token_file.write(ids.astype(self.builder.dtype).tobytes())
        if mask is not None:
            self.mask_file.write(mask.tobytes())
        self.stored += len(ids)
        self.offsets.append(self.stored)

    def meta(self) -> dict[str, Any]:
        pairs = {"shared_tokens": self.shared} if self.builder.options.kind == "preference" else {}
        return {
            **pairs,
            "docs": self.docs,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "bytes": self.bytes,
            "stored_tokens": self.stored,
            "max_id": self.max_id,
        }
