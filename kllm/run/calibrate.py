"""Texts for quantisation: some to calibrate on, others to measure what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from kllm.data.sources import iter_records
from kllm.data.texts import all_texts
from kllm.errors import UserError
from kllm.eval.perplexity import perplexity_of
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer

BUILTIN = "builtin:world/pretrain"
DOCUMENTS = 512
CALIBRATION_TOKENS = 16_384
MEASURED_TOKENS = 8_192
ROW = 512


@dataclass(frozen=True)
class Texts:
    """source: where from; rows: int64 [T] each, to calibrate on; held_out: texts for perplexity."""

    source: str
    rows: list[Tensor]
    held_out: list[str]


def calibration_texts(source: str | None, tokenizer: Tokenizer, model: Transformer) -> Texts:
    """Every other text of `source`, of any dialect (the built-in world without one), up to some tokens.

    Raises:
        UserError: nothing there, or no texts.
    """
    where = source or BUILTIN
    found = (text for _, record in iter_records(where) for text in all_texts(record))
    texts = list(islice((t for t in found if t.strip()), DOCUMENTS))
    if not texts:
        raise UserError("no text to calibrate on", where=where)
    if len(texts) == 1:  # one long text: its halves
        middle = len(texts[0]) // 2
        texts = [texts[0][:middle], texts[0][middle:]]
    longest = min(ROW, model.shape.max_position_embeddings)
    rows = _rows(texts[0::2], tokenizer, longest, CALIBRATION_TOKENS)
    return Texts(where, rows, _first(texts[1::2], tokenizer, MEASURED_TOKENS))


def _rows(texts: Sequence[str], tokenizer: Tokenizer, longest: int, limit: int) -> list[Tensor]:
    rows: list[Tensor] = []
    for ids in tokenizer.encode_batch(texts):
        for at in range(0, len(ids), longest):
            if limit <= 0:
                return rows
            rows.append(torch.tensor(ids[at : at + longest]))
            limit -= len(rows[-1])
    return rows


def _first(texts: Sequence[str], tokenizer: Tokenizer, limit: int) -> list[str]:
    kept = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if limit <= 0:
            break
        kept.append(text)
        limit -= len(ids)
    return kept


def perplexity(model: Transformer, tokenizer: Tokenizer, texts: Texts) -> float | None:
    """Perplexity on the held-out texts; None if they are too short to judge."""
    found = perplexity_of(model, tokenizer, texts.held_out, seq_len=ROW)
    return None if found is None else float(found["ppl"])
