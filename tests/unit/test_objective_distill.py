"""The distillation objective against plain formulas on whole logits, and its promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_support import BASE, MOE, random_model
from torch import Tensor

from kllm.data.batch import IGNORE, Batch
from kllm.errors import KllmError, UserError
from kllm.model.attention import PackedLayout
from kllm.model.transformer import Transformer
from kllm.objectives.distill import Distill, teacher_topk
from kllm.observe.metrics import describe

TEACHER = BASE.with_(hidden_size=96, num_hidden_layers=3, tie_word_embeddings=False)
LENGTHS = (9, 23, 4, 31)
NAMES = ("forward", "reverse", "jsd", "skew_forward", "skew_reverse", "uld")


def make_batch(seed: int = 0, weighted: bool = False, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """Documents with labels on about half of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    labels = torch.randint(0, BASE.vocab_size, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.5] = IGNORE
    return Batch(
        torch.randint(0, BASE.vocab_size, (total,), generator=generator),
        labels,
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        weights=torch.rand(total, generator=generator) if weighted else None,
    )


@pytest.fixture
def student() -> Transformer:
    return random_model(BASE, 1)


@pytest.fixture
def teacher() -> Transformer:
    return random_model(TEACHER, 2)


def logits_of(model: Transformer, batch: Batch) -> Tensor:
    return model.logits(model(batch.tokens, batch.positions, PackedLayout(batch.cu_seqlens)))


