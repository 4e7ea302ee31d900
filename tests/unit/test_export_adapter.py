"""Adapters on disk: experts and routers for kllm alone, several merged, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import SHAPES, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.export.adapter import (
    merge_adapter,
    merge_adapters,
    read_adapter,
    save_adapter,
    write_peft,
)
from kllm.export.adapter_weights import adapter_weights
from kllm.model.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from kllm.model.transformer import Transformer

MOE = SHAPES["qwen2-moe-shared"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "pissa-dora": {"init": "pissa", "use_dora": True},
}


def trained(shape: Any = MOE, seed: int = 0, **options: Any) -> Transformer:
    model = random_model(shape)
    targets = ("all", "experts", "router") if shape.is_moe else ("all",)
    add_lora(model, LoraConfig(**{"rank": 4, "alpha": 6, "targets": targets} | options), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_routers_come_back(kind: str, tmp_path: Path) -> None:
    """Every reader else is told to merge; kllm merges them."""
    model = trained(**KINDS[kind])
    names = save_adapter(model, tmp_path / "a", base="here")
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert set(names) == {
        n for n in targets if "." in n and "shared_expert." not in n
    }  # peft must hit nothing else
    assert set(targets) - set(names) == {*(f"{p}_proj" for p in "qkvo"), *(f"shared_expert.{p}_proj" for p in ("gate", "up", "down"))}  # fmt: skip
    assert len(names) == 2 * (1 + 3 * 4) and all("experts." in n or n.endswith("mlp.gate") for n in names)
    merged = random_model(MOE)
    report = merge_adapter(merged, tmp_path / "a")
    wanted = merge_lora(model).state_dict()
    close(merged.state_dict(), wanted)
    assert report["modules"] == 2 * (4 + 3 + 1 + 12)
    with pytest.raises(UserError, match="experts and routers cannot have an adapter per request"):
        adapter_weights(tmp_path / "a", MOE)


def test_several_adapters_add_up_in_any_order(tmp_path: Path) -> None:
    """Each change is taken from the base, so two DoRAs do not disturb each other."""
    places = []
    for seed in (1, 2):
        save_adapter(trained(seed=seed, use_dora=True), tmp_path / str(seed), base="")
        places.append(tmp_path / str(seed))
    start = {k: v.clone() for k, v in random_model(MOE).state_dict().items()}
    alone = []
    for place in places:
        model = random_model(MOE)
        merge_adapter(model, place)
        alone.append(model.state_dict())
    for weights in ((0.5, 2.0), (1.0, -1.0)):
        both = [random_model(MOE) for _ in range(2)]
        pairs = list(zip(places, weights, strict=True))
        for model, order in zip(both, (pairs, pairs[::-1]), strict=True):
            report = merge_adapters(model, order)
            assert [(r["adapter"], r["weight"]) for r in report] == [(p.name, w) for p, w in order]
        wanted = {
            k: v + sum(w * (a[k] - v) for a, w in zip(alone, weights, strict=True)) for k, v in start.items()
        }
        close(both[0].state_dict(), wanted)
        close(both[0].state_dict(), both[1].state_dict(), 1e-6)


def test_single_experts_are_merged(tmp_path: Path) -> None:
    a, b = torch.ones(1, 64), torch.ones(48, 1)
    for name in ("experts.2.up_proj", "shared_experts.0.up_proj"):
        pairs = {f"model.layers.1.mlp.{name}": (a, b)}
        write_peft(pairs, tmp_path / "a", alpha=1, rank=1, base="", kllm_only=True)
        merge_adapter(random_model(MOE), tmp_path / "a")


def test_another_models_adapter_is_not_loaded(tmp_path: Path) -> None:
    save_adapter(trained(SHAPES["qwen3"]), tmp_path / "a", base="")
    model = random_model(SHAPES["llama"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="another base model"):
        merge_adapter(model, tmp_path / "a")
    close(model.state_dict(), before, 0.0)


def test_damaged_magnitudes(tmp_path: Path) -> None:
    save_adapter(trained(SHAPES["llama"], use_dora=True), tmp_path / "a", base="")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
    assert tensors[name].shape == (96,)
    for change, word in (
        (lambda t: t.pop(name), "use_dora and the lora_magnitude_vector tensors do not agree"),
        (lambda t: t.update({name: tensors[name][:5]}), "do not fit each other"),
        (lambda t: t.update({name: tensors[name] * torch.nan}), "NaN"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, file)
        with pytest.raises(KllmError, match=word):
            read_adapter(tmp_path / "a")


def test_runs_and_stages_hold_adapters(tmp_path: Path) -> None:
    model = trained(SHAPES["llama"])
    for stage, moment in (("02-lora", 0.0), ("03-dpo", 1.0)):
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.lora_B").fill_(moment)
        save_adapter(model, tmp_path / "run" / stage / "adapter", base="")
    (tmp_path / "run" / "04-eval").mkdir()
    b = "model.layers.0.mlp.up_proj"
    for place, moment in (
        ("run", 1.0),
        ("run/03-dpo", 1.0),
        ("run/02-lora", 0.0),
        ("run/02-lora/adapter", 0.0),
    ):
        assert (read_adapter(tmp_path / place).pairs[b][1] == moment).all()
    with pytest.raises(UserError, match="no adapter in it"):
        read_adapter(tmp_path / "run" / "04-eval")
