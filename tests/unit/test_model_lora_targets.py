"""Which layers adapters go to, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from model_support import BASE, SHAPES, random_model

from kllm.errors import UserError
from kllm.model.lora import LoraConfig, add_lora

MOE = SHAPES["qwen2-moe-shared"]


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        (("all",), "q k v o shared_expert.gate shared_expert.up shared_expert.down"),
        (("attention",), "q k v o"),
        (("mlp",), "shared_expert.gate shared_expert.up shared_expert.down"),
        (("experts",), "experts.gate experts.up experts.down"),
        (("q_proj", "v_proj"), "q v"),
        (("up_proj",), "shared_expert.up"),  # a bare name never means the routed experts
        (("experts.up_proj", "k_proj"), "k experts.up"),
        ((r".*\.(self_attn\.o|experts\.down)_proj",), "o experts.down"),
    ],
)
def test_targets(targets: tuple[str, ...], ends: str) -> None:
    names = add_lora(random_model(MOE), LoraConfig(targets=targets), 0)
    parts = [f"mlp.{e}_proj" if "expert" in e else f"self_attn.{e}_proj" for e in ends.split()]
    assert sorted(names) == sorted(f"model.layers.{i}.{part}" for i in range(2) for part in parts)


def test_the_router_and_one_layer() -> None:
    model = random_model(MOE)
    names = add_lora(model, LoraConfig(targets=("router", "layers.1.self_attn.q_proj")), 0)
    assert names == [
        "model.layers.0.mlp.gate",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate",
    ]


@pytest.mark.parametrize(
    ("shape", "target", "words"),
    [
        (MOE, "c_attn", "'c_attn' matches no layer (there are all, attention, mlp, experts, router, experts.down_proj"),
        (BASE, "experts", "there are all, attention, mlp, down_proj, gate_proj, k_proj"),
        (BASE, "lm_head", "'lm_head' matches no layer"),
        (SHAPES["qwen2-moe-gated"], "shared_expert_gate", "'shared_expert_gate' matches no layer"),
        (BASE, "(q", "broken regular expression"),
    ],
)  # fmt: skip
def test_targets_that_are_not_there(shape: Any, target: str, words: str) -> None:
    model = random_model(shape)
    with pytest.raises(UserError) as caught:
        add_lora(model, LoraConfig(targets=("all", target)), 0)
    assert words in str(caught.value) and str(caught.value).startswith("lora.targets: ")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "lora.rank: must be at least 1"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"init": "olora"}, "lora.init: 'olora' is not one of default, pissa"),
        ({"base": "nf4"}, "lora.base: 'nf4' is not one of none, int8, int4"),
        ({"init": "pissa", "rank": 33}, "k_proj is 32 x 64: it has no 33 singular values"),
    ],
)
def test_configs_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        add_lora(random_model(BASE), LoraConfig(**options), 0)
    assert words in str(caught.value)
