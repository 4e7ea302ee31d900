"""What a teacher says about a batch: a live model, its top-k from disk, or a model of another tokenizer.

A teacher answers with a `Lesson`, from which the objective draws log-probabilities one chunk of places
at a time; a teacher's logits never exist for a whole batch either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kllm.data.batch import IGNORE, Batch
from kllm.errors import KllmError, UserError
from kllm.model.attention import PackedLayout
from kllm.model.transformer import LayerLog, Transformer
from kllm.tokenizer.align import Translator, same_places
from kllm.tokenizer.tokenizer import Tokenizer

LAST = -1
"""The layer number that means the hidden states after the final norm."""


@dataclass
class Lesson:
    """Targets for N places of a batch.

    hidden [M, H] and head [V, H] of the teacher, or its stored top-k: ids int64 [N, k] and logprobs
    float32 [N, k], likeliest first. places: rising numbers among the N for which there is an answer (M of
    them), None for all. states: hidden states [M, H] of the layers asked for, in that order.
    """

    hidden: Tensor | None = None
    head: Tensor | None = None
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    places: np.ndarray | None = None
    states: list[Tensor] = field(default_factory=list)

    def within(self, part: slice) -> tuple[slice, np.ndarray | None]:
        """The answers to the places of `part`: their rows here, and which of `part` they are (None = all)."""
        if self.places is None:
            return part, None
        low, high = np.searchsorted(self.places, [part.start, part.stop])
        return slice(int(low), int(high)), self.places[low:high] - part.start

    @torch.no_grad()
    def log_probabilities(
        self, rows: slice, temperature: float, top_k: int = 0, vocab_size: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """float32 log-probabilities [n, V], or [n, k] with their ids int64 [n, k].

        Args:
            rows: of this lesson.
            temperature: stored top-k are already at theirs.
            top_k: keep so many; 0 = all.
            vocab_size: leave out rows of the head beyond it (padding of the vocabulary).
        """
        if self.logprobs is not None and self.ids is not None:
            return self.logprobs[rows], self.ids[rows]
        assert self.hidden is not None and self.head is not None
        logits = (self.hidden[rows] @ self.head[:vocab_size].t()).float()
        logprobs = logits.div_(temperature).log_softmax(dim=-1)
        if not 0 < top_k < logprobs.shape[-1]:
            return logprobs, None
        return logprobs.topk(top_k, dim=-1)


class Teacher(Protocol):
    """Where the targets come from."""

    def lesson(self, batch: Batch, rows: Tensor, layers: tuple[int, ...]) -> Lesson:
        """Targets for `rows` (int64 [N], the labelled positions of `batch`).

        layers: whose hidden states are wanted too (`LAST` = after the final norm).
        """
        ...


@torch.no_grad()
def _hidden(
    model: Transformer, tokens: Tensor, positions: Tensor, layout: PackedLayout, layers: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    log = LayerLog(frozenset(layers) - {LAST})
    hidden = model(tokens, positions, layout, layers=log)
    return hidden, [hidden if n == LAST else log.states[n] for n in layers]


def _lesson(model: Transformer, batch: Batch, rows: Tensor, layers: tuple[int, ...]) -> Lesson:
    layout = PackedLayout(batch.cu_seqlens, batch.tokens.device, batch.parents)
    model.ensure_context(batch.context)
    hidden, states = _hidden(model, batch.tokens, batch.positions, layout, layers)
    if rows.shape[0] != hidden.shape[0]:
        hidden, states = hidden.index_select(0, rows), [x.index_select(0, rows) for x in states]
    return Lesson(hidden, model.head_weight, states=states)


class LiveTeacher:
    """A model that reads the batch beside the student: any width, depth or kind, the same tokenizer.

    Args:
        model: on the student's device; put into evaluation mode and frozen.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model.eval().requires_grad_(False)

    def lesson(self, batch: Batch, rows: Tensor, layers: tuple[int, ...]) -> Lesson:
        """See `Teacher`."""
        return _lesson(self.model, batch, rows, layers)


class CachedTeacher:
    """The top-k of `teacher_topk`, which came with the batch; no model in memory."""

    def lesson(self, batch: Batch, rows: Tensor, layers: tuple[int, ...]) -> Lesson:
        """See `Teacher`."""
        try:
            ids, logprobs = batch.extras["teacher_ids"], batch.extras["teacher_logprobs"]
        except KeyError:
            raise KllmError(
                "the batch carries no teacher's probabilities", where=", ".join(batch.rows[:1])
            ) from None
        return Lesson(ids=ids.index_select(0, rows).long(), logprobs=logprobs.index_select(0, rows).float())


