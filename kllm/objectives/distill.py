"""Distillation: the student learns a teacher's next-token distributions beside the labels.

L = alpha CE + (1 - alpha) T^2 D(p_T, q_T) + hidden_weight H, summed over labelled tokens, with p_T and
q_T the softmaxes of teacher and student at temperature T (Hinton et al. 2015, arXiv 1503.02531), D one
of `objectives.divergence`, and H the distance of hidden states through a trained projection (FitNets,
Romero et al. 2014; TinyBERT, Jiao et al. 2020, eq. 8). The divergence of uld is an L1 distance and is
taken without the T^2, as published.

On-policy distillation (GKD, Agarwal et al. 2024) is the same loss on a batch whose tokens the student
sampled, its labels being those tokens; alpha is then 0, for there is nothing to learn from them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kllm.data.batch import IGNORE, Batch
from kllm.errors import UserError
from kllm.model.attention import PackedLayout
from kllm.model.head_chunks import chunked_loss
from kllm.model.moe import RouterLog
from kllm.model.transformer import LayerLog, Transformer
from kllm.objectives.divergence import DIVERGENCES, student_with_tail, teacher_with_tail, uld
from kllm.objectives.lm import router_terms
from kllm.objectives.teacher import (
    LAST,
    CachedTeacher,
    ForeignTeacher,
    Lesson,
    LiveTeacher,
    Teacher,
    teacher_topk,
)
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.train.objective import Loss, unwrap

__all__ = ["Distill", "Teacher", "teacher_topk"]


class Distill(nn.Module):
    """Learns from a teacher; see the module's text.

    A module for the sake of the projections of the hidden states, its only parameters: they are to be
    trained, averaged over processes and saved with the student. The teacher is no part of it.

    Args:
        teacher: a model (read beside the student), a `Teacher`, or None for top-k kept in the batch
            (`teacher_topk`).
        student_hidden: the student's hidden size; needed with `hidden_weight`.
        divergence: forward, reverse, jsd, skew_forward, skew_reverse or uld.
        temperature: T, of both sides; stored top-k must have been made with the same.
        alpha: share of the cross-entropy of the labels, 0..1.
        beta: of jsd, 0..1.
        skew: of skew_forward and skew_reverse, 0..1, without 1.
        top_k: compare this many of the teacher's tokens and the rest as one (0 = all).
        hidden_weight: of the hidden states' distance; 0 = none.
        hidden_loss: "mse" (mean over the width) or "cosine" (1 - cosine).
        hidden_layers: pairs (student's block, teacher's block), -1 = after the final norm.
        loss_chunk: places whose logits are alive at once.
        tokenizers: (student's, teacher's) where they differ; the divergence is then uld.
        align: how places pair up then: "offsets" or "order" (`tokenizer.align.same_places`).

    Raises:
        UserError: an option out of range or without what it needs.
    """

    def __init__(
        self,
        teacher: Transformer | Teacher | None,
        *,
        student_hidden: int | None = None,
        divergence: str = "forward",
        temperature: float = 1.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        skew: float = 0.1,
        top_k: int = 0,
        hidden_weight: float = 0.0,
        hidden_loss: str = "mse",
        hidden_layers: Iterable[tuple[int, int]] = ((LAST, LAST),),
        loss_chunk: int = 1024,
        tokenizers: tuple[Tokenizer, Tokenizer] | None = None,
        align: str = "offsets",
    ) -> None:
        super().__init__()
        _check(divergence, temperature, {"alpha": alpha, "beta": beta, "skew": skew}, hidden_loss)
        self.divergence, self.temperature, self.alpha = divergence, temperature, alpha
        self.beta, self.skew, self.top_k, self.loss_chunk = beta, skew, top_k, loss_chunk
        self.teacher = _teacher(teacher, tokenizers, align)
        if divergence == "uld" and isinstance(self.teacher, CachedTeacher):
            raise UserError(
                "uld compares whole distributions, not a stored top-k",
                where="distill.top_k",
                hint="set it to 0, or take another divergence",
            )
        if isinstance(self.teacher, ForeignTeacher) and divergence != "uld":
            raise UserError(
                f"{divergence} needs teacher and student to have one tokenizer",
                where="distill.divergence",
                hint="take uld",
            )
        self.hidden_weight, self.hidden_loss = hidden_weight, hidden_loss
        self.hidden_layers = tuple(hidden_layers) if hidden_weight else ()
        self.projections = self._make_projections(student_hidden)

    def _make_projections(self, student_hidden: int | None) -> nn.ModuleList:
        if not self.hidden_layers:
            return nn.ModuleList()
        model = getattr(self.teacher, "model", None)
        if model is None or student_hidden is None:
            raise UserError(
                "stored probabilities have no hidden states",
                where="distill.hidden_weight",
                hint="set distill.top_k to 0: the teacher then runs beside the student",
            )
        _in_range(model.shape.num_hidden_layers, [theirs for _, theirs in self.hidden_layers], "teacher")
        device = model.head_weight.device
        return nn.ModuleList(
            _projection(student_hidden, model.shape.hidden_size, seed).to(device)
            for seed in range(len(self.hidden_layers))
        )

    def weight(self, batch: Batch) -> float:
        """Labelled tokens (their summed loss weights where the batch has some)."""
        if batch.weights is None:
            return float(batch.trained_tokens)
        return float(batch.weights[batch.labels != IGNORE].double().sum())

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed loss of the batch, shapes as in Batch."""
        inner = unwrap(model)
        layout = PackedLayout(batch.cu_seqlens, batch.tokens.device, batch.parents)
        router = RouterLog() if inner.shape.is_moe else None
        wanted = [mine for mine, _ in self.hidden_layers]
        _in_range(inner.shape.num_hidden_layers, wanted, "student")
        layers = LayerLog(frozenset(wanted) - {LAST})
        hidden = model(batch.tokens, batch.positions, layout, router, layers)
        rows = (batch.labels != IGNORE).nonzero().squeeze(1)
        lesson = self.teacher.lesson(batch, rows, tuple(theirs for _, theirs in self.hidden_layers))
        labels = batch.labels.index_select(0, rows)
        weights = None if batch.weights is None else batch.weights.index_select(0, rows)

        def compare(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            return self._chunk(logits, labels[part], None if weights is None else weights[part], lesson, part)

        total, sums = chunked_loss(hidden, inner.head_weight, rows, compare, self.loss_chunk, 4)
        ce, kd, agree, answered = sums.unbind()
        weight = self.weight(batch)
        metrics: dict[str, tuple[object, object]] = {"distill/ce": (ce, weight), "distill/kd": (kd, answered)}
        if isinstance(self.teacher, ForeignTeacher):
            metrics["distill/aligned"] = (answered, weight)
        else:
            metrics["distill/agreement"] = (agree, answered)
        if self.hidden_layers:
            states = [hidden if n == LAST else layers.states[n] for n in wanted]
            distance, count = self._hidden_distance(states, rows, weights, lesson)
            total = total + self.hidden_weight * distance
            metrics["distill/hidden"] = (distance.detach(), count)
        metrics["train/loss"] = (total.detach(), weight)
        if router is not None:
            aux, figures = router_terms(router, inner.shape, layout, weight)
            total = total + aux
            metrics.update(figures)
        return Loss(total, metrics)

    def _chunk(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None, lesson: Lesson, part: slice
    ) -> tuple[Tensor, Tensor]:
        """Loss of a chunk of logits [n, V], and [CE, divergence, agreements, answers], all summed."""
        if weights is None:
            weights = logits.new_ones(labels.shape[0])
        ce = F.cross_entropy(logits if self.alpha else logits.detach(), labels, reduction="none")
        ce = (ce * weights).sum()
        answers, which = lesson.within(part)
        if which is not None:
            chosen = torch.from_numpy(which).to(logits.device)
            logits, weights = logits.index_select(0, chosen), weights.index_select(0, chosen)
        kd, agree = self._distance(logits, lesson, answers)
        kd = (kd * weights).sum()
        scale = 1.0 if self.divergence == "uld" else self.temperature**2
        figures = torch.stack((ce.detach(), kd.detach(), (agree * weights).sum(), weights.sum()))
        return self.alpha * ce + (1 - self.alpha) * scale * kd, figures

    def _distance(self, logits: Tensor, lesson: Lesson, answers: slice) -> tuple[Tensor, Tensor]:
        """Divergence [n], and whether both sides' likeliest token is the same [n]."""
        top_k, T = self.top_k, self.temperature
        if self.divergence == "uld":
            p, _ = lesson.log_probabilities(answers, T)
            agree = p.argmax(dim=-1) == logits.argmax(dim=-1)
            return uld(p, (logits / T).log_softmax(dim=-1), top_k), agree
        p, ids = lesson.log_probabilities(answers, T, top_k, logits.shape[-1])
        if ids is None:
            if p.shape[-1] < logits.shape[-1]:
                logits = logits[:, : p.shape[-1]]
            best, q = p.argmax(dim=-1), (logits / T if T != 1 else logits).log_softmax(dim=-1)
        else:
            best = ids[:, 0]
            if ids.shape[-1] < logits.shape[-1]:
                p, q = teacher_with_tail(p), student_with_tail(logits / T if T != 1 else logits, ids)
            else:
                q = (logits / T).log_softmax(dim=-1).gather(1, ids)
        return DIVERGENCES[self.divergence](p, q, self.beta, self.skew), logits.argmax(dim=-1) == best

    def _hidden_distance(
        self, states: list[Tensor], rows: Tensor, weights: Tensor | None, lesson: Lesson
    ) -> tuple[Tensor, Tensor]:
        """Sum over places of the mean distance over the pairs of layers, and the places' summed weight."""
        if lesson.places is not None:
            chosen = torch.from_numpy(lesson.places).to(rows.device)
            rows = rows.index_select(0, chosen)
            weights = None if weights is None else weights.index_select(0, chosen)
        weights = torch.ones(rows.shape[0], device=rows.device) if weights is None else weights
        total = weights.new_zeros(())
        for projection, mine, theirs in zip(self.projections, states, lesson.states, strict=True):
            a, b = projection(mine.index_select(0, rows)).float(), theirs.float()
            if self.hidden_loss == "cosine":
                each = 1 - F.cosine_similarity(a, b, dim=-1)
            else:
                each = (a - b).square().mean(dim=-1)
            total = total + (each * weights).sum()
        return total / len(states), weights.sum()


def _check(divergence: str, temperature: float, shares: dict[str, float], hidden_loss: str) -> None:
    known = (*DIVERGENCES, "uld")
    if divergence not in known:
        raise UserError(
            f"unknown divergence {divergence!r}",
            where="distill.divergence",
            hint=f"known: {', '.join(known)}",
        )
    if temperature <= 0:
        raise UserError(f"must be above 0, not {temperature}", where="distill.temperature")
    for name, value in shares.items():
        if not 0 <= value <= 1 or (name == "skew" and value == 1):
            raise UserError(f"must be a share of 1, not {value}", where=f"distill.{name}")
    if hidden_loss not in ("mse", "cosine"):
        raise UserError(f"must be mse or cosine, not {hidden_loss!r}", where="distill.hidden_loss")


def _in_range(blocks: int, wanted: list[int], who: str) -> None:
    if bad := [n for n in wanted if not LAST <= n < blocks]:
        raise UserError(
            f"the {who} has blocks 0 to {blocks - 1}, not {bad[0]}", where="distill.hidden_layers"
        )


def _teacher(
    teacher: Transformer | Teacher | None, tokenizers: tuple[Tokenizer, Tokenizer] | None, align: str
) -> Teacher:
    if teacher is None:
        return CachedTeacher()
    if not isinstance(teacher, Transformer):
        return teacher
    if align not in ("offsets", "order"):
        raise UserError(f"must be offsets or order, not {align!r}", where="distill.align")
    return LiveTeacher(teacher) if tokenizers is None else ForeignTeacher(teacher, *tokenizers, by=align)


def _projection(student: int, teacher: int, seed: int) -> nn.Linear:
    """From the student's width to the teacher's: the identity where they are equal, else random rows."""
    layer = nn.Linear(student, teacher, bias=False)
    with torch.no_grad():
        if student == teacher:
            nn.init.eye_(layer.weight)
        else:
            nn.init.normal_(layer.weight, std=student**-0.5, generator=torch.Generator().manual_seed(seed))
    return layer
