"""Loss, perplexity and bits per byte of a model on any source of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kllm.data.batch import IGNORE, Batch, Piece
from kllm.data.formats import BadRow, TextRecord, normalise
from kllm.data.sources import iter_records
from kllm.errors import UserError
from kllm.model.attention import PackedLayout
from kllm.model.head import token_losses

if TYPE_CHECKING:
    from kllm.model.transformer import Transformer
    from kllm.tokenizer.tokenizer import Tokenizer


def run_perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    file: str | Path,
    *,
    seq_len: int = 1024,
    batch_tokens: int = 8192,
    limit: int | None = None,
) -> dict[str, Any]:
    """Reads `file` in windows of `seq_len` tokens and sums the loss of every token but a document's first.

    Windows of a long document follow one another without overlap; each but the first is judged with the
    context of its own window only. Special tokens (the document's end) have a loss but no bytes: they
    count for `nll` and `ppl`, not for bits per byte, which compares models with different tokenizers.

    Args:
        file: any source of texts (see `kllm.data.sources`).
        limit: at most so many documents.

    Returns:
        `nll` (nats per token), `ppl` = exp(nll), `bits_per_byte`, `tokens`, `bytes`, `documents`, `seq_len`.

    Raises:
        UserError: the file cannot be read, or holds no text to judge.
    """
    found = perplexity_of(
        model, tokenizer, islice(_texts(file), limit), seq_len=seq_len, batch_tokens=batch_tokens
    )
    if found is None:
        raise UserError("no text to judge", where=str(file))
    return found


@torch.inference_mode()
def perplexity_of(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    seq_len: int = 1024,
    batch_tokens: int = 8192,
) -> dict[str, Any] | None:
    """`run_perplexity` of texts at hand; None if there is nothing in them to judge."""
    seq_len = min(seq_len, model.shape.max_position_embeddings)
    sums = _Sums(model, tokenizer.token_bytes())
    pieces: list[Piece] = []
    held = documents = 0
    for text in texts:
        documents += 1
        for piece in _windows([*tokenizer.encode(text), tokenizer.eot_token_id], seq_len):
            pieces.append(piece)
            held += len(piece.tokens)
            if held >= batch_tokens:
                sums.add(pieces)
                pieces, held = [], 0
    if pieces:
        sums.add(pieces)
    if not sums.tokens:
        return None
    nll = sums.nll / sums.tokens
    return {
        "nll": nll,
        "ppl": math.exp(min(nll, 700.0)),
        "bits_per_byte": sums.text_nll / math.log(2) / sums.bytes if sums.bytes else None,
        "tokens": sums.tokens,
        "bytes": sums.bytes,
        "documents": documents,
        "seq_len": seq_len,
    }


def _texts(file: str | Path) -> Iterator[str]:
    for where, record in iter_records(file):
        try:
            found = normalise(record, "text")
        except BadRow as bad:
            raise UserError(str(bad), where=where) from bad
        if isinstance(found, TextRecord):
            yield found.text


def _windows(ids: list[int], seq_len: int) -> Iterator[Piece]:
    """[seq_len] tokens with the next token as label; the last label is the document's end."""
    for at in range(0, len(ids) - 1, seq_len):
        tokens = np.array(ids[at : at + seq_len], dtype=np.int64)
        labels = np.array(ids[at + 1 : at + 1 + seq_len], dtype=np.int64)
        yield Piece(tokens[: len(labels)], labels)


class _Sums:
    """Losses added up over batches, in float64."""

    def __init__(self, model: Transformer, token_bytes: np.ndarray) -> None:
        self.model, self.sizes = model, token_bytes.astype(np.int64)
        self.nll = self.text_nll = 0.0
        self.tokens = self.bytes = 0

    def add(self, pieces: list[Piece]) -> None:
        training = self.model.training
        self.model.eval()
        batch = Batch.from_pieces(pieces)
        device = self.model.head_weight.device
        self.model.ensure_context(max(len(piece.tokens) for piece in pieces))
        hidden = self.model(
            batch.tokens.to(device), batch.positions.to(device), PackedLayout(batch.cu_seqlens, device)
        )
        losses = token_losses(hidden, self.model.head_weight, batch.labels.to(device)).double().cpu().numpy()
        self.model.train(training)
        labels = batch.labels.numpy()
        sizes = np.where(labels == IGNORE, 0, self.sizes[np.maximum(labels, 0)])
        self.nll += float(losses.sum())
        self.text_nll += float(losses[sizes > 0].sum())
        self.tokens += int((labels != IGNORE).sum())
        self.bytes += int(sizes.sum())
