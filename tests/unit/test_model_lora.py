"""Adapters in a model: nothing changes until they are trained, only they are trained, and they merge away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_support import BASE, SHAPES, random_model
from torch import Tensor

from kllm.data.batch import Batch, Piece
from kllm.errors import UserError
from kllm.model import lora_layers
from kllm.model.lora import (
    LoraConfig,
    adapters_off,
    add_lora,
    load_lora_state,
    lora_pairs,
    lora_parameters,
    lora_state,
    merge_lora,
)
from kllm.model.quantize import int4_groups, int8_rows
from kllm.model.transformer import Transformer
from kllm.objectives.lm import LanguageModeling

TOKENS = torch.randint(0, 97, (33,), generator=torch.Generator().manual_seed(0))
EVERYTHING = ("all", "experts", "router")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "pissa-dora": {"init": "pissa", "use_dora": True},
}
MOE = SHAPES["qwen2-moe-shared"]


def hidden(model: Transformer, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens, torch.arange(len(tokens)))


def adapted(name: str = "llama-bias", seed: int = 0, move: float = 0.05, **options: Any) -> Transformer:
    """A random model with adapters of rank 4 that were moved from their start."""
    shape = SHAPES[name]
    model = random_model(shape)
    targets = EVERYTHING if shape.is_moe else ("all",)
    add_lora(model, LoraConfig(**{"rank": 4, "alpha": 6, "targets": targets} | options), seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=move)
    return model


def gradients(model: Transformer) -> dict[str, Tensor]:
    model.zero_grad()
    hidden(model).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- a new adapter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-bias", "qwen2-moe-gated"])
def test_a_new_adapter_changes_nothing_and_is_all_that_learns(name: str, kind: str) -> None:
    plain = random_model(SHAPES[name])
    model = adapted(name, move=0.0, **KINDS[kind])
    ours, wanted = hidden(model), hidden(plain)
    if kind == "lora":
        assert torch.equal(ours, wanted)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    found = gradients(model)
    assert found.keys() == lora_parameters(model).keys()
    kinds = {n.rsplit(".", 1)[-1] for n in found}
    assert kinds == {"lora_A", "lora_B"} | ({"lora_magnitude"} if "dora" in kind else set())


def test_the_start_depends_on_the_seed_alone() -> None:
    states = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(noise)
        states.append(lora_state(adapted(seed=seed, move=0.0)))
    first, again, other = states
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k], other[k]) == k.endswith("lora_B") for k in first)
    a = first["model.layers.0.self_attn.q_proj.lora_A"]
    assert a.abs().max() <= 1 / 8 and a.abs().max() > 0.1  # uniform within 1 / sqrt(64)


def test_modes_reach_the_new_layers() -> None:
    assert not any(m.training for m in adapted().modules())
    training = random_model(BASE).train()
    add_lora(training, LoraConfig(), 0)
    assert all(m.training for m in training.modules())


# --- off, merged


@pytest.mark.parametrize("base", ["none", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen3", "qwen2-moe-shared"])
def test_off_is_the_base_and_merged_is_on(name: str, kind: str, base: str) -> None:
    start = adapted(name, move=0.0, base=base, **KINDS[kind])
    model = adapted(name, base=base, **KINDS[kind])
    on = hidden(model)
    with adapters_off(model), torch.no_grad():
        off = hidden(model)
        with adapters_off(model):
            pass
        assert torch.equal(hidden(model), off)
    assert torch.equal(hidden(model), on)
    assert (on - off).abs().max() > 0.1
    torch.testing.assert_close(off, hidden(start), atol=2e-5, rtol=1e-5)
    merged = merge_lora(model)
    plain = random_model(SHAPES[name])
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in merged.parameters())
    torch.testing.assert_close(hidden(merged), on, atol=2e-5, rtol=1e-5)
    assert torch.equal(hidden(model), on)


def test_off_survives_an_error() -> None:
    model = adapted()
    on = hidden(model)
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError
    assert torch.equal(hidden(model), on)


def test_merging_keeps_the_type_of_the_base() -> None:
    model = random_model(BASE).bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    add_lora(model, LoraConfig(rank=2), 0)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    merged = merge_lora(model).state_dict()
    assert all(torch.equal(merged[k], before[k]) for k in before)


# --- gradients


@pytest.mark.parametrize("base", ["none", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-bias", "qwen2-moe-gated"])
def test_gradients_follow_from_those_of_the_merged_weights(name: str, kind: str, base: str) -> None:
    """dA = s B^T dW, dB = s dW A^T; with DoRA dW is scaled by m / |V|, and dm = sum(dW * V / |V|)."""
    model = adapted(name, base=base, **KINDS[kind])
    found = gradients(model)
    whole = gradients(merge_lora(model))
    for module_name, layer in model.named_modules():
        if not isinstance(layer, lora_layers.LoraLayer):
            continue
        stack = isinstance(layer, lora_layers.LoraStack)
        grad = whole[module_name if stack else f"{module_name}.weight"].double()
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        moved = layer.moved(layer.lora_A, layer.lora_B)
        wanted = {}
        if layer.lora_magnitude is not None:
            direction = moved / moved.norm(dim=-1, keepdim=True)
            wanted["lora_magnitude"] = (grad * direction).sum(-1)
            grad = grad * (layer.lora_magnitude.detach().double() / moved.norm(dim=-1))[..., None]
        wanted |= {"lora_A": layer.scale * b.mT @ grad, "lora_B": layer.scale * grad @ a.mT}
        for part, value in wanted.items():
            own = found[f"{module_name}.{part}"].double()
            assert (own - value).abs().max() < 2e-5 * value.abs().max().clamp_min(1), (module_name, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_take_any_rank(dtype: torch.dtype) -> None:
    """Products of stacks want rows of whole 16 bytes."""
    model = adapted("qwen2-moe-shared", rank=3)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours, wanted = hidden(model), hidden(merge_lora(model))
        torch.testing.assert_close(ours, wanted, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-5)
        found = gradients(model)
    experts = [grad for name, grad in found.items() if ".experts." in name]
    assert len(experts) == 2 * 2 * 3 and all(grad.any() for grad in experts)


@pytest.mark.parametrize("base", ["none", "int8", "int4"])
@pytest.mark.parametrize("first", [False, True], ids=["", "first layer"])
def test_many_rows_are_multiplied_otherwise_with_the_same_result(
    base: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a number of rows the small products are folded into the large ones."""
    layer = adapted("llama-bias", base=base).model.layers[0].mlp.up_proj
    results = []
    for rows, folding in ((160, True), (160, False), (150, None)):
        if folding is not None:
            monkeypatch.setattr(lora_layers, "_worth_folding", lambda x, a, b, f=folding: f)
        else:
            monkeypatch.undo()
        layer.zero_grad()
        x = torch.linspace(-1, 1, 160 * 64).view(160, 64).sin()[:rows].requires_grad_(not first)
        y = layer(x)
        (y * torch.arange(rows)[:, None]).sum().backward()
        results.append([y, layer.lora_A.grad, layer.lora_B.grad, x.grad if not first else y])
    for folded, plain in zip(*results[:2], strict=True):
        torch.testing.assert_close(folded, plain, atol=1e-4, rtol=1e-5)
    assert torch.equal(results[2][0], results[1][0][:150])  # few rows: one by one
    assert lora_layers._worth_folding(torch.ones(160, 64), layer.lora_A, layer.lora_B)
    assert not lora_layers._worth_folding(torch.ones(800, 64).bfloat16(), layer.lora_A, layer.lora_B)


