"""Token shards: tokenised once, read from memory maps ever after.

A shard folder is keyed by the hash of the data, the tokenizer's fingerprint and the options that shape
tokens. It holds `train` and `val`, each as tokens (uint16 or uint32), a mask for conversations, and
document offsets; `meta.json` is written last and the folder appears in one rename. A preference pair is
one document, shared beginning | chosen | rejected, with the lengths of its parts in `splits`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kllm.data.pack import generator
from kllm.errors import UserError
from kllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kllm.data.reasoning import ThinkOptions

FORMAT = 1
VAL_LIMIT = 1 << 26  # tokens of validation data held in memory when several sources are joined
Kind = Literal["text", "chat", "preference", "rated"]
Progress = Callable[[str, int, int], None]  # (source, documents so far, tokens so far)


class SourceLike(Protocol):
    """What `prepare` needs of a data source: config's DataSource, or anything alike."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...


@dataclass
class Shard:
    """The tokens of one split of one source.

    tokens: ids of all renderings end to end; mask: uint8 alike, 1 where a token is trained, None for
    text (all are); offsets: int64 [renderings + 1]; variants: int32 [docs, 4] renderings of each record
    (plain, with system prompt, without empty think, both) or None if there is one of each.
    splits: int32 [renderings, 2] of preference pairs: tokens of the shared beginning and of the chosen
    answer (see encode_pairs.py); good: uint8 [renderings], the ratings of rated answers.
    meta: docs, tokens, trained_tokens, bytes, bad_rows, hash, kind, source ...
    folder: where it lies and what is computed about it can be kept (of several joined, the first one's);
    split: train or val.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    mask: NDArray[np.uint8] | None = None
    variants: NDArray[np.int32] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    splits: NDArray[np.int32] | None = None
    good: NDArray[np.uint8] | None = None
    folder: Path | None = None
    split: str = "train"

    @property
    def docs(self) -> int:
        """Number of records."""
        return len(self.offsets) - 1 if self.variants is None else len(self.variants)

    @property
    def kind(self) -> str:
        return str(self.meta.get("kind", "text" if self.mask is None else "chat"))

    def select(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The rendering of each record in this epoch [docs], drawn by (seed, epoch, record)."""
        if self.variants is None:
            return np.arange(self.docs, dtype=np.int64)
        draws = generator(seed, epoch, 2).random((2, self.docs))
        with_system = draws[0] < self.meta["system_prompt_ratio"]
        without_think = draws[1] >= self.meta["keep_empty_think"]
        column = with_system + 2 * without_think
        return self.variants[np.arange(self.docs), column].astype(np.int64)

    def lengths(self, renderings: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of these renderings."""
        return self.offsets[renderings + 1] - self.offsets[renderings]

    def check_vocab(self, vocab_size: int) -> None:
        """Refuses to train a model on ids it does not have, or ids that this shard could not hold."""
        where = str(self.meta.get("source", "shard"))
        bits = self.tokens.dtype.itemsize * 8
        if vocab_size > 1 << bits:
            hint = "remove the shard folder to have it built again"
            raise UserError(f"{bits}-bit token shards cannot hold a vocabulary of {vocab_size}", where, hint)
        if self.meta.get("max_id", 0) >= vocab_size:
            reason = f"the data has token id {self.meta['max_id']}, the vocabulary only {vocab_size} entries"
            raise UserError(reason, where, "use the tokenizer that belongs to the model")

    @classmethod
    def empty(cls, kind: str) -> Shard:
        mask = None if kind == "text" else np.zeros(0, np.uint8)
        splits = np.zeros((0, 2), np.int32) if kind == "preference" else None
        good = np.zeros(0, np.uint8) if kind == "rated" else None
        meta = {"kind": kind, "docs": 0, "tokens": 0, "trained_tokens": 0, "bytes": 0, "bad_rows": 0}
        return cls(np.zeros(0, np.uint16), np.zeros(1, np.int64), mask, None, meta, splits, good)

    @classmethod
    def open(cls, folder: Path, split: str = "train", vocab_size: int | None = None) -> Shard:
        """Maps a split of a finished shard folder.

        Raises:
            UserError: its ids do not fit `vocab_size`.
            OSError, ValueError, KeyError: the folder is not a complete shard.
        """
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta = {**{k: v for k, v in meta.items() if k not in ("train", "val")}, **meta[split]}
        count = meta["stored_tokens"]
        tokens = _map(folder / f"{split}.tokens.bin", np.dtype(meta["dtype"]), count)
        mask = None
        if meta["kind"] != "text":
            mask = _map(folder / f"{split}.mask.bin", np.dtype("uint8"), count)

        def table(name: str) -> NDArray[Any]:
            array: NDArray[Any] = np.load(folder / f"{split}.{name}.npy", allow_pickle=False)
            return array

        offsets = table("offsets")
        variants = table("variants") if (folder / f"{split}.variants.npy").exists() else None
        splits = table("splits") if meta["kind"] == "preference" else None
        good = table("good") if meta["kind"] == "rated" else None
        shard = cls(tokens, offsets, mask, variants, meta, splits, good, folder, split)
        parts = [part for part in (splits, good) if part is not None]
        whole = all(len(part) == len(offsets) - 1 for part in parts)
        if shard.docs != meta["docs"] or offsets[-1] != count or not whole:
            raise ValueError("the parts of the shard do not fit together")
        if vocab_size is not None:
            shard.check_vocab(vocab_size)
        return shard

    @classmethod
    def concat(cls, shards: Sequence[Shard], limit: int = VAL_LIMIT) -> Shard:
        """One shard in memory with the records of all, at most about `limit` tokens, an equal part each."""
        shards = [shard for shard in shards if shard.docs]
        if len(shards) <= 1:
            return shards[0] if shards else cls.empty("text")
        parts = [shard._head(limit // len(shards)) for shard in shards]
        bases = np.cumsum([0, *(len(part.tokens) for part in parts)])
        offsets = [part.offsets[:-1] + base for part, base in zip(parts, bases[:-1], strict=True)]
        variants = None
        if any(part.variants is not None for part in parts):
            firsts = np.cumsum([0, *(len(part.offsets) - 1 for part in parts)])
            every = [part._all_variants() + first for part, first in zip(parts, firsts[:-1], strict=True)]
            variants = np.concatenate(every).astype(np.int32)
        masks = [part.mask for part in parts if part.mask is not None]
        splits = [part.splits for part in parts if part.splits is not None]
        good = [part.good for part in parts if part.good is not None]
        meta = {**parts[0].meta, "source": " + ".join(str(part.meta.get("source")) for part in parts)}
        for key in ("docs", "tokens", "trained_tokens", "bytes", "bad_rows"):
            meta[key] = sum(int(part.meta.get(key, 0)) for part in parts)
        meta["max_id"] = max(int(part.meta.get("max_id", 0)) for part in parts)
        hashes = "+".join(str(part.meta.get("hash")) for part in parts)
        meta["hash"] = hashlib.blake2b(hashes.encode(), digest_size=12).hexdigest()
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([*offsets, [bases[-1]]]),
            np.concatenate(masks) if masks else None,
            variants,
            meta,
            np.concatenate(splits) if splits else None,
            np.concatenate(good) if good else None,
            parts[0].folder,
            parts[0].split,
        )

    def _all_variants(self) -> NDArray[np.int32]:
        if self.variants is not None:
            return self.variants
        return np.repeat(np.arange(self.docs, dtype=np.int32)[:, None], 4, axis=1)

    def _head(self, limit: int) -> Shard:
        """The first records, with at most about `limit` stored tokens."""
        if self.offsets[-1] <= limit:
            return self
        last = max(1, int(np.searchsorted(self.offsets, limit, side="right")) - 1)
        variants = self.variants
        if variants is not None:
            variants = variants[(variants < last).all(axis=1)]
        stop = self.offsets[last]
        mask = None if self.mask is None else self.mask[:stop]
        docs = last if variants is None else len(variants)
        return replace(
            self,
            tokens=self.tokens[:stop],
            offsets=self.offsets[: last + 1],
            mask=mask,
            variants=variants,
            meta={**self.meta, "docs": docs, "tokens": int(stop)},
            splits=None if self.splits is None else self.splits[:last],
            good=None if self.good is None else self.good[:last],
        )


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {size} bytes, expected {count * dtype.itemsize}")
    if not count:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))


@dataclass
class Prepared:
    """What a stage trains on: one shard per source with its weight, and the validation data.

    stats: docs, tokens, trained_tokens, bytes, val_docs, val_tokens, bad_rows, bad (list of {where,
    reason}), cut_chats (some turns left out), short_docs, dropped (pairs and ratings too long for
    seq_len), dtype, seconds, and `sources`, the same by source with `cached`. Of preference pairs
    also pairs and mean_shared, the mean number of tokens that the two sides of a pair share.
    """

    train: list[Shard]
    weights: list[float]
    val: Shard
    stats: dict[str, Any]


def prepare(
    sources: Sequence[SourceLike],
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    cache_dir: str | Path,
    seq_len: int,
    val_fraction: float = 0.005,
    val_data: Sequence[SourceLike] = (),
    max_bad_rows: int = 0,
    max_bytes: int | None = None,
    min_chars: int = 1,
    system_prompt_ratio: float = 0.0,
    keep_empty_think: float = 1.0,
    think: ThinkOptions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenises every source into shards, or finds them ready, and opens them.

    A record belongs to the validation split if the hash of its content says so, whatever the seed and
    the order; a source of ten or more records gives at least one. With `val_data` nothing is split off.
    Pairs and ratings of one prompt stay together.

    Args:
        kind: text documents, conversations, preference pairs, or rated answers (each pair in the
            data is then two of them).
        cache_dir: where shard folders are kept.
        seq_len: longest conversation in tokens (of a pair, each of the two); texts may have any length.
        max_bad_rows: bad rows to accept over all sources; see `formats.BadRow` and `encode`.
        max_bytes: read at most this much from each source.
        min_chars: shorter texts are passed over (counted as short_docs, not as bad).
        think: what is done to reasoning; None leaves it as it is.
        seed: decides which of the system prompts a conversation may get, and which ones `think` changes.

    Raises:
        UserError: a source is missing, unreadable, of another kind, or has too many bad rows.
        KllmError: the cache cannot be written.
    """
    from kllm.data.build import BuildOptions, build
    from kllm.data.encode import EncodeOptions

    started = time.perf_counter()
    options = BuildOptions(kind, 0.0 if val_data else val_fraction, max_bytes, min_chars)
    if kind != "text":
        drawn = seed if system_prompt_ratio > 0 or think is not None else 0
        chat = EncodeOptions(seq_len, system_prompt_ratio, keep_empty_think, drawn, think)
        options = replace(options, chat=chat)

    def folder_of(path: str, bad_rows: int) -> tuple[Path, bool]:
        return build(path, tokenizer, options, Path(cache_dir), bad_rows, progress)

    every = [*((source, False) for source in sources), *((source, True) for source in val_data)]
    train, val, rows = _open_all(every, folder_of, tokenizer.vocab_size, max_bad_rows)
    joined = Shard.concat(val) if any(shard.docs for shard in val) else Shard.empty(kind)
    stats = _stats(rows, train, joined) | {"seconds": time.perf_counter() - started}
    return Prepared(train, [float(source.weight) for source in sources], joined, stats)


def _open_all(
    sources: Sequence[tuple[SourceLike, bool]],
    folder_of: Callable[[str, int], tuple[Path, bool]],
    vocab_size: int,
    max_bad_rows: int,
) -> tuple[list[Shard], list[Shard], list[dict[str, Any]]]:
    """(training shards, validation shards, facts by source) of (source, whether it is for validation)."""
    train: list[Shard] = []
    val: list[Shard] = []
    rows: list[dict[str, Any]] = []
    left = max_bad_rows
    for source, is_val in sources:
        folder, cached = folder_of(source.path, left)
        shard = Shard.open(folder, "train", vocab_size)
        left -= shard.meta["bad_rows"]
        (val if is_val else train).append(shard)
        if not is_val:
            val.append(Shard.open(folder, "val"))
        rows.append(_row(source, shard, cached=cached, validation=is_val))
    return train, val, rows


def _row(source: SourceLike, shard: Shard, **facts: bool) -> dict[str, Any]:
    kept = {key: value for key, value in shard.meta.items() if key not in ("format", "kind")}
    return {"path": source.path, "weight": source.weight, **facts, **kept}


def _stats(rows: list[dict[str, Any]], train: list[Shard], val: Shard) -> dict[str, Any]:
    totals = ("docs", "tokens", "trained_tokens", "bytes")
    stats: dict[str, Any] = {key: sum(int(shard.meta[key]) for shard in train) for key in totals}
    stats |= {"val_docs": val.docs, "val_tokens": val.meta["tokens"], "dtype": train[0].meta["dtype"]}
    counts = ("bad_rows", "cut_chats", "short_docs", "dropped")
    stats |= {key: sum(row.get(key, 0) for row in rows) for key in counts}
    if train[0].kind == "preference":
        shared = sum(int(shard.meta["shared_tokens"]) for shard in train)
        stats |= {"pairs": stats["docs"], "mean_shared": shared / max(1, stats["docs"])}
    stats["bad"] = [entry for row in rows for entry in row["bad"]]
    stats["sources"] = rows
    return stats
