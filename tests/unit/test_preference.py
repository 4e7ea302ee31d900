"""Preference losses against NumPy, in one packed forward with shared prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preference_support import MOE, TINY, Answer, pair_batch, random_answers, whole_batch
from torch import nn

from kllm.data.batch import IGNORE, Batch
from kllm.errors import UserError
from kllm.model.lora import LoraConfig, add_lora, lora_parameters
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer
from kllm.objectives.mismatch import mismatched
from kllm.objectives.preference import NEED_REFERENCE, Preference, _kl, _right, kto, reference_logprobs
from kllm.objectives.preference_eval import collapse_warning, evaluate_preference
from kllm.observe.metrics import describe
from kllm.train.device import Runtime

ANSWERS = random_answers(5)
CASES = [
    ("dpo", {}),
    ("dpo", {"length_normalised": True}),
    ("dpo", {"rpo_alpha": 0.7}),
    ("cdpo", {"label_smoothing": 0.2}),
    ("robust", {"label_smoothing": 0.2}),
    ("hinge", {}),
    ("ipo", {}),
    ("simpo", {"gamma": 0.3, "reference": "none"}),
    ("orpo", {"reference": "none"}),
    ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.8}),
]
IDS = [f"{loss}-{'-'.join(options) or 'plain'}" for loss, options in CASES]


def model_of(seed: int, shape: ModelShape = TINY, scale: float = 4.0) -> Transformer:
    """Random weights; a larger scale gives a surer model, which random answers surprise more."""
    model = Transformer(shape)
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(scale)
    return model


def with_reference(batch: Batch, reference: Transformer) -> Batch:
    return replace(batch, extras={"reference": reference_logprobs(reference, batch)})


def numpy_logp(model: Transformer, answer: Answer) -> float:
    """Summed log-probability of the answer's tokens."""
    return float(numpy_logps(model, answer).sum())


def numpy_logps(model: Transformer, answer: Answer) -> np.ndarray:
    """Log-probabilities of the answer's tokens, from the whole sequence's logits."""
    tokens = answer.tokens
    with torch.no_grad():
        logits = model.eval().logits(model(tokens, torch.arange(len(tokens)))).double().numpy()
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(len(answer.prompt) - 1, len(tokens) - 1)
    return logp[places, tokens.numpy()[places + 1]]


def numpy_loss(loss: str, policy: np.ndarray, ref: np.ndarray, sizes: np.ndarray, beta: float, **o) -> float:  # type: ignore[no-untyped-def]
    """The formulas of the papers, pair by pair, in float64. chosen = even, rejected = odd."""

    def s(x: float) -> float:
        return 1 / (1 + np.exp(-x))

    total, e = 0.0, o.get("label_smoothing", 0.0)
    ratio = policy - ref
    if o.get("length_normalised") or loss == "ipo":
        ratio = ratio / sizes
    mean = policy / sizes
    for c in range(0, len(policy), 2):
        r = c + 1
        h = ratio[c] - ratio[r]
        if loss == "dpo":
            total += -np.log(s(beta * h))
        elif loss == "cdpo":
            total += -(1 - e) * np.log(s(beta * h)) - e * np.log(s(-beta * h))
        elif loss == "robust":
            total += (-(1 - e) * np.log(s(beta * h)) + e * np.log(s(-beta * h))) / (1 - 2 * e)
        elif loss == "hinge":
            total += max(0.0, 1 - beta * h)
        elif loss == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
        elif loss == "simpo":
            total += -np.log(s(beta * mean[c] - beta * mean[r] - beta * o["gamma"]))
        elif loss == "orpo":
            odds = [np.exp(m) / (1 - np.exp(m)) for m in (mean[c], mean[r])]
            total += -mean[c] - beta * np.log(s(np.log(odds[0] / odds[1])))
        elif loss == "kto":
            total += o["desirable_weight"] * (1 - s(beta * ratio[c]))
            total += o["undesirable_weight"] * (1 - s(-beta * ratio[r]))
        total -= o.get("rpo_alpha", 0.0) * mean[c]
    return float(total)