def test_the_head_and_embedding_get_no_gradient() -> None:
    """And the loss makes none: dW of the head would be asked for by needs_input_grad."""
    model = adapted("llama-untied").train()
    batch = Batch.from_pieces([Piece(TOKENS[:-1].numpy(), TOKENS[1:].numpy())])
    LanguageModeling()(model, batch).total.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(model).values())


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "dropout": 0.3}, {"base": "int4"}], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "qwen2-moe-shared"])
def test_checkpointed_blocks_give_the_same_bits(name: str, options: dict[str, Any]) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted(name, **options).train()
        model.activation_checkpointing = checkpointing
        torch.manual_seed(5)
        results.append(gradients(model))
    plain, again = results
    assert all(torch.equal(plain[k], again[k]) for k in plain)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"base": "int8"}], ids=str)
def test_autocast_to_bfloat16(options: dict[str, Any]) -> None:
    model = adapted("llama-bias", **options)
    exact, exact_grad = hidden(model), gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.layers[0].self_attn.q_proj(exact).dtype == torch.bfloat16
        rough = hidden(model)
        rough_grad = gradients(model)
    assert 0 < (rough - exact).norm() / exact.norm() < 0.03
    for name, value in exact_grad.items():
        assert rough_grad[name].dtype == torch.float32
        assert (rough_grad[name] - value).norm() / value.norm() < 0.06, name


