"""Distillation from a teacher of another tokenizer (universal logit distillation)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chat_support import chat_tokenizer
from data_tools import byte_tokenizer
from model_support import BASE, random_model
from torch import Tensor

from kllm.data.batch import IGNORE, Batch
from kllm.errors import UserError
from kllm.model.transformer import Transformer
from kllm.objectives.distill import Distill
from kllm.objectives.divergence import uld
from kllm.observe.metrics import describe
from kllm.tokenizer.tokenizer import Tokenizer

TEXTS = (
    "<|im_start|>user\nwhere is the cat?<|im_end|>\n<|im_start|>assistant\nthe cat ate 猫<|im_end|>",
    "the fish sat on the mat",
)


@pytest.fixture
def own(tmp_path: Path) -> Tokenizer:
    """The teacher's: one token a byte."""
    return byte_tokenizer(tmp_path)


@pytest.fixture
def student() -> Transformer:
    return random_model(BASE.with_(vocab_size=chat_tokenizer().vocab_size), 1)


@pytest.fixture
def teacher(own: Tokenizer) -> Transformer:
    return random_model(BASE.with_(vocab_size=own.vocab_size, hidden_size=96), 2)


def make_batch(texts: tuple[str, ...] = TEXTS, learn_from: int = 3, weighted: bool = False) -> Batch:
    """Each text as a document; labels from its token `learn_from` on."""
    rows = [torch.tensor(chat_tokenizer().encode_raw(text)) for text in texts]
    labels = [torch.cat((row[1:], torch.tensor([IGNORE]))) for row in rows]
    for label in labels:
        label[:learn_from] = IGNORE
    lengths = [len(row) for row in rows]
    return Batch(
        torch.cat(rows),
        torch.cat(labels),
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        weights=torch.linspace(0.1, 2, sum(lengths)) if weighted else None,
    )