@pytest.mark.parametrize(("loss", "options"), CASES, ids=IDS)
def test_losses_equal_numpy(loss: str, options: dict[str, object]) -> None:
    policy, reference = model_of(1), model_of(2)
    beta = 0.4
    objective = Preference(loss, beta, loss_chunk=7, **options)  # type: ignore[arg-type]
    batch = with_reference(pair_batch(ANSWERS), reference)
    sums = [np.array([numpy_logp(m, a) for a in ANSWERS]) for m in (policy, reference)]
    sizes = np.array([len(a.answer) for a in ANSWERS])
    settings = {k: v for k, v in options.items() if k != "reference"}
    expected = numpy_loss(loss, *sums, sizes, beta, **settings)
    out = objective(policy, batch)
    assert float(out.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert objective.weight(batch) == (10 if loss == "kto" else 5)
    assert float(out.metrics["train/loss"][0]) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]
    assert out.metrics["train/loss"][1] == objective.weight(batch)
    assert all(describe(name) for name in out.metrics)


@pytest.mark.parametrize(("loss", "options"), CASES, ids=IDS)
def test_shared_prompts_change_neither_loss_nor_gradient(loss: str, options: dict[str, object]) -> None:
    policy, reference = model_of(1), model_of(2)
    objective = Preference(loss, 0.4, **options)  # type: ignore[arg-type]
    grads, totals = [], []
    for batch in (pair_batch(ANSWERS), whole_batch(ANSWERS, rated=False)):
        policy.zero_grad()
        out = objective(policy, with_reference(batch, reference))
        out.total.backward()
        totals.append(float(out.total.detach()))
        grads.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("loss", sorted(NEED_REFERENCE))
def test_a_policy_that_is_its_reference_gets_the_loss_of_no_margin(loss: str) -> None:
    policy = model_of(1)
    batch = with_reference(pair_batch(ANSWERS), policy)
    out = Preference(loss, 0.5, label_smoothing=0.1 if loss in ("cdpo", "robust") else 0.0)(policy, batch)
    per_pair = {"hinge": 1.0, "ipo": 1.0, "kto": 1.0}.get(loss, np.log(2))
    assert float(out.total.detach()) == pytest.approx(5 * per_pair, rel=1e-5)
    assert float(out.metrics["rewards/margin"][0]) == pytest.approx(0, abs=1e-4)  # type: ignore[arg-type]
    assert float(out.metrics["logps/chosen_drift"][0]) == pytest.approx(0, abs=1e-4)  # type: ignore[arg-type]