class ForeignTeacher:
    """A model of another tokenizer: it reads the same text, and answers where both have read equally much.

    Args:
        model: on the student's device; put into evaluation mode and frozen.
        student, own: the tokenizers.
        by: how places are paired, see `tokenizer.align.same_places`.
    """

    def __init__(self, model: Transformer, student: Tokenizer, own: Tokenizer, by: str = "offsets") -> None:
        self.model = model.eval().requires_grad_(False)
        self._translate, self.by = Translator(student, own), by

    def lesson(self, batch: Batch, rows: Tensor, layers: tuple[int, ...]) -> Lesson:
        """See `Teacher`."""
        device, width = batch.tokens.device, self.model.shape.hidden_size
        documents, asked = _documents(batch)
        translated = self._translate(documents)
        mine = [other.tokens for other in translated]
        pairs, first = [], 0
        for ids, labelled, other, end in zip(
            documents, asked, translated, batch.cu_seqlens[1:].tolist(), strict=True
        ):
            # from places of the document (a shared beginning and its own words) to those of the rows
            shift = np.array([end - len(ids), first])
            pairs.append(same_places(labelled, other, self.by) + shift)
            first += len(other.tokens)
        both = np.concatenate(pairs)
        places = np.searchsorted(rows.cpu().numpy(), both[:, 0])
        if not len(both):
            nothing = torch.empty(0, width, device=device)
            return Lesson(nothing, self.model.head_weight, places=places, states=[nothing] * len(layers))
        lengths = [len(tokens) for tokens in mine if len(tokens)]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        self.model.ensure_context(max(lengths))
        hidden, states = _hidden(
            self.model, torch.from_numpy(np.concatenate(mine)).to(device), positions,
            PackedLayout(cu_seqlens, device), layers,
        )  # fmt: skip
        pick = torch.from_numpy(both[:, 1]).to(device)
        found = [x.index_select(0, pick) for x in (hidden, *states)]
        return Lesson(found[0], self.model.head_weight, places=places, states=found[1:])


def _documents(batch: Batch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each segment's ids int64 [n], a shared beginning included, and which of its own places have a label."""
    tokens, labels = batch.tokens.cpu().numpy(), batch.labels.cpu().numpy()
    borders = list(pairwise(batch.cu_seqlens.tolist()))
    parents = [-1] * len(borders) if batch.parents is None else batch.parents.tolist()
    documents, asked = [], []
    for (begin, end), parent in zip(borders, parents, strict=True):
        shared = slice(*borders[parent]) if parent >= 0 else slice(0, 0)
        documents.append(np.concatenate((tokens[shared], tokens[begin:end])))
        own = labels[begin:end] != IGNORE
        asked.append(np.concatenate((np.zeros(shared.stop - shared.start, dtype=bool), own)))
    return documents, asked


@torch.no_grad()
def teacher_topk(
    model: Transformer,
    batch: Batch,
    k: int,
    temperature: float = 1.0,
    chunk: int = 1024,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """The teacher's likeliest next tokens at every labelled place, to be stored for many epochs.

    Args:
        model: the teacher, on the batch's device.
        batch: T tokens.
        k: how many to keep.
        temperature: that of the training which will read them: what is left out then keeps its mass.
        chunk: rows of logits alive at once.
        vocab_size: the student's, where the teacher's is padded further.

    Returns:
        teacher_ids int32 [T, k], likeliest first, and teacher_logprobs float32 [T, k]: log-probabilities
        over the whole vocabulary, so that one minus their sum is the mass of the rest. Zeros where the
        batch has no label.

    Raises:
        UserError: k is not between 1 and the size of the vocabulary.
    """
    size = min(vocab_size or model.shape.vocab_size, model.shape.vocab_size)
    if not 0 < k <= size:
        raise UserError(
            f"top_k must be between 1 and the vocabulary's {size}, not {k}", where="distill.top_k"
        )
    was_training = model.training
    model.eval()
    rows = (batch.labels != IGNORE).nonzero().squeeze(1)
    lesson = _lesson(model, batch, rows, ())
    model.train(was_training)
    ids = torch.zeros(batch.tokens.shape[0], k, dtype=torch.int32, device=batch.tokens.device)
    logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    for start in range(0, rows.shape[0], chunk):
        part = slice(start, min(start + chunk, rows.shape[0]))
        every, _ = lesson.log_probabilities(part, temperature, vocab_size=size)
        top = every.topk(k, dim=-1)
        logprobs[rows[part]], ids[rows[part]] = top.values, top.indices.to(torch.int32)
    return {"teacher_ids": ids, "teacher_logprobs": logprobs}
