"""Distillation losses equal TRL's on the same tensors: values and gradients, through head and chunks.

TRL's conventions: `beta` weights the teacher in the mixture, 0 is forward and 1 reverse KL (as ours); the
temperature divides both logits and the loss is NOT multiplied by its square (ours is).
"""

from __future__ import annotations

import pytest
import torch
from model_support import BASE, random_model

from kllm.data.batch import IGNORE, Batch
from kllm.model.attention import PackedLayout
from kllm.model.transformer import Transformer
from kllm.objectives.distill import Distill, teacher_topk
from kllm.objectives.divergence import uld

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # trl calls its own losses experimental

TEACHER = BASE.with_(hidden_size=96, num_hidden_layers=3)
LENGTHS = (9, 23, 4, 31)


def make_batch(seed: int = 0) -> Batch:
    """Documents with labels on about half of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    tokens = torch.randint(0, BASE.vocab_size, (total,), generator=generator)
    labels = torch.randint(0, BASE.vocab_size, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.5] = IGNORE
    return Batch(
        tokens,
        labels,
        torch.cat([torch.arange(n) for n in LENGTHS]),
        torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
    )


@pytest.fixture(scope="module")
def models() -> tuple[Transformer, Transformer]:
    return random_model(BASE, 1), random_model(TEACHER, 2)


def logits_of(model: Transformer, batch: Batch) -> torch.Tensor:
    return model.logits(model(batch.tokens, batch.positions, PackedLayout(batch.cu_seqlens)))


def compare(student: Transformer, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-5 of their size, values and gradients of every parameter."""
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    parameters = list(student.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_generalised_jsd(models: tuple[Transformer, Transformer], beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = models
    batch = make_batch()
    objective = Distill(
        teacher, divergence="jsd", beta=beta, temperature=temperature, alpha=0.0, loss_chunk=7
    )
    ours = objective(student, batch).total / temperature**2 / objective.weight(batch)
    with torch.no_grad():
        taught = logits_of(teacher, batch)
    theirs = GKDTrainer.generalized_jsd_loss(
        logits_of(student, batch)[None], taught[None], batch.labels[None], beta=beta, temperature=temperature
    )
    compare(student, ours, theirs)


@pytest.mark.parametrize(("divergence", "beta"), [("forward", 0.0), ("reverse", 1.0)])
def test_plain_divergences_are_the_ends_of_jsd(
    models: tuple[Transformer, Transformer], divergence: str, beta: float
) -> None:
    student, teacher = models
    batch = make_batch(1)
    ours = Distill(teacher, divergence=divergence, alpha=0.0)(student, batch).total
    theirs = Distill(teacher, divergence="jsd", beta=beta, alpha=0.0)(student, batch).total
    compare(student, ours, theirs)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_top_k_with_tail(models: tuple[Transformer, Transformer], beta: float) -> None:
    """Stored top-k and a bucket for the rest: TRL's server distillation over the same outcomes."""
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket

    student, teacher = models
    batch, k = make_batch(2), 8
    batch.extras = teacher_topk(teacher, batch, k, temperature=1.5, chunk=5)
    ours = (
        Distill(None, divergence="jsd", beta=beta, temperature=1.5, alpha=0.0)(student, batch).total / 1.5**2
    )
    rows = batch.labels != IGNORE
    taught = (logits_of(teacher, batch).detach()[rows] / 1.5).log_softmax(-1).topk(k)
    mine = (logits_of(student, batch)[rows] / 1.5).log_softmax(-1).gather(1, taught.indices)
    mask = torch.ones_like(taught.indices, dtype=torch.bool)
    p, q = _add_tail_bucket(taught.values, mask)[0], _add_tail_bucket(mine, mask)[0]
    # TRL's loss of these outcomes: log-probabilities are logits that are already normalised
    theirs = GKDTrainer.generalized_jsd_loss(q[None], p[None], beta=beta, reduction="sum")
    compare(student, ours, theirs)


def test_universal_logit_distillation() -> None:
    """The sorted L1 distance of two vocabularies, as TRL's GOLD computes it position by position."""
    from trl.experimental.gold import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 12, 50, generator=generator, requires_grad=True)
    teacher = torch.randn(1, 12, 71, generator=generator)
    labels = torch.arange(12)[None]
    config = GOLDConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        use_uld_loss=True,
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        use_extended_uld=False,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        uld_token_merge_strategy="observed",
    )
    theirs = ULDLoss(config)(student, teacher, labels, labels, labels, labels)
    ours = uld(teacher[0].log_softmax(-1), student[0].log_softmax(-1)).mean()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    a, b = (torch.autograd.grad(x, student)[0] for x in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-6)
