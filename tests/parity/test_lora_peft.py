"""Our adapters against peft's: outputs, gradients, merged weights, and files in both directions."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import SHAPES, random_model
from torch import Tensor

from kllm.export.adapter import (
    in_memory,
    merge_adapter,
    merge_adapters,
    read_adapter,
    save_adapter,
)
from kllm.export.hf import save_model
from kllm.export.load import load_model
from kllm.model.lora import (
    LoraConfig,
    adapters_off,
    add_lora,
    load_lora_state,
    lora_parameters,
    merge_lora,
)
from kllm.model.transformer import Transformer

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

TOKENS = torch.randint(0, 97, (130,), generator=torch.Generator().manual_seed(1))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARED = [*ALL[:4], "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]
TARGETS = {"qwen2-moe-gated": SHARED, "qwen2-moe-shared": SHARED, "mixtral": ALL[:4]}
MODELS = ("llama", "llama-bias", "qwen3", "qwen2-moe-gated", "qwen2-moe-shared", "mixtral")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base models as Hugging Face folders."""
    folder = tmp_path_factory.mktemp("bases")
    for name in MODELS:
        save_model(random_model(SHAPES[name]), None, folder / name)
    return folder


@functools.cache
def base_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()


def theirs(folder: Path, adapter: Path | None = None, **options: Any) -> Any:
    """A peft model on a copy of the base: an adapter read from a folder, or a random new one."""
    base = copy.deepcopy(base_of(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys that it misses or does not know
        warnings.filterwarnings("ignore", category=FutureWarning)
        if adapter is not None:
            return peft.PeftModel.from_pretrained(base, adapter).eval()
        torch.manual_seed(3)
        config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ALL} | options
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:  # as after some training
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model


def their_logits(model: Any) -> Tensor:
    return model(TOKENS[None]).logits[0]


def logits(model: Transformer) -> Tensor:
    return model.logits(model(TOKENS, torch.arange(len(TOKENS))))


def trained(model: Transformer, seed: int = 5) -> Transformer:
    """Moves the adapters as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def adapted(model: Transformer, folder: Path) -> Transformer:
    """Our training layers with the numbers of a PEFT folder."""
    adapter = in_memory(read_adapter(folder), model.shape)
    config = LoraConfig(adapter.rank, adapter.scale * adapter.rank, targets=tuple(adapter.pairs))
    add_lora(model, dataclasses.replace(config, use_dora=bool(adapter.magnitudes)), seed=0)
    state = {
        f"{name}.lora_{part}": t
        for name, pair in adapter.pairs.items()
        for part, t in zip("AB", pair, strict=True)
    }
    load_lora_state(model, state | {f"{name}.lora_magnitude": m for name, m in adapter.magnitudes.items()})
    return model


def close(ours: Tensor, reference: Tensor, tolerance: float = 1e-5) -> float:
    """Largest difference as a share of the largest value (or of 1); asserted."""
    difference = float(
        (ours - reference).detach().abs().max() / reference.detach().abs().max().clamp_min(1.0)
    )
    assert difference < tolerance, difference
    return difference


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama-bias", kind) for kind in KINDS),
        ("qwen3", "lora"),
        ("qwen3", "dora"),
        ("qwen2-moe-gated", "dora"),
    ],
)
def test_outputs_gradients_and_merged_weights(name: str, kind: str, lab: Path, tmp_path: Path) -> None:
    """An adapter that peft wrote, loaded into our layers."""
    reference = theirs(lab / name, target_modules=TARGETS.get(name, ALL), **KINDS[kind])
    reference.save_pretrained(tmp_path / "a")
    model, _ = load_model(lab / name)
    plain = logits(model)
    adapted(model, tmp_path / "a")
    ours, wanted = logits(model), their_logits(reference)
    close(ours, wanted)
    assert (ours - plain).abs().max() > 0.1
    for output in (ours, wanted):
        torch.nn.functional.cross_entropy(output[:-1], TOKENS[1:], reduction="sum").backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert len(gradients) == len(lora_parameters(model))
    for parameter_name, parameter in lora_parameters(model).items():
        stem, _, part = parameter_name.rpartition(".")
        part = part.replace("magnitude", "magnitude_vector")
        close(parameter.grad, gradients[f"base_model.model.{stem}.{part}.default.weight"])
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    merged = merge_lora(model).state_dict()
    on_disk, _ = load_model(lab / name)
    merge_adapter(on_disk, tmp_path / "a")
    for key, weight in reference.merge_and_unload().state_dict().items():
        if key in merged:
            close(merged[key], weight)
            close(on_disk.state_dict()[key], weight)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_doubled_down_projection(kind: str, lab: Path, tmp_path: Path) -> None:
    """A gateless shared expert is doubled on disk: what peft made for the disk is halved in memory."""
    reference = theirs(lab / "qwen2-moe-shared", target_modules=SHARED, **KINDS[kind])
    reference.save_pretrained(tmp_path / "a")
    model, _ = load_model(lab / "qwen2-moe-shared")
    merged, _ = load_model(lab / "qwen2-moe-shared")
    adapted(model, tmp_path / "a")
    merge_adapter(merged, tmp_path / "a")
    close(logits(model), their_logits(reference))
    close(logits(merged), their_logits(reference))
    save_adapter(trained(model), tmp_path / "b", base=str(lab / "qwen2-moe-shared"))
    close(their_logits(theirs(lab / "qwen2-moe-shared", tmp_path / "b")), logits(model))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama-bias", kind) for kind in (*KINDS, "pissa", "pissa-rslora", "pissa-dora")),
        ("qwen3", "lora"),
        ("qwen3", "pissa-dora"),
        ("qwen2-moe-shared", "dora"),
        ("qwen2-moe-shared", "pissa-rslora"),
    ],
)
def test_our_files_in_peft(name: str, kind: str, lab: Path, tmp_path: Path) -> None:
    model, _ = load_model(lab / name)
    plain = logits(model)
    options = {"use_rslora": "rslora" in kind, "use_dora": "dora" in kind}
    init = "pissa" if "pissa" in kind else "default"
    names = add_lora(model, LoraConfig(rank=4, alpha=6, init=init, **options), seed=0)
    close(logits(model), plain)
    trained(model)
    assert (logits(model) - plain).abs().max() > 0.1
    assert save_adapter(model, tmp_path / "a", base=str(lab / name)) == []
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == (8 if init == "pissa" else 4)
    assert config["init_lora_weights"] is True  # nothing that vLLM refuses, whatever it started from
    reference = theirs(lab / name, tmp_path / "a")
    close(their_logits(reference), logits(model))
    with reference.disable_adapter(), adapters_off(model):
        close(their_logits(reference), logits(model))
        close(logits(model), plain)
    again, _ = load_model(lab / name)
    adapted(again, tmp_path / "a")
    close(logits(again), logits(model))
    close(logits(merge_lora(model)), logits(model))
    assert set(read_adapter(tmp_path / "a").pairs) == set(names)


def test_only_some_layers(lab: Path, tmp_path: Path) -> None:
    """peft, told of q_proj alone, would look for it in every layer."""
    model, _ = load_model(lab / "mixtral")
    names = add_lora(model, LoraConfig(rank=3, targets=(r".*layers\.1\..*[qo]_proj",)), seed=0)
    assert names == [f"model.layers.1.self_attn.{part}_proj" for part in "qo"]
    save_adapter(trained(model), tmp_path / "a", base=str(lab / "mixtral"))
    reference = theirs(lab / "mixtral", tmp_path / "a")
    close(their_logits(reference), logits(model))
    assert sum("lora_A" in n for n, _ in reference.named_parameters()) == 2


def test_pissa_starts_as_in_peft(lab: Path) -> None:
    reference = theirs(lab / "llama", init_lora_weights="pissa")
    model, _ = load_model(lab / "llama")
    names = add_lora(model, LoraConfig(rank=4, alpha=6, init="pissa"), seed=0)
    for name in names:
        ours, other = model.get_submodule(name), reference.get_submodule(f"base_model.model.{name}")
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        close(ours.lora_B @ ours.lora_A, product)
        close(ours.base.full(torch.float32), other.base_layer.weight)


def test_pissa_that_peft_converted(lab: Path, tmp_path: Path) -> None:
    """peft's documented way: the start is kept, and the difference is written as a LoRA of twice the rank."""
    reference = theirs(lab / "llama", init_lora_weights="pissa")
    reference.peft_config["default"].init_lora_weights = True
    reference.save_pretrained(tmp_path / "start")
    reference.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    wanted = their_logits(reference)
    start = str(tmp_path / "start")
    reference.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=start)
    model, _ = load_model(lab / "llama")
    assert merge_adapter(model, tmp_path / "a")["rank"] == 8
    close(logits(model), wanted)


