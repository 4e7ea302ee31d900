"""How often a model finds the better of two answers the likelier one.

Of each pair the log-probabilities of both answers are compared: summed over their tokens, as DPO does, and
as means of a token, as SimPO does, so that a preference for short answers shows. The two answers share
their prompt, which is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kllm.data.assemble import Pieces, Window, assemble
from kllm.data.batch import Batch
from kllm.data.encode import Document, EncodeOptions, TooLong
from kllm.data.encode_pairs import PairDocuments
from kllm.data.formats import PreferenceRecord, normalise
from kllm.data.messages import BadRow
from kllm.data.shards import Shard
from kllm.data.sources import iter_records
from kllm.errors import UserError
from kllm.eval.scoring import language_of, shown, tally
from kllm.objectives.reference import reference_logprobs

if TYPE_CHECKING:
    from kllm.model.transformer import Transformer
    from kllm.tokenizer.tokenizer import Tokenizer

_PAIRS = 64  # encoded at once

Row = dict[str, Any]  # lang, category, question, chosen, rejected


def run_preference(
    model: Transformer,
    tokenizer: Tokenizer,
    source: str | Path,
    *,
    limit: int | None = None,
    batch_tokens: int = 8192,
    seq_len: int = 2048,
) -> dict[str, Any]:
    """Compares both answers of every pair in `source` (any dialect of preference data).

    Args:
        limit: at most so many pairs.
        batch_tokens: tokens computed at once.
        seq_len: longer conversations are passed over (`dropped`); at most the model's positions.

    Returns:
        `accuracy`, `correct`, `total` and their `by_language`, `by_category` (those of the rows where they
        name any) for summed log-probabilities; `accuracy_per_token`; `chosen_logprob`, `rejected_logprob`
        (mean nats of an answer), `chosen_logprob_per_token`, `rejected_logprob_per_token`, `margin`;
        `dropped`; `samples`.

    Raises:
        UserError: the file cannot be read, a row is no pair, or nothing is left to compare.
    """
    seq_len = min(seq_len, model.shape.max_position_embeddings)
    rows: list[Row] = []
    found: list[np.ndarray] = []
    dropped = 0
    for documents, some, missed in _documents(tokenizer, islice(_pairs(source), limit), seq_len):
        dropped += missed
        rows += some
        found += [answer_logprobs(model, _batch(part)) for part in _parts(documents, batch_tokens)]
    if not rows:
        hint = f"{dropped} are longer than {seq_len} tokens" if dropped else None
        raise UserError("no pair to compare", where=str(source), hint=hint)
    return {**_result(rows, np.concatenate(found)), "dropped": dropped, "seq_len": seq_len}


def answer_logprobs(model: Transformer, batch: Batch) -> np.ndarray:
    """float64 [sequences, 2]: the summed log-probability of each sequence of a batch, and its tokens."""
    if batch.sequences is None:
        raise ValueError("a batch without sequences")
    logps = reference_logprobs(model, batch).double().cpu()
    sums = [batch.sequences.sums(values) for values in (logps, torch.ones_like(logps))]
    return torch.stack(sums, dim=1).numpy()


def _pairs(source: str | Path) -> Iterator[tuple[Row, PreferenceRecord]]:
    for where, obj in iter_records(source):
        try:
            record = normalise(obj, "preference")
        except BadRow as bad:
            raise UserError(str(bad), where=where, hint=getattr(bad, "hint", None)) from bad
        assert isinstance(record, PreferenceRecord)
        question = record.prompt[-1]["content"]
        row = {
            "where": where,
            "lang": str(obj.get("lang") or language_of(question)),
            "category": str(obj.get("category") or "pairs"),
            "question": question,
            "chosen": record.chosen[-1]["content"],
            "rejected": record.rejected[-1]["content"],
        }
        yield row, record


def _documents(
    tokenizer: Tokenizer, pairs: Iterator[tuple[Row, PreferenceRecord]], seq_len: int
) -> Iterator[tuple[list[Document], list[Row], int]]:
    """Encoded pairs, some at a time, with their rows and how many were too long."""
    encoder = PairDocuments(tokenizer, EncodeOptions(seq_len))
    while some := list(islice(pairs, _PAIRS)):
        documents: list[Document] = []
        rows: list[Row] = []
        for (row, _), document in zip(some, encoder([record for _, record in some]), strict=True):
            if isinstance(document, Document):
                documents.append(document)
                rows.append(row)
            elif not isinstance(document, TooLong):
                raise UserError(str(document), where=row["where"])
        yield documents, rows, len(some) - len(rows)


def _parts(documents: list[Document], most: int) -> Iterator[list[Document]]:
    """Cut where the tokens pass `most`; at least one document in each part."""
    part: list[Document] = []
    held = 0
    for document in documents:
        size = len(document.renderings[0][0])
        if part and held + size > most:
            yield part
            part, held = [], 0
        part.append(document)
        held += size
    if part:
        yield part


def _batch(documents: list[Document]) -> Batch:
    ids, masks = zip(*(document.renderings[0] for document in documents), strict=True)
    lengths = np.array([len(some) for some in ids], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    splits = np.array([document.splits[0] for document in documents if document.splits], dtype=np.int32)
    shard = Shard(
        np.concatenate(ids), offsets, np.concatenate(masks), meta={"kind": "preference"}, splits=splits
    )
    count = len(lengths)
    here = np.zeros(count, dtype=np.int64)
    pieces = Pieces(here, offsets[:-1], lengths, np.zeros(count, dtype=bool), np.arange(count))
    return assemble(Window([shard], [{}], [pieces], []), "preference", None)


def _result(rows: list[Row], found: np.ndarray) -> dict[str, Any]:
    sums, tokens = found[:, 0].reshape(-1, 2), found[:, 1].reshape(-1, 2)
    means = sums / np.maximum(tokens, 1)
    marks = (sums[:, 0] > sums[:, 1]).tolist()
    chosen, rejected = sums.mean(axis=0).tolist()
    chosen_mean, rejected_mean = (sums.sum(axis=0) / np.maximum(tokens.sum(axis=0), 1)).tolist()
    return {
        **tally([(row["lang"], row["category"], mark) for row, mark in zip(rows, marks, strict=True)]),
        "measure": "pairs in the wanted order",
        "accuracy_per_token": float((means[:, 0] > means[:, 1]).mean()),
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
        "chosen_logprob_per_token": chosen_mean,
        "rejected_logprob_per_token": rejected_mean,
        "margin": chosen - rejected,
        "samples": [
            {
                "lang": rows[i]["lang"],
                "category": rows[i]["category"],
                "question": rows[i]["question"],
                "answer": rows[i]["chosen" if marks[i] else "rejected"],
                "expected": rows[i]["chosen"],
                "correct": marks[i],
            }
            for i in shown(marks)
        ],
    }