# --- dropout


@pytest.mark.parametrize("name", ["llama-bias", "qwen2-moe-shared"])
def test_dropout_is_of_the_step_and_of_training_only(name: str) -> None:
    init = "pissa" if name == "llama-bias" else "default"  # PiSSA's base has a low-rank part too
    model, without = adapted(name, dropout=0.5, init=init), adapted(name, init=init)
    assert torch.equal(hidden(model), hidden(without))
    model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(hidden(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    with adapters_off(model), adapters_off(without), torch.no_grad():
        assert torch.equal(hidden(model), hidden(without))
    layer = adapted("llama-bias", dropout=0.5).train().model.layers[0].self_attn.q_proj
    x = torch.randn(20_000, 64)
    base = layer.base.full(torch.float32)
    low = (layer(x) - x @ base.t() - layer.bias).detach()
    kept = layer.eval()(x) - x @ base.t() - layer.bias
    assert ((low - kept).mean(0).abs() < 0.05 * kept.std()).all()  # right in the mean
    assert not torch.allclose(low, kept)


# --- rounded bases


@pytest.mark.parametrize("base", ["int8", "int4"])
def test_a_rounded_base_has_the_engines_numbers(base: str) -> None:
    """Matrices of attention, MLPs and experts are rounded, adapted or not; nothing else is."""
    rounded = random_model(MOE)
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if "_proj" in name:
                rows = p.flatten(0, -2)
                if base == "int8":
                    new = int8_rows(rows).q * int8_rows(rows).scale[:, None]
                else:
                    new = int4_groups(rows).dequantize()
                p.copy_(new.view_as(p))
    model = random_model(MOE)
    add_lora(model, LoraConfig(targets=("q_proj", "router"), base=base), 0)
    torch.testing.assert_close(hidden(model), hidden(rounded), atol=1e-5, rtol=1e-5)
    merged = merge_lora(model).state_dict()
    for name, value in rounded.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("base", "share"), [("int8", 0.26), ("int4", 0.19)])
def test_memory_of_a_rounded_base(base: str, share: float) -> None:
    """Weights held, and what a pass keeps for its backward: never a matrix in full."""
    shape = BASE.with_(hidden_size=256, head_dim=64, intermediate_size=512, vocab_size=32)
    sizes, kept = {}, {}
    for kind in ("none", base):
        model = random_model(shape)
        add_lora(model, LoraConfig(rank=2, base=kind), 0)
        frozen = [p for n, p in model.named_parameters() if ".base." in n]
        sizes[kind] = sum(p.nbytes for p in frozen)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(t: Tensor, own: set[int] = own, seen: dict[int, int] = seen) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden(model, TOKENS[:4] % 32)
        kept[kind] = max(seen.values())
    assert sizes[base] < share * sizes["none"]
    assert kept[base] == kept["none"] < 256 * 512 * 4


# --- saved and loaded


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_continues_exactly(kind: str) -> None:
    model = adapted("qwen2-moe-shared", **KINDS[kind])
    state = {k: v.clone() for k, v in lora_state(model).items()}
    again = adapted("qwen2-moe-shared", move=0.0, **KINDS[kind])
    load_lora_state(again, state)
    assert torch.equal(hidden(again), hidden(model))
    assert all("initial" in k or k in lora_parameters(model) for k in state)


@pytest.mark.parametrize("base", ["none", "int8"])
def test_a_pissa_start_of_another_machine_is_taken_over(base: str) -> None:
    """Singular vectors may differ in their last bits or signs: what was taken out is what is put back."""
    model = adapted("llama", init="pissa", base=base)
    wanted = hidden(random_model(SHAPES["llama"]))
    with adapters_off(model), torch.no_grad():
        rounding = (hidden(model) - wanted).abs().max()
    state = {k: v.clone() for k, v in lora_state(model).items()}
    generator = torch.Generator().manual_seed(0)
    for name in [k for k in state if "initial" in k]:  # another start, much further away than that
        state[name] += 0.001 * torch.randn(state[name].shape, generator=generator)
    load_lora_state(model, state)
    assert torch.equal(lora_state(model)[name], state[name])
    with adapters_off(model), torch.no_grad():
        assert (hidden(model) - wanted).abs().max() < 2 * rounding + 1e-4


def test_states_of_other_adapters_are_refused() -> None:
    model = adapted("llama")
    before = {k: v.clone() for k, v in lora_state(model).items()}
    for other, words in (
        (adapted("llama", rank=5), "lora_A is (5, "),
        (adapted("llama", targets=("attention",)), "is missing"),
        (adapted("llama", use_dora=True), "is not in the model"),
    ):
        with pytest.raises(UserError) as caught:
            load_lora_state(model, lora_state(other))
        assert words in str(caught.value) and "--fresh" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in lora_state(model).items())