def test_metrics_are_what_they_say() -> None:
    policy, reference = model_of(1), model_of(2)
    batch = with_reference(pair_batch(ANSWERS), reference)
    metrics = Preference("dpo", 0.3)(policy, batch).metrics
    now, then = (np.array([numpy_logp(m, a) for a in ANSWERS]) for m in (policy, reference))
    sizes = np.array([len(a.answer) for a in ANSWERS])
    rewards = 0.3 * (now - then)
    margin = rewards[0::2] - rewards[1::2]
    expected = {
        "rewards/chosen": rewards[0::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/margin": margin.mean(),
        "rewards/accuracy": (margin > 0).mean(),
        "logps/accuracy": (now[0::2] > now[1::2]).mean(),
        "logps/chosen": now[0::2].sum() / sizes[0::2].sum(),
        "logps/rejected": now[1::2].sum() / sizes[1::2].sum(),
        "logps/chosen_drift": (now - then)[0::2].sum() / sizes[0::2].sum(),
    }
    ratios = np.concatenate([numpy_logps(policy, a) - numpy_logps(reference, a) for a in ANSWERS])
    assert (ratios < 0).any() and (ratios > 0).any()
    expected["pref/kl"] = (np.exp(-ratios) - 1 + ratios).mean()
    assert 0 < expected["rewards/accuracy"] < 1
    for name, value in expected.items():
        total, weight = metrics[name]
        assert float(total) / float(weight) == pytest.approx(value, rel=1e-4), name  # type: ignore[arg-type]


def test_the_kl_of_an_answer_that_the_policy_left_is_finite() -> None:
    far = float(_kl(torch.tensor([-500.0])))
    assert far == pytest.approx(np.exp(10) - 11, rel=1e-6) and float(_kl(torch.tensor([0.0]))) == 0


def test_a_tie_is_half_right() -> None:
    assert _right(torch.tensor([2.0, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]


def test_loss_of_a_batch_is_the_sum_of_its_pairs() -> None:
    policy, reference = model_of(1), model_of(2)
    objective = Preference("cdpo", 0.2, label_smoothing=0.1, rpo_alpha=0.5)
    parts = [pair_batch(ANSWERS[i : i + 2]) for i in range(0, 10, 2)]
    apart = sum(float(objective(policy, with_reference(b, reference)).total.detach()) for b in parts)
    together = objective(policy, with_reference(pair_batch(ANSWERS), reference))
    assert float(together.total.detach()) == pytest.approx(apart, rel=1e-5)


def test_router_losses_of_a_mixture_of_experts_are_added() -> None:
    policy, reference = model_of(1, MOE), model_of(2, MOE)
    batch = with_reference(pair_batch(ANSWERS), reference)
    out = Preference("dpo", 0.1)(policy, batch)
    aux, weight = out.metrics["train/aux_loss"]
    assert weight == 5 and float(aux) > 0  # type: ignore[arg-type]
    loss = float(out.metrics["train/loss"][0])  # type: ignore[arg-type]
    assert float(out.total.detach()) == pytest.approx(loss + float(aux), rel=1e-6)  # type: ignore[arg-type]


def fake_adapters(monkeypatch: pytest.MonkeyPatch, model: Transformer, base: Transformer) -> None:
    """`adapters_off` that puts the base's weights into the model for a while."""

    @contextmanager
    def adapters_off(inner: nn.Module) -> Iterator[None]:
        assert inner is model
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(base.state_dict())
        yield
        model.load_state_dict(kept)

    monkeypatch.setitem(sys.modules, "kllm.model.lora", SimpleNamespace(adapters_off=adapters_off))


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_reference_of_the_model_without_its_adapter(loss: str) -> None:
    """A real adapter: its reference is the model it was added to, and gradients reach it alone."""
    policy, base = model_of(1), model_of(1)
    add_lora(policy, LoraConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lora_parameters(policy).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    batch = pair_batch(ANSWERS)
    live = Preference(loss, 0.3, reference="adapters_off")(policy, batch)
    cached = Preference(loss, 0.3)(policy, with_reference(batch, base))
    assert float(live.total.detach()) == pytest.approx(float(cached.total.detach()), rel=1e-5)
    assert abs(float(live.metrics["pref/kl"][0])) > 1  # type: ignore[arg-type]
    assert policy.training
    live.total.backward()
    grads = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert grads.keys() == lora_parameters(policy).keys()
    assert all(grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("scales", [(4.0, 12.0), (12.0, 4.0)], ids=["above", "clamped"])
@pytest.mark.parametrize("rated", [True, False], ids=["rated", "pairs"])
def test_kto_measures_its_reference_point_on_mismatched_answers(
    rated: bool, scales: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, base = (model_of(i, scale=scale) for i, scale in enumerate(scales))
    fake_adapters(monkeypatch, policy, base)
    batch = whole_batch(ANSWERS, rated=True) if rated else pair_batch(ANSWERS)
    shift = 1 if rated else 2
    others = [Answer(a.prompt, ANSWERS[i - shift].answer, True) for i, a in enumerate(ANSWERS)]
    ratios = np.array([numpy_logp(policy, a) - numpy_logp(base, a) for a in others])
    z = max(0.0, ratios.mean())
    out = Preference("kto", 0.05, reference="adapters_off")(policy, batch)
    total, weight = out.metrics["pref/z_ref"]
    assert (z > 1) == (scales == (4.0, 12.0))
    assert float(total) / float(weight) == pytest.approx(z, rel=1e-4)  # type: ignore[arg-type]
    own = torch.tensor([numpy_logp(policy, a) - numpy_logp(base, a) for a in ANSWERS])
    good = torch.tensor([a.good for a in ANSWERS])
    assert float(out.total.detach()) == pytest.approx(float(kto(own, good, z, 0.05).sum()), rel=1e-5)


def test_mismatched_answers_of_one_question_are_none() -> None:
    assert mismatched(whole_batch(ANSWERS[:1], rated=True)) is None
    assert mismatched(pair_batch(ANSWERS[:2])) is None
    both = mismatched(pair_batch(ANSWERS[:4]))
    assert both is not None and both.sequences is not None and both.sequences.count == 4
    first = both.tokens[: int(both.cu_seqlens[1])].tolist()
    assert first == [*ANSWERS[0].prompt, *ANSWERS[2].answer]
    labels = both.labels[: int(both.cu_seqlens[1])]
    assert labels[labels != IGNORE].tolist() == ANSWERS[2].answer


def test_bfloat16_reference_forward_leaves_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward without gradients must not leave its casts in autocast's cache."""
    policy, base = model_of(1), model_of(1)
    fake_adapters(monkeypatch, policy, base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Preference("kto", 0.3, reference="adapters_off")(policy, whole_batch(ANSWERS, rated=True))
    out.total.backward()
    grads = [p.grad for p in policy.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_evaluation_is_the_mean_over_all_pairs() -> None:
    policy, reference = model_of(1), model_of(2)
    objective = Preference("dpo", 0.3)
    batches = [with_reference(pair_batch(ANSWERS[a:b]), reference) for a, b in ((0, 2), (2, 10))]
    runtime = Runtime(torch.device("cpu"))
    result = evaluate_preference(policy, batches, runtime, objective)
    whole = objective(policy, with_reference(pair_batch(ANSWERS), reference)).metrics
    pairs = {
        "val/loss": "train/loss",
        "val/accuracy": "rewards/accuracy",
        "val/margin": "rewards/margin",
        "val/chosen_drift": "logps/chosen_drift",
    }
    for name, source in pairs.items():
        total, weight = whole[source]
        assert result[name] == pytest.approx(float(total) / float(weight), rel=1e-4), name  # type: ignore[arg-type]
    assert policy.training and all(describe(name) for name in result)
    rated = evaluate_preference(
        policy, [with_reference(whole_batch(ANSWERS, rated=True), reference)], runtime, Preference("kto")
    )
    assert {"val/loss", "val/accuracy", "val/margin", "val/chosen_drift"} <= rated.keys()
    assert "val/logp_accuracy" not in rated


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_without_reference_tells_the_drift_of_held_out_answers(loss: str) -> None:
    policy, start = model_of(1), model_of(2)
    batch = with_reference(pair_batch(ANSWERS), start)
    objective = Preference(loss, reference="none")
    result = evaluate_preference(policy, [batch], Runtime(torch.device("cpu")), objective)
    now, then = (np.array([numpy_logp(m, a) for a in ANSWERS])[0::2] for m in (policy, start))
    size = sum(len(a.answer) for a in ANSWERS[0::2])
    assert result["val/chosen_logp"] == pytest.approx(now.sum() / size, rel=1e-4)
    assert result["val/chosen_drift"] == pytest.approx((now - then).sum() / size, rel=1e-4)
    assert result["val/kl"] > 0
    assert float(objective(policy, batch).total.detach()) == pytest.approx(
        float(objective(policy, pair_batch(ANSWERS)).total.detach())
    )


def test_a_collapse_of_chosen_answers_is_said() -> None:
    assert collapse_warning(-0.1) is None and collapse_warning(0.3) is None
    assert "lost 0.80 nats per token" in str(collapse_warning(-0.8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dppo"}, "unknown preference loss"),
        ({"loss": "dpo", "reference": "none"}, "dpo needs a reference"),
        ({"loss": "kto", "reference": "none"}, "kto needs a reference"),
    ],
)
def test_bad_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preference(**options)  # type: ignore[arg-type]


def test_bad_batches() -> None:
    policy = model_of(1)
    with pytest.raises(UserError, match="no reference log-probabilities"):
        Preference("dpo")(policy, pair_batch(ANSWERS))
    with pytest.raises(UserError, match="learns from pairs"):
        Preference("dpo")(policy, whole_batch(ANSWERS, rated=True))
    with pytest.raises(UserError, match="no answers to compare"):
        Preference("dpo").weight(replace(pair_batch(ANSWERS), sequences=None))
