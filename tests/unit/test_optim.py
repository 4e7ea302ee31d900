"""Groups, schedules and Muon."""

from __future__ import annotations

import pytest
import torch

from kllm.model.lora import LoraConfig, add_lora, lora_parameters
from kllm.model.presets import PRESETS
from kllm.model.transformer import Transformer
from kllm.optim.build import OptimConfig, build_optimizer, lr_scale
from kllm.optim.muon import newton_schulz

TINY = PRESETS["k-tiny"].with_(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)


def test_norms_and_embeddings_are_not_decayed() -> None:
    model = Transformer(TINY.with_(attention_bias=True))
    groups = build_optimizer(model.named_parameters(), OptimConfig()).optimizers["adamw"].param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        plain = parameter.dim() < 2 or "embed_tokens" in name
        assert decay[id(parameter)] == (0.0 if plain else 0.1), name
    assert len(decay) == len(list(model.parameters()))


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = Transformer(TINY)
    both = build_optimizer(model.named_parameters(), OptimConfig(name="muon")).optimizers
    matrices = {id(p) for g in both["muon"].param_groups for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in matrices}
    assert names == {n for n, _ in model.named_parameters() if "proj" in n}
    rest = {id(p) for g in both["adamw"].param_groups for p in g["params"]}
    assert not matrices & rest
    assert len(matrices | rest) == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8), (3, 8, 20)])
def test_newton_schulz_flattens_singular_values(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimisers_learn_and_resume_bit_exactly(name: str) -> None:
    def make() -> tuple:
        model = Transformer(TINY)
        model.init_weights(0)
        return model, build_optimizer(model.named_parameters(), OptimConfig(name=name, lr=1e-2))

    def step(model: Transformer, optimizer) -> float:
        optimizer.zero_grad()
        tokens = torch.arange(20)
        loss = torch.nn.functional.cross_entropy(model.logits(model(tokens, tokens))[:-1], tokens[1:])
        loss.backward()
        optimizer.step()
        return float(loss)

    model, optimizer = make()
    losses = [step(model, optimizer) for _ in range(6)]
    assert losses[-1] < losses[0] * 0.9
    first, first_optimizer = make()
    for _ in range(3):
        step(first, first_optimizer)
    second, second_optimizer = make()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    for _ in range(3):
        step(second, second_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
def test_schedules_rise_then_fall_to_the_floor(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, warmup=0.1, min_lr_ratio=0.1)
    scales = [lr_scale(s, 100, config) for s in range(100)]
    assert scales[:10] == sorted(scales[:10])
    assert 0 < scales[0] < 0.2
    assert max(scales) == pytest.approx(1.0)
    assert scales[10:] == sorted(scales[10:], reverse=True)
    assert scales[-1] == pytest.approx(0.1)
    if schedule == "wsd":
        assert scales[75] == 1.0
        assert scales[85] < 1.0


def test_constant_schedule_and_step_warmup() -> None:
    config = OptimConfig(schedule="constant", warmup=5)
    assert lr_scale(4, 100, config) < 1.0
    assert {lr_scale(s, 100, config) for s in range(5, 100)} == {1.0}
    assert lr_scale(0, 1, OptimConfig(warmup=0)) == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_lora_plus_makes_b_faster(name: str) -> None:
    """And DoRA's lengths of rows, vectors and stacks of them, are neither decayed nor orthogonalised."""
    moe = TINY.with_(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    model = Transformer(moe)
    model.init_weights(0)
    add_lora(model, LoraConfig(rank=2, use_dora=True, targets=("q_proj", "experts")), seed=0)
    config = OptimConfig(name=name, lr=1e-3, muon_lr=1e-2)
    plain, plus = (build_optimizer(model.named_parameters(), config, ratio) for ratio in (1.0, 16.0))
    names = {id(p): n for n, p in model.named_parameters()}
    rates, decays = {}, {}
    for kind, optimizer in plus.optimizers.items():
        for group in optimizer.param_groups:
            for p in group["params"]:
                rates[names[id(p)]], decays[names[id(p)]] = (kind, group["lr"]), group["weight_decay"]
    assert rates.keys() == lora_parameters(model).keys()
    base = 1e-2 if name == "muon" else 1e-3
    for n, rate in rates.items():
        if n.endswith("lora_magnitude"):
            assert (rate, decays[n]) == (("adamw", 1e-3), 0.0)
        else:
            assert rate == (name, pytest.approx(base * (16 if n.endswith("lora_B") else 1)))
            assert decays[n] == 0.1
    assert plus.set_scale(0.5) == plain.set_scale(0.5) == base / 2
    assert {g["lr"] for o in plain.optimizers.values() for g in o.param_groups} == {base / 2, 5e-4}