def test_pissa_of_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a size the singular vectors come from an iteration: as good, and of the seed alone."""
    exact = adapted("llama", move=0.0, init="pissa")
    monkeypatch.setattr(lora_layers, "EXACT_SIZE", 8)
    models = [adapted("llama", move=0.0, init="pissa") for _ in range(2)]
    for name, layer in models[0].named_modules():
        if isinstance(layer, lora_layers.LoraLayer):
            left, least = (m.get_submodule(name).base.full(torch.float32).norm() for m in (models[0], exact))
            assert least <= left * 1.0001 and left < 1.01 * least
    states = [lora_state(m) for m in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    torch.testing.assert_close(hidden(models[0]), hidden(exact), atol=1e-4, rtol=1e-4)


def test_pairs_rebuild_the_merged_weights() -> None:
    """What goes into a file, for each expert by itself, against the base as it was."""
    for kind, options in KINDS.items():
        model = adapted("qwen2-moe-shared", **options)
        weights = lora_pairs(model)
        assert weights.rank == (8 if "pissa" in kind else 4)
        assert len(weights.pairs) == 2 * (4 + 3 + 1 + 3 * 4)
        plain, merged = random_model(MOE).state_dict(), merge_lora(model).state_dict()
        for name, (a, b) in weights.pairs.items():
            parent, _, last = name.rpartition(".")
            stem, _, number = parent.rpartition(".")
            single = number.isdigit()
            key = f"{stem}.{last}" if single else f"{name}.weight"
            before, after = ((s[key][int(number)] if single else s[key]) for s in (plain, merged))
            moved = before + weights.scale * b @ a
            if name in weights.magnitudes:
                moved = moved * (weights.magnitudes[name] / moved.norm(dim=1))[:, None]
            torch.testing.assert_close(moved, after, atol=1e-5, rtol=1e-5)
