"""Preference losses against TRL's own trainers: padded batches, whole logits, live reference.

TRL's loss methods run on its collators' batches and transformers' model; ours on packed rows with
shared prompts. Values and gradients of every weight agree. Where TRL departs from a paper (the SFT
terms of RPO and ORPO are means over all tokens of a batch, ORPO's over the prompt too) the example is
chosen so that both are the same: one pair, and for ORPO a prompt of one token.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_support import BASE, random_model
from preference_support import Answer, pair_batch, random_answers, whole_batch
from torch import Tensor, nn

from kllm.data.batch import IGNORE, Batch
from kllm.export.hf import save_model
from kllm.model.transformer import Transformer
from kllm.objectives import preference
from kllm.objectives.preference import Preference, reference_logprobs

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

ANSWERS = random_answers(4, vocab=97)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """policy and reference, of ours and of transformers."""
    found: dict[str, Any] = {}
    for seed, name in enumerate(("policy", "reference")):
        folder = tmp_path_factory.mktemp(name) / "m"
        found[name] = random_model(BASE, seed)
        save_model(found[name], None, folder)
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
        found["hf_" + name] = hf.float().eval()
    return SimpleNamespace(**found)


class Accelerator:
    """One process on the CPU."""

    device = torch.device("cpu")

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


def trainer(cls: type, models: SimpleNamespace, **settings: Any) -> Any:
    """A TRL trainer with no data, no optimiser: only what its loss reads."""
    stub = object.__new__(cls)
    common = {
        "model": models.hf_policy,
        "ref_model": models.hf_reference,
        "accelerator": Accelerator(),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "precompute_ref_logps": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "beta": 0.3,
        "label_smoothing": 0.0,
    }
    for name, value in {**common, **settings}.items():
        setattr(stub, name, value)
    return stub


def same(ours: Tensor, theirs: Tensor, models: SimpleNamespace) -> None:
    """Equal values, and equal gradients of every weight."""
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-5)
    mine = dict(models.policy.named_parameters())
    hf = {n: p for n, p in models.hf_policy.named_parameters() if n in mine}
    assert len(hf) == len(mine)
    got = torch.autograd.grad(ours, [mine[n] for n in hf])
    want = torch.autograd.grad(theirs, list(hf.values()))
    for name, a, b in zip(hf, got, want, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max())), name
    assert max(float(g.abs().max()) for g in got) > 1e-3


def with_reference(batch: Batch, reference: Transformer) -> Batch:
    return replace(batch, extras={"reference": reference_logprobs(reference, batch)})


def dpo_loss(models: SimpleNamespace, answers: list[Answer], kinds: list[str], **settings: Any) -> Any:
    """(loss, metrics) of trl.DPOTrainer."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    rows = [
        {"prompt_ids": c.prompt, "chosen_ids": c.answer, "rejected_ids": r.answer}
        for c, r in zip(answers[0::2], answers[1::2], strict=True)
    ]
    options = {
        "loss_types": kinds,
        "loss_weights": [1.0] * len(kinds),
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
    }
    stub = trainer(DPOTrainer, models, **{**options, **settings})
    inputs = DataCollatorForPreference(pad_token_id=0)(rows)
    return stub._compute_loss(models.hf_policy, inputs, False), stub._metrics["eval"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("sigmoid", {"loss": "dpo"}),
        ("sigmoid_norm", {"loss": "dpo", "length_normalised": True}),
        ("ipo", {"loss": "ipo"}),
        ("hinge", {"loss": "hinge"}),
        ("robust", {"loss": "robust", "label_smoothing": 0.15}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_dpo_trainer(theirs: str, ours: dict[str, Any], models: SimpleNamespace) -> None:
    expected, figures = dpo_loss(models, ANSWERS, [theirs], label_smoothing=ours.get("label_smoothing", 0.0))
    batch = with_reference(pair_batch(ANSWERS), models.reference)
    out = Preference(beta=0.3, **ours)(models.policy, batch)
    same(out.total / 4, expected, models)
    if theirs == "sigmoid":
        pairs = {"accuracy": "accuracies", "margin": "margins", "chosen": "chosen", "rejected": "rejected"}
        for name, their_name in pairs.items():
            total, weight = out.metrics[f"rewards/{name}"]
            value = float(total) / float(weight)  # type: ignore[arg-type]
            assert value == pytest.approx(figures[f"rewards/{their_name}"][-1], rel=1e-4, abs=1e-5), name


def test_cdpo_is_dpo_trainers_smoothed_loss_of_a_pair(models: SimpleNamespace) -> None:
    """TRL 1.9's sigmoid ignores label_smoothing; its aot applies cDPO's formula, and sorts over pairs."""
    expected, _ = dpo_loss(models, ANSWERS[:2], ["aot"], label_smoothing=0.2)
    batch = with_reference(pair_batch(ANSWERS[:2]), models.reference)
    same(Preference("cdpo", 0.3, label_smoothing=0.2)(models.policy, batch).total, expected, models)


def test_rpo_is_dpo_trainers_sigmoid_and_sft(models: SimpleNamespace) -> None:
    expected, _ = dpo_loss(models, ANSWERS[2:4], ["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    batch = with_reference(pair_batch(ANSWERS[2:4]), models.reference)
    same(Preference("dpo", 0.3, rpo_alpha=0.7)(models.policy, batch).total, expected, models)


@contextmanager
def _reference_weights(model: Transformer, reference: Transformer) -> Iterator[None]:
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(reference.state_dict())
    yield
    model.load_state_dict(kept)


@pytest.mark.parametrize("scale", [0.2, 3.0], ids=["z_ref-clamped", "z_ref-above-0"])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_trainer(
    kind: str, scale: float, models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a live reference the KL of mismatched answers, as in TRL; with a cached one its APO-zero."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

    def adapters_off(model: nn.Module) -> Any:
        assert model is models.policy
        return _reference_weights(models.policy, models.reference)

    monkeypatch.setitem(sys.modules, "kllm.model.lora", SimpleNamespace(adapters_off=adapters_off))
    for each in (models.reference, models.hf_reference):  # a surer or vaguer reference
        head = each.lm_head.weight
        monkeypatch.setattr(head, "data", head.data * scale)
    rows = [
        {
            "prompt_ids": a.prompt,
            "completion_ids": a.answer,
            "KL_completion_ids": ANSWERS[i - 1].answer,
            "label": a.good,
        }
        for i, a in enumerate(ANSWERS)
    ]
    settings = {
        "loss_type": kind,
        "calculate_KL": kind == "kto",
        "use_liger_kernel": False,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.9,
        "beta": 0.05,
    }
    stub = trainer(KTOTrainer, models, **settings)
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0)(rows)
    expected = stub._compute_loss(models.hf_policy, inputs, False)
    batch = with_reference(whole_batch(ANSWERS, rated=True), models.reference)
    reference: preference.Reference = "adapters_off" if kind == "kto" else "cached"
    objective = Preference("kto", 0.05, reference=reference, desirable_weight=1.3, undesirable_weight=0.9)
    out = objective(models.policy, batch)
    z_ref = float(out.metrics["pref/z_ref"][0]) / 8  # type: ignore[arg-type]
    assert z_ref == pytest.approx(stub._metrics["eval"]["kl"][-1], rel=1e-4, abs=1e-5)
    assert (z_ref > 0) == (kind == "kto" and scale > 1)
    same(out.total / 8, expected, models)


def padded(answers: list[Answer]) -> dict[str, Tensor]:
    """The batch of TRL's ORPO and CPO trainers."""
    batch: dict[str, Tensor] = {}
    for offset, side in enumerate(("chosen", "rejected")):
        some = answers[offset::2]
        length = max(len(a.tokens) for a in some)
        ids = torch.zeros(len(some), length, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        for i, a in enumerate(some):
            n, p = len(a.tokens), len(a.prompt)
            ids[i, :n], mask[i, :n], labels[i, p:n] = a.tokens, 1, a.tokens[p:]
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return batch


def test_orpo_trainer(models: SimpleNamespace) -> None:
    from trl.experimental.orpo import ORPOTrainer

    stub = trainer(ORPOTrainer, models, padding_value=0)
    pair = [Answer(a.prompt[:1], a.answer, a.good) for a in ANSWERS[2:4]]
    expected, _ = stub.get_batch_loss_metrics(models.hf_policy, padded(pair), "eval")
    objective = Preference("orpo", 0.3, reference="none")
    same(objective(models.policy, whole_batch(pair, rated=False)).total, expected, models)
    # more pairs: the odds ratio's part alone, for TRL's likelihood is of the prompt too
    chosen, rejected, _, _, _ = stub.concatenated_forward(models.hf_policy, padded(ANSWERS))
    odds = -stub.odds_ratio_loss(chosen, rejected)[0].mean()
    out = objective(models.policy, pair_batch(ANSWERS))
    sft, weight = out.metrics["train/sft_loss"]
    likelihood = float(sft) / float(weight)  # type: ignore[arg-type]
    assert float(out.total.detach()) / 4 - likelihood == pytest.approx(float(odds.detach()), rel=1e-4)
    assert likelihood == pytest.approx(-float(chosen.detach().mean()), rel=1e-5)


def test_simpo_of_cpo_trainer(models: SimpleNamespace) -> None:
    from trl.experimental.cpo import CPOTrainer

    stub = trainer(
        CPOTrainer, models, loss_type="simpo", simpo_gamma=0.6, beta=2.0, alpha=0.0, cpo_alpha=0.0,
        pad_token_id=0,
    )  # fmt: skip
    expected, _ = stub.get_batch_loss_metrics(models.hf_policy, padded(ANSWERS), "eval")
    objective = Preference("simpo", 2.0, gamma=0.3, reference="none")  # a share of beta
    same(objective(models.policy, pair_batch(ANSWERS)).total / 4, expected, models)


def test_functions_of_fixed_tensors() -> None:
    """CPOTrainer's formulas on log-ratios are DPO's, cDPO's and the hinge's."""
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 3
    for kind, smoothing, ours in (
        ("sigmoid", 0.0, preference.dpo(chosen, rejected, 0.3)),
        ("sigmoid", 0.2, preference.cdpo(chosen, rejected, 0.3, 0.2)),
        ("hinge", 0.0, preference.hinge(chosen, rejected, 0.3)),
        ("ipo", 0.0, preference.ipo(chosen, rejected, 0.3)),
    ):
        stub = object.__new__(CPOTrainer)
        stub.alpha, stub.beta, stub.loss_type, stub.label_smoothing = 0.0, 0.3, kind, smoothing
        stub.accelerator = Accelerator()
        theirs = stub.cpo_loss(chosen, rejected)[0]
        assert (ours - theirs).abs().max() < 1e-5, kind