def plain(name: str, p: Tensor, q: Tensor, beta: float, skew: float) -> Tensor:
    """The papers' formulas on probabilities."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = beta * p + (1 - beta) * q
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_forward": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew_reverse": lambda: kl(q, (1 - skew) * p + skew * q),
        "uld": lambda: (p.sort(-1).values - q.sort(-1).values).abs().sum(-1),
    }[name]()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_equals_whole_logits(student: Transformer, teacher: Transformer, name: str, weighted: bool) -> None:
    batch = make_batch(0, weighted)
    T, alpha, beta, skew = 1.7, 0.3, 0.2, 0.15
    objective = Distill(
        teacher, divergence=name, temperature=T, alpha=alpha, beta=beta, skew=skew, loss_chunk=6
    )
    loss = objective(student, batch)
    rows = batch.labels != IGNORE
    w = torch.ones(int(rows.sum())) if batch.weights is None else batch.weights[rows]
    mine, taught = logits_of(student, batch)[rows], logits_of(teacher, batch)[rows].detach()
    ce = (F.cross_entropy(mine, batch.labels[rows], reduction="none") * w).sum()
    each = plain(name, (taught.double() / T).softmax(-1), (mine.double() / T).softmax(-1), beta, skew)
    kd = (each * w).sum()
    total = alpha * ce + (1 - alpha) * (1 if name == "uld" else T * T) * kd
    assert float(loss.total.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    parameters = list(student.parameters())
    for a, b in zip(
        torch.autograd.grad(loss.total, parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))
    weight = objective.weight(batch)
    agree = ((mine.argmax(-1) == taught.argmax(-1)) * w).sum()
    means = {name: float(a) / float(b) for name, (a, b) in loss.metrics.items()}
    expected = {"train/loss": total, "distill/ce": ce, "distill/kd": kd, "distill/agreement": agree}
    assert weight == pytest.approx(float(w.sum()), rel=1e-6) and means.keys() == expected.keys()
    for key, value in expected.items():
        assert means[key] == pytest.approx(float(value.detach()) / weight, rel=1e-4)
        assert describe(key)


def test_a_step_is_the_same_however_it_is_cut(student: Transformer, teacher: Transformer) -> None:
    objective = Distill(teacher, divergence="jsd", top_k=9)
    whole = make_batch(3)
    total = objective(student, whole).total.detach()
    parts = []
    for n, (a, b) in enumerate(zip(whole.cu_seqlens[:-1], whole.cu_seqlens[1:], strict=True)):
        take = slice(int(a), int(b))
        parts.append(
            Batch(
                whole.tokens[take],
                whole.labels[take],
                whole.positions[take],
                torch.tensor([0, LENGTHS[n]], dtype=torch.int32),
            )
        )
    assert sum(objective.weight(b) for b in parts) == objective.weight(whole)
    assert float(sum(objective(student, b).total.detach() for b in parts)) == pytest.approx(
        float(total), rel=1e-5
    )


def test_the_teacher_only_teaches(student: Transformer, teacher: Transformer) -> None:
    teacher.train()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    objective = Distill(teacher)
    objective(student, make_batch()).total.backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    assert list(objective.parameters()) == [] and objective.state_dict() == {}
    assert all(p.grad is not None for p in student.parameters())


def test_no_logits_of_a_whole_batch(
    student: Transformer, teacher: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = Tensor.log_softmax

    def spy(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        sizes.append(self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "log_softmax", spy)
    Distill(teacher, loss_chunk=8)(student, make_batch()).total.backward()
    assert len(sizes) > 6 and max(sizes) <= 8 * BASE.vocab_size


@pytest.mark.parametrize("name", NAMES[:-1])
def test_top_k_approaches_from_below(student: Transformer, teacher: Transformer, name: str) -> None:
    """Merging outcomes loses information: each divergence grows with k to that of all outcomes."""
    batch = make_batch(4)
    values = []
    for k in (1, 4, 16, 64, BASE.vocab_size - 1, BASE.vocab_size):
        objective = Distill(teacher, divergence=name, top_k=k, alpha=0.0, temperature=1.3)
        values.append(float(objective(student, batch).total.detach()))
    exact = Distill(teacher, divergence=name, alpha=0.0, temperature=1.3)(student, batch)
    assert all(a <= b * (1 + 1e-5) for a, b in zip(values, values[1:], strict=False))
    assert values[0] > 0 and values[-1] == pytest.approx(float(exact.total.detach()), rel=1e-5)
    assert values[-2] == pytest.approx(values[-1], rel=1e-5)


@pytest.mark.parametrize("k", [5, BASE.vocab_size])
def test_stored_top_k_is_live_top_k(student: Transformer, teacher: Transformer, k: int) -> None:
    batch = make_batch(5)
    live = Distill(teacher, top_k=k, temperature=2.0)(student, batch)
    stored = teacher_topk(teacher, batch, k, 2.0, chunk=7)
    assert stored["teacher_ids"].shape == stored["teacher_logprobs"].shape == (sum(LENGTHS), k)
    assert not stored["teacher_ids"][batch.labels == IGNORE].any()
    batch.extras = stored
    cached = Distill(None, temperature=2.0, loss_chunk=11)(student, batch)
    assert float(cached.total.detach()) == pytest.approx(float(live.total.detach()), rel=1e-5)
    for name, (a, b) in live.metrics.items():
        assert float(cached.metrics[name][0]) == pytest.approx(float(a), rel=1e-5), name
        assert float(cached.metrics[name][1]) == float(b)
    batch.extras = {**stored, "teacher_logprobs": stored["teacher_logprobs"].half()}
    half = Distill(None, temperature=2.0)(student, batch)
    assert float(half.total.detach()) == pytest.approx(float(live.total.detach()), rel=2e-3)


def test_a_larger_vocabulary_on_either_side_is_cut(teacher: Transformer) -> None:
    """Padded rows of an embedding are no tokens: the common ones are compared."""
    wide = random_model(TEACHER.with_(vocab_size=112), 2)
    batch = make_batch(6)
    for mine, theirs in (
        (random_model(BASE, 1), wide),
        (random_model(BASE.with_(vocab_size=112), 1), teacher),
    ):
        rows, common = batch.labels != IGNORE, BASE.vocab_size
        p, q = (logits_of(m, batch)[rows][:, :common].detach().softmax(-1) for m in (theirs, mine))
        for k in (0, common):
            loss = Distill(theirs, alpha=0.0, top_k=k)(mine, batch)
            if not (k and mine.shape.vocab_size > common):
                assert float(loss.total.detach()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_shared_beginnings_are_read_by_both(student: Transformer, teacher: Transformer) -> None:
    """Two answers to one prompt in one row, as sampling leaves them, are two whole conversations."""
    generator = torch.Generator().manual_seed(0)
    prompt, one, two = (torch.randint(0, 97, (n,), generator=generator) for n in (7, 5, 9))

    def batch(tokens: list[Tensor], parents: list[int] | None, starts: list[int], learn: list[int]) -> Batch:
        labels = torch.cat(
            [torch.full_like(t, IGNORE) if s < 0 else t.roll(-1) for t, s in zip(tokens, learn, strict=True)]
        )
        lengths = [len(t) for t in tokens]
        return Batch(
            torch.cat(tokens), labels,
            torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]),
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            parents=None if parents is None else torch.tensor(parents, dtype=torch.int32),
        )  # fmt: skip

    objective = Distill(teacher, divergence="reverse", alpha=0.0)
    shared = batch([prompt, one, two], [-1, 0, 0], [0, 7, 7], [-1, 0, 0])
    alone = 0.0
    for answer in (one, two):
        both = batch([torch.cat((prompt, answer))], None, [0], [0])
        both.labels[:7] = IGNORE
        both.labels[7:] = answer.roll(-1)
        alone += float(objective(student, both).total.detach())
    assert float(objective(student, shared).total.detach()) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_states(student: Transformer, teacher: Transformer, kind: str) -> None:
    batch = make_batch(7, weighted=True)
    objective = Distill(
        teacher, student_hidden=64, hidden_weight=0.5, hidden_loss=kind, hidden_layers=[(0, 1), (-1, -1)]
    )
    without = Distill(teacher)(student, batch).total
    loss = objective(student, batch)
    total, weight = loss.metrics["distill/hidden"]
    assert float(weight) == pytest.approx(objective.weight(batch), rel=1e-5)
    assert float((loss.total - without).detach()) == pytest.approx(0.5 * float(total), rel=1e-4)
    # by hand: block outputs are what the next block's norm reads
    seen: dict[str, Tensor] = {}
    for name, model, block in (("mine", student, 1), ("theirs", teacher, 2)):
        model.model.layers[block].register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    hidden = [m(batch.tokens, batch.positions, PackedLayout(batch.cu_seqlens)) for m in (student, teacher)]
    rows, by_hand = batch.labels != IGNORE, torch.zeros(())
    for projection, a, b in zip(
        objective.projections, (seen["mine"], hidden[0]), (seen["theirs"], hidden[1]), strict=True
    ):
        a, b = a[rows] @ projection.weight.T, b[rows]
        each = (a - b).square().mean(-1) if kind == "mse" else 1 - F.cosine_similarity(a, b, dim=-1)
        by_hand = by_hand + (each * batch.weights[rows]).sum() / 2
    assert float(total) == pytest.approx(float(by_hand.detach()), rel=1e-5)
    inside = student.model.layers[0].mlp.up_proj.weight
    (plain_grad,), (mine,) = (
        torch.autograd.grad(x, inside, retain_graph=True) for x in (without, loss.total)
    )
    (expected,) = torch.autograd.grad(by_hand, inside)
    assert torch.allclose(mine - plain_grad, 0.5 * expected, atol=1e-5)
    objective(student, batch).total.backward()
    assert [name for name, _ in objective.named_parameters()] == [
        "projections.0.weight",
        "projections.1.weight",
    ]
    assert all(p.shape == (96, 64) and p.grad.abs().sum() > 0 for p in objective.parameters())
    again = Distill(
        teacher, student_hidden=64, hidden_weight=0.5, hidden_loss=kind, hidden_layers=[(0, 1), (-1, -1)]
    )
    with torch.no_grad():
        again.projections[0].weight.zero_()
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(student, batch).total, loss.total)


def test_a_copy_of_the_teacher_has_nothing_to_learn(teacher: Transformer) -> None:
    copy = random_model(TEACHER, 2)
    objective = Distill(teacher, alpha=0.0, student_hidden=96, hidden_weight=1.0)
    loss = objective(copy, make_batch())
    assert abs(float(loss.total.detach())) < 1e-4
    a, b = loss.metrics["distill/agreement"]
    assert float(a) == float(b)


@pytest.mark.parametrize("top_k", [0, 5])
def test_agreement_is_a_weighted_share(teacher: Transformer, top_k: int) -> None:
    near = random_model(TEACHER, 2)
    with torch.no_grad():
        near.lm_head.weight += 0.05 * torch.randn(
            near.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    batch = make_batch(2, weighted=True)
    rows = batch.labels != IGNORE
    same = logits_of(near, batch)[rows].argmax(-1) == logits_of(teacher, batch)[rows].argmax(-1)
    total, weight = Distill(teacher, top_k=top_k, loss_chunk=4)(near, batch).metrics["distill/agreement"]
    assert 0 < int(same.sum()) < len(same)
    assert float(total) == pytest.approx(float((same * batch.weights[rows]).sum()), rel=1e-5)
    assert float(weight) == pytest.approx(float(batch.weights[rows].sum()), rel=1e-5)


def test_mixtures_of_experts(teacher: Transformer) -> None:
    shape = BASE.with_(**MOE, router_aux_loss_coef=0.01)
    student, wise = random_model(shape, 3), random_model(BASE.with_(**MOE, qk_norm=True), 4)
    loss = Distill(wise, alpha=0.0)(student.train(), make_batch())
    assert {"train/aux_loss", "moe/load_max"} < loss.metrics.keys()
    aux, _ = loss.metrics["train/aux_loss"]
    assert float(loss.total.detach()) == pytest.approx(float(loss.metrics["train/loss"][0] + aux), rel=1e-5)
    loss.total.backward()
    assert student.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_student_learns_the_teacher(teacher: Transformer, name: str) -> None:
    """A few steps on random text: the distance falls, by any divergence, with no label."""
    student = Transformer(BASE)
    student.init_weights(0)
    objective, batch, seen = Distill(teacher, divergence=name, alpha=0.0), make_batch(0), []
    parameters = list(student.parameters())
    for _ in range(8):
        loss = objective(student, batch)
        seen.append(float(loss.total.detach()))
        grads = torch.autograd.grad(loss.total, parameters)
        size = torch.stack([g.norm() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= 0.5 * g / size
    assert min(seen) < 0.9 * seen[0], seen


def test_in_16_bit_it_stays_near(student: Transformer, teacher: Transformer) -> None:
    batch = make_batch()
    exact = Distill(teacher)(student, batch).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = Distill(teacher)(student, batch).total
    near.backward()
    assert near.dtype == torch.float32
    assert float(near.detach()) == pytest.approx(float(exact.detach()), rel=0.03)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"divergence": "kl"}, "distill.divergence"),
        ({"temperature": 0.0}, "distill.temperature"),
        ({"alpha": 1.5}, "distill.alpha"),
        ({"beta": -0.1}, "distill.beta"),
        ({"skew": 1.0}, "distill.skew"),
        ({"hidden_weight": 1.0, "hidden_loss": "l1", "student_hidden": 64}, "distill.hidden_loss"),
        ({"hidden_weight": 1.0, "student_hidden": 64, "teacher": None}, "distill.hidden_weight"),
        ({"divergence": "uld", "teacher": None}, "distill.top_k"),
    ],
)
def test_bad_options_are_named(teacher: Transformer, options: dict[str, object], where: str) -> None:
    with pytest.raises(UserError) as e:
        Distill(**{"teacher": teacher, **options})  # type: ignore[arg-type]
    assert e.value.where == where


def test_a_cache_that_is_not_there(student: Transformer, teacher: Transformer) -> None:
    with pytest.raises(KllmError, match="no teacher"):
        Distill(None)(student, make_batch())
    with pytest.raises(UserError, match="between 1 and"):
        teacher_topk(teacher, make_batch(), BASE.vocab_size + 1)