def by_hand(
    student: Transformer, teacher: Transformer, own: Tokenizer, batch: Batch, T: float
) -> tuple[Tensor, int]:
    """Text by text: wherever both have read the same bytes, the sorted distance of what they expect next."""
    total, count = torch.zeros(()), 0
    for text, a, b in zip(TEXTS, batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        mine, theirs = batch.tokens[a:b], torch.tensor(own.encode_raw(text))
        q = student.logits(student(mine, torch.arange(len(mine)))) / T
        p = teacher.logits(teacher(theirs, torch.arange(len(theirs)))).detach() / T
        read = [
            [len(t.bytes_of(i)) for i in ids.tolist()] for t, ids in ((chat_tokenizer(), mine), (own, theirs))
        ]
        ends = [np.cumsum(lengths).tolist() for lengths in read]
        for i, end in enumerate(ends[0]):
            if batch.labels[a + i] != IGNORE and end in ends[1]:
                weight = 1.0 if batch.weights is None else float(batch.weights[a + i])
                j = ends[1].index(end)
                total = total + weight * uld(p[j].log_softmax(-1)[None], q[i].log_softmax(-1)[None])[0]
                count += 1
    return total, count


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_texts_one_by_one(
    student: Transformer, teacher: Transformer, own: Tokenizer, weighted: bool
) -> None:
    batch = make_batch(weighted=weighted)
    objective = Distill(
        teacher,
        divergence="uld",
        alpha=0.0,
        temperature=1.5,
        loss_chunk=5,
        tokenizers=(chat_tokenizer(), own),
    )
    loss = objective(student, batch)
    expected, count = by_hand(student, teacher, own, batch, 1.5)
    assert count == batch.trained_tokens  # a byte tokenizer has read what anybody has
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parameters = list(student.parameters())
    for a, b in zip(
        torch.autograd.grad(loss.total, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert (a - b).abs().max() < 1e-5
    aligned, weight = loss.metrics["distill/aligned"]
    assert float(aligned) == pytest.approx(objective.weight(batch), rel=1e-6) and weight == objective.weight(
        batch
    )
    assert all(describe(name) for name in loss.metrics)


def test_places_without_an_answer_learn_from_labels_alone(own: Tokenizer) -> None:
    """The other way round: bytes learn from words, and most bytes have no answer."""
    student = random_model(BASE.with_(vocab_size=own.vocab_size), 1)
    teacher = random_model(BASE.with_(vocab_size=chat_tokenizer().vocab_size), 2)
    rows = torch.tensor(own.encode_raw(TEXTS[1]))
    labels = torch.cat((rows[1:], torch.tensor([IGNORE])))
    batch = Batch(rows, labels, torch.arange(len(rows)), torch.tensor([0, len(rows)], dtype=torch.int32))
    objective = Distill(teacher, divergence="uld", loss_chunk=4, tokenizers=(own, chat_tokenizer()))
    loss = objective(student, batch)
    answered = float(loss.metrics["distill/aligned"][0])
    assert answered == len(chat_tokenizer().encode_raw(TEXTS[1])) - 1 < batch.trained_tokens
    ce, kd = (float(loss.metrics[f"distill/{n}"][0]) for n in ("ce", "kd"))
    assert loss.metrics["distill/kd"][1] == answered
    assert float(loss.total.detach()) == pytest.approx(0.5 * (ce + kd), rel=1e-5)
    loss.total.backward()


def test_one_tokenizer_is_the_plain_comparison(student: Transformer) -> None:
    tokenizer, batch = chat_tokenizer(), make_batch()
    wise = random_model(student.shape, 5)
    plain = Distill(wise, divergence="uld")(student, batch).total
    for align in ("offsets", "order"):
        other = Distill(wise, divergence="uld", tokenizers=(tokenizer, tokenizer), align=align)(
            student, batch
        )
        assert float(other.total.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)


def test_shared_beginnings_are_read_with_each_ending(
    student: Transformer, teacher: Transformer, own: Tokenizer
) -> None:
    whole = make_batch((TEXTS[0], TEXTS[0] + TEXTS[1]), learn_from=8)
    a, b = whole.cu_seqlens[1:].tolist()
    shared, positions = 8, whole.positions
    parts = [slice(0, shared), slice(shared, a), slice(a + shared, b)]
    take = torch.cat([torch.arange(b)[p] for p in parts])
    batch = Batch(
        whole.tokens[take], whole.labels[take], positions[take],
        torch.tensor([0, shared, a, b - shared], dtype=torch.int32),
        parents=torch.tensor([-1, 0, 0], dtype=torch.int32),
    )  # fmt: skip
    objective = Distill(teacher, divergence="uld", tokenizers=(chat_tokenizer(), own))
    expected, got = objective(student, whole), objective(student, batch)
    assert float(got.total.detach()) == pytest.approx(float(expected.total.detach()), rel=1e-5)
    assert float(got.metrics["distill/aligned"][0]) == float(expected.metrics["distill/aligned"][0]) > 20


def test_the_largest_and_the_rest_come_near(
    student: Transformer, teacher: Transformer, own: Tokenizer
) -> None:
    batch, values = make_batch(), []
    for k in (1, 8, 64, 10_000, 0):
        objective = Distill(teacher, divergence="uld", alpha=0.0, top_k=k, tokenizers=(chat_tokenizer(), own))
        values.append(float(objective(student, batch).total.detach()))
    assert values[:3] == sorted(values[:3]) and values[2] < values[-1]
    assert values[3] == pytest.approx(values[-1], rel=1e-4)


def test_hidden_states_of_the_same_places(student: Transformer, teacher: Transformer, own: Tokenizer) -> None:
    objective = Distill(
        teacher, divergence="uld", student_hidden=64, hidden_weight=1.0, tokenizers=(chat_tokenizer(), own)
    )
    loss = objective(student, make_batch(weighted=True))
    assert float(loss.metrics["distill/hidden"][1]) == pytest.approx(
        float(loss.metrics["distill/aligned"][0]), rel=1e-6
    )
    loss.total.backward()
    assert objective.projections[0].weight.grad.abs().sum() > 0


def test_no_label_and_no_answer(student: Transformer, teacher: Transformer, own: Tokenizer) -> None:
    batch = make_batch()
    batch.labels[:] = IGNORE
    loss = Distill(
        teacher, divergence="uld", student_hidden=64, hidden_weight=1.0, tokenizers=(chat_tokenizer(), own)
    )(student, batch)
    loss.total.backward()
    assert float(loss.total.detach()) == 0 and float(loss.metrics["distill/aligned"][0]) == 0


def test_only_uld_compares_vocabularies(teacher: Transformer, own: Tokenizer) -> None:
    with pytest.raises(UserError, match="one tokenizer"):
        Distill(teacher, divergence="forward", tokenizers=(chat_tokenizer(), own))
    with pytest.raises(UserError, match="offsets or order"):
        Distill(teacher, divergence="uld", tokenizers=(chat_tokenizer(), own), align="words")