def test_ranks_and_alphas_of_their_own(lab: Path, tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3},
        "alpha_pattern": {"down_proj": 5, "layers.0.self_attn.q_proj": 9},
    }
    reference = theirs(lab / "llama", use_rslora=True, **patterns)
    reference.save_pretrained(tmp_path / "a")
    model, _ = load_model(lab / "llama")
    merge_adapter(model, tmp_path / "a")
    close(logits(model), their_logits(reference))


def test_a_weighted_merge(lab: Path, tmp_path: Path) -> None:
    """The sum of the weighted changes, which peft calls `cat`."""
    reference = theirs(lab / "qwen3")
    with torch.no_grad():
        second = peft.LoraConfig(
            r=2, lora_alpha=9, target_modules=["q_proj", "up_proj"], init_lora_weights=False
        )
        reference.add_adapter("second", second)
        reference.save_pretrained(tmp_path)
        folders = [(tmp_path, 0.5), (tmp_path / "second", -1.5)]
        reference.add_weighted_adapter(["default", "second"], [0.5, -1.5], "both", combination_type="cat")
        reference.set_adapter("both")
        wanted = their_logits(reference)
    for order in (folders, folders[::-1]):
        model, _ = load_model(lab / "qwen3")
        report = merge_adapters(model, order)
        close(logits(model), wanted)
    assert report[0] == {"adapter": "second", "weight": -1.5, "modules": 4, "rank": 2, "scale": 4.5}
