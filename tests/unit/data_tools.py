"""Small makers of files, tokenizers and shards for the data tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from kllm.data.batch import Batch
from kllm.data.encode import Document
from kllm.data.shards import Shard
from kllm.tokenizer.pieces import byte_alphabet
from kllm.tokenizer.tokenizer import Tokenizer

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@dataclass
class Source:
    path: str
    weight: float = 1.0


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def byte_tokenizer(
    folder: Path, *, extra_id: int | None = None, template: str | None = None, think: bool = True
) -> Tokenizer:
    """One token per byte; `extra_id` adds a token of that id (for vocabularies that need 32 bits)."""
    vocab = {name: number for number, name in enumerate([*ADDED, *sorted(byte_alphabet())])}
    if extra_id is not None:
        vocab["\u0100far"] = extra_id
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(ADDED[:3]))
    if think:
        backend.add_tokens(list(ADDED[3:]))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return Tokenizer.load(folder, template)


def chat(question: str, answer: str, **extra: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **extra}


def text_shard(lengths: list[int], first: int = 0, name: str = "text") -> Shard:
    """Documents of these lengths whose tokens are all different: first, first + 1, ..."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(first, first + offsets[-1], dtype=np.uint32)
    meta = {"kind": "text", "hash": f"{name}{first}{lengths}", "source": name, "tokens": int(offsets[-1])}
    return Shard(tokens, offsets, None, None, meta)


def chat_shard(lengths: list[int], prompts: list[int], first: int = 0, name: str = "chat") -> Shard:
    """Like `text_shard`; the first `prompts[d]` tokens of document d are not trained."""
    shard = text_shard(lengths, first, name)
    shard.mask = np.ones(len(shard.tokens), np.uint8)
    for begin, prompt in zip(shard.offsets, prompts, strict=False):
        shard.mask[begin : begin + prompt] = 0
    shard.meta["kind"] = "chat"
    return shard


def pair_shard(documents: list[Document], name: str = "pairs") -> Shard:
    """A shard in memory of encoded pairs, one rendering of each."""
    ids = [document.renderings[0][0] for document in documents]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in ids])]).astype(np.int64)
    splits = np.array([document.splits[0] for document in documents if document.splits], dtype=np.int32)
    mask = np.concatenate([document.renderings[0][1] for document in documents])
    meta = {"kind": "preference", "hash": f"{name}{splits.tolist()}", "source": name, "docs": len(ids)}
    return Shard(np.concatenate(ids), offsets, mask, None, meta, splits)


def sides_of(batch: Batch) -> list[list[tuple[list[int], list[int]]]]:
    """[(tokens, labels) of chosen, the same of rejected] of each pair, put together from the flat row."""
    assert batch.parents is not None and batch.sequences is not None
    bounds, parents = batch.cu_seqlens.tolist(), batch.parents.tolist()
    found: dict[int, tuple[list[int], list[int]]] = {}
    for number, parent in enumerate(parents):
        inside = slice(bounds[number], bounds[number + 1])
        (owner,) = set(batch.sequences.index[inside].tolist()) - {-1} or {-1}
        if owner < 0:
            continue  # a shared beginning
        above = batch.tokens[bounds[parent] : bounds[parent + 1]].tolist() if parent >= 0 else []
        labels = [label for label in batch.labels[inside].tolist() if label >= 0]
        found[owner] = (above + batch.tokens[inside].tolist(), labels)
    return [[found[2 * pair], found[2 * pair + 1]] for pair in range(batch.sequences.count // 2)]
