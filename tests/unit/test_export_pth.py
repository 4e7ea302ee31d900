"""`.pth` files: what is refused and how, what is assumed, what survives writing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kllm.errors import KllmError, UserError
from kllm.export.adapter import merge_adapter, read_adapter, write_peft
from kllm.export.pth import (
    MINIMIND_YARN,
    load_weights,
    minimind_config,
    peek_shape,
    read_lora_pth,
    read_pth,
    write_pth,
)
from kllm.export.pth_names import half_rows, strip
from kllm.model.presets import PRESETS, ModelShape
from kllm.model.transformer import Transformer

DENSE = ModelShape(31, 32, 48, 2, 8, 2, 4, rms_norm_eps=1e-5, max_position_embeddings=32768)
ROUTED = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = DENSE.with_(**ROUTED, num_shared_experts=2)


def model_of(shape: ModelShape) -> Transformer:
    model = Transformer(shape)
    model.init_weights(0)
    return model


def plain(shape: ModelShape, path: Path) -> dict[str, Tensor]:
    """A state dict as MiniMind saves it: a plain dict with no config."""
    write_pth(model_of(shape), path)
    return dict(torch.load(path, weights_only=True))


@pytest.fixture
def state(tmp_path: Path) -> dict[str, Tensor]:
    return plain(DENSE, tmp_path / "made.pth")


def says(call: Callable[[], Any], *words: str, kind: type[KllmError] = UserError) -> None:
    with pytest.raises(kind) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert (caught.value.exit_code == 2) == (kind is UserError)


# --- writing and reading back


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_exactly(name: str, tmp_path: Path) -> None:
    """Every preset with few layers and tokens: weights, shape and training fields."""
    shape = PRESETS[name].with_(vocab_size=64, num_hidden_layers=1 if PRESETS[name].is_moe else 2)
    model = model_of(shape)
    write_pth(model, tmp_path / "deep" / "m.pth")
    found = read_pth(tmp_path / "deep" / "m.pth")
    assert found.shape == shape == peek_shape(tmp_path / "deep" / "m.pth")
    assert found.assumed == [] and found.generation == "kllm"
    theirs = model.state_dict()
    assert found.state.keys() == theirs.keys()
    assert all(torch.equal(found.state[k], theirs[k]) for k in theirs)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.pth"]
    minimind_config(shape)


def test_names_in_the_file_are_miniminds(tmp_path: Path) -> None:
    state = plain(SHARED, tmp_path / "m.pth")
    layer = "model.layers.1.mlp"
    assert {k for k in state if k.startswith(layer)} == {f"{layer}.gate.weight"} | {
        f"{layer}.{kind}.{n}.{part}_proj.weight"
        for kind, count in (("experts", 3), ("shared_experts", 2))
        for n in range(count)
        for part in ("gate", "up", "down")
    }
    assert state[f"{layer}.shared_experts.1.down_proj.weight"].shape == (32, 24)
    head, embedding = state["lm_head.weight"], state["model.embed_tokens.weight"]
    assert torch.equal(head, embedding) and head.data_ptr() != embedding.data_ptr()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_files_round_and_are_replaced(dtype: str, tmp_path: Path) -> None:
    model, path = model_of(SHARED), tmp_path / "m.pth"
    path.write_bytes(b"old")
    write_pth(model, path, dtype)
    found = read_pth(path)
    assert found.shape == SHARED
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state[name], tensor.to(getattr(torch, dtype)))


def test_the_state_survives_the_file(tmp_path: Path) -> None:
    """A trainer may overwrite the file in place while we hold its weights."""
    write_pth(model_of(DENSE), tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth")
    before = {k: v.clone() for k, v in found.state.items()}
    (tmp_path / "m.pth").write_bytes(b"")
    assert all(torch.equal(found.state[k], before[k]) for k in before)


def test_looking_at_the_shape_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pth(model_of(DENSE), tmp_path / "m.pth")
    real, seen = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k["mmap"]) or real(*a, **k))
    assert peek_shape(tmp_path / "m.pth") == DENSE
    assert seen == [True]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model = model_of(DENSE)
    says(lambda: write_pth(model, tmp_path), "is a directory")
    says(lambda: write_pth(model, tmp_path / "m.pth", "int8"), "int8", "float32")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    says(lambda: write_pth(model, tmp_path / "m.pth", "float16"), "model.norm.weight", kind=KllmError)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")  # noqa: PTH110
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: real(Path("/dev/full") if ".tmp-" in self.name else self, *a, **k)
    )
    says(lambda: write_pth(model_of(DENSE), tmp_path / "m.pth"), "no space left", kind=KllmError)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attention_bias": True}, "biases"),
        ({"no_rope_layers": (1,)}, "RoPE in every layer"),
        ({"tie_word_embeddings": False}, "tied"),
        ({"head_dim": 6}, "wide"),
        ({"rope_scaling": {**MINIMIND_YARN, "factor": 4}}, "16 times"),
        ({**ROUTED, "num_experts_per_tok": 1, "num_shared_experts": 1}, "lone expert"),
        ({**ROUTED, "num_shared_experts": 1, "shared_expert_gate": True}, "gate"),
        ({**ROUTED, "shared_expert_intermediate_size": 30}, "alike"),
    ],
)
def test_minimind_config_says_why_not(changes: dict[str, Any], word: str) -> None:
    says(lambda: minimind_config(DENSE.with_(**changes)), "MiniMind's code cannot run", word)


# --- what no tensor tells


def test_without_a_config_the_family_is_assumed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth")
    assert found.shape == DENSE
    assert found.assumed == [
        "8 query heads of 4 (no tensor tells)",
        "rms_norm_eps 1e-05, rope_theta 1e+06, max_position_embeddings 32768 (minimind2's)",
    ]
    said = {"num_attention_heads": 4, "rms_norm_eps": 1e-3, "rope_theta": 1e4, "max_position_embeddings": 512}
    found = read_pth(tmp_path / "m.pth", said)
    assert found.assumed == []
    assert found.shape == DENSE.with_(**said, head_dim=8, num_key_value_heads=1)


def test_experts_that_are_assumed(tmp_path: Path) -> None:
    state = plain(SHARED, tmp_path / "m.pth")
    torch.save(state, tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth")
    wanted = SHARED.with_(intermediate_size=24, router_aux_loss_coef=0.01, aux_loss_type="sequence")
    assert found.shape == wanted
    assert "2 of 3 experts per token, weights renormalised (minimind2's)" in found.assumed
    found = read_pth(tmp_path / "m.pth", {"num_experts_per_tok": 1})
    assert not found.shape.norm_topk_prob  # MiniMind2 renormalises from two on
    says(lambda: read_pth(tmp_path / "m.pth", {"num_experts_per_tok": 4}), "m.pth", "num_experts_per_tok")


def test_yarn_as_minimind_spells_it(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "m.pth")
    scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}
    shape = peek_shape(tmp_path / "m.pth", {"rope_scaling": scaling})
    assert shape.rope_scaling == {
        "rope_type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.0,
    }
    assert shape.max_position_embeddings == 4096
    assert peek_shape(tmp_path / "m.pth", {"rope_scaling": {"rope_type": "default"}}).rope_scaling is None


def test_what_is_said_goes_before_the_files_own_config(tmp_path: Path) -> None:
    write_pth(model_of(DENSE), tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth", {"rope_theta": 5e5, "num_attention_heads": 4})
    assert found.shape == DENSE.with_(
        rope_theta=5e5, num_attention_heads=4, num_key_value_heads=1, head_dim=8
    )


@pytest.mark.parametrize(
    ("assume", "words"),
    [
        ({"heads": 4}, ("'heads'", "num_attention_heads")),
        ({"num_attention_heads": 0}, ("num_attention_heads", "0")),
        ({"num_attention_heads": True}, ("num_attention_heads",)),
        ({"num_attention_heads": 5}, ("m.pth", "5 query heads do not divide", "32")),
        ({"num_attention_heads": 32}, ("m.pth", "32 query heads")),
        ({"num_attention_heads": 64}, ("m.pth", "64 query heads")),
        ({"rope_theta": -1.0}, ("rope_theta",)),
        ({"norm_topk_prob": 1}, ("norm_topk_prob",)),
        ({"rope_scaling": 4}, ("rope_scaling",)),
        ({"rope_scaling": {"factor": 4}}, ("rope_type",)),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, ("m.pth", "not whole")),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4}}, ("ntk", "yarn")),
    ],
)
def test_senseless_assumptions(
    assume: dict[str, Any], words: tuple[str, ...], tmp_path: Path, state: dict[str, Tensor]
) -> None:
    torch.save(state, tmp_path / "m.pth")
    says(lambda: read_pth(tmp_path / "m.pth", assume), *words)


def test_heads_that_qk_norm_tells(tmp_path: Path) -> None:
    torch.save(plain(DENSE.with_(qk_norm=True), tmp_path / "m.pth"), tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth", {"num_attention_heads": 8})
    assert found.generation == "minimind-3" and found.shape.rms_norm_eps == 1e-6
    assert len(found.assumed) == 1
    says(lambda: read_pth(tmp_path / "m.pth", {"num_attention_heads": 4}), "8 query heads of 4", "not 4")


# --- wrappings


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "net.", "net._orig_mod."])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_prefixes_and_bundles(prefix: str, key: str | None, tmp_path: Path, state: dict[str, Tensor]) -> None:
    wrapped: dict[str, Any] = {f"{prefix}{k}": v for k, v in state.items()}
    wrapped[f"{prefix}model.freqs_cos"] = torch.ones(4, 2)
    wrapped[f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    if key:
        wrapped = {key: wrapped, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3}
    torch.save(wrapped, tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth")
    assert found.shape == DENSE
    assert torch.equal(found.state["model.norm.weight"], state["model.norm.weight"])


def test_strip() -> None:
    assert strip("module._orig_mod.model.layers.0.x") == "model.layers.0.x"
    assert strip("model._orig_mod.layers.0.x") == "model.layers.0.x"
    assert strip("model.norm.weight") == "model.norm.weight"


def test_the_decoder_alone_and_a_missing_head(tmp_path: Path, state: dict[str, Tensor]) -> None:
    bare = {k.removeprefix("model."): v for k, v in state.items() if k != "lm_head.weight"}
    torch.save(bare, tmp_path / "m.pth", _use_new_zipfile_serialization=False)  # the format before 2020
    found = read_pth(tmp_path / "m.pth")
    assert found.shape == DENSE and found.state["lm_head.weight"] is found.state["model.embed_tokens.weight"]


def test_another_head_is_untied(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth")
    assert not found.shape.tie_word_embeddings
    assert torch.equal(found.state["lm_head.weight"], state["lm_head.weight"])


def test_lora_beside_weights_is_said(tmp_path: Path, state: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.lora"
    state |= {f"{name}.A.weight": torch.ones(2, 32), f"{name}.B.weight": torch.ones(32, 2)}
    torch.save({"model": state}, tmp_path / "m.pth")
    assert any("LoRA" in line and "--adapter" in line for line in read_pth(tmp_path / "m.pth").assumed)
    assert list(read_lora_pth(tmp_path / "m.pth")) == ["model.layers.0.self_attn.q_proj"]


def test_half_rows() -> None:
    assert half_rows(torch.arange(12), 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert half_rows(torch.arange(8)[:, None] * torch.ones(3), 4)[:, 1].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# --- refusals


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploded",)


def test_code_is_refused_and_not_run(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for bundle in ({"model": state, "extra": Bomb()}, nn.Linear(2, 2)):
        torch.save(bundle, "m.pth")
        word = "system" if isinstance(bundle, dict) else "torch.nn.modules.linear.Linear"
        for read in (read_pth, peek_shape, read_lora_pth, load_weights):
            says(lambda read=read: read(Path("m.pth")), "m.pth", "contains code", word, "state_dict()")
    torch.save({"extra": Bomb()}, "m.pth", _use_new_zipfile_serialization=False)
    says(lambda: read_pth(Path("m.pth")), "contains code", "system")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("content", "words", "kind"),
    [
        (b"", ("empty",), KllmError),
        (b"hello world" * 9, ("not a file of torch.save",), UserError),
        (b"GGUF\x03\0\0\0", ("not a file of torch.save",), UserError),
        (b"PK\x03\x04" + b"\0" * 200, ("damaged or cut off",), KllmError),
        (b"\x80\x02" + bytes(range(200)), ("m.pth",), KllmError),
    ],
)
def test_files_that_are_none(
    content: bytes, words: tuple[str, ...], kind: type[KllmError], tmp_path: Path
) -> None:
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(kind) as caught:
        read_pth(tmp_path / "m.pth")
    assert "\n" not in str(caught.value) and all(w in str(caught.value) for w in words)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(share: float, zipped: bool, tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").write_bytes(content[: int(len(content) * share)])
    says(lambda: read_pth(tmp_path / "m.pth"), "m.pth", "damaged or cut off", "copy", kind=KllmError)


def test_places_that_hold_nothing(tmp_path: Path) -> None:
    says(lambda: read_pth(tmp_path / "no.pth"), "no.pth", "no such file")
    says(lambda: read_pth(tmp_path), "cannot be read")


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if part not in k}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"conv1.weight": torch.ones(2), "fc.bias": torch.ones(1)}, ("conv1.weight, fc.bias",)),
        (lambda s: {}, ("no tensors",)),
        (lambda s: [torch.ones(2)], ("holds a list",)),
        (lambda s: torch.ones(2), ("holds a Tensor",)),
        (lambda s: {"a.lora.A.weight": torch.ones(1, 2)}, ("LoRA adapter", "--adapter")),
        (lambda s: without(s, ".layers."), ("no whole layers",)),
        (lambda s: without(s, "layers.0."), ("layer 0 of 2 is missing",)),
        (lambda s: without(s, "layers.1.self_attn.k"), ("layers.1.self_attn.k_proj.weight is missing",)),
        (lambda s: without(s, "layers.0.self_attn.q"), ("layers.0.self_attn.q_proj.weight is missing",)),
        (lambda s: without(s, "model.norm"), ("model.norm.weight is missing",)),
        (lambda s: s | {"value_head.weight": torch.ones(1)}, ("unknown tensor value_head.weight",)),
        (lambda s: s | {"x.a": torch.ones(1), "x.b": torch.ones(1)}, ("unknown tensor", "and 1 more")),
        (lambda s: s | {"model.norm.weight": torch.ones(5)}, ("model.norm.weight", "(5,)", "(32,)")),
        (lambda s: s | {"model.embed_tokens.weight": torch.ones(5)}, ("embed_tokens", "(5,)")),
        (lambda s: s | {"lm_head.weight": torch.ones(31, 8)}, ("lm_head.weight", "(31, 8)")),
        (lambda s: s | {"model.norm.weight": torch.ones(32).int()}, ("model.norm.weight is int32",)),
        (lambda s: s | {"model.norm.weight": torch.ones(32).to_sparse()}, ("model.norm.weight", "floats")),
        (lambda s: s | {"model.norm.weight": torch.full((32,), torch.nan)}, ("model.norm.weight", "NaN")),
        (lambda s: s | {"lm_head.weight": torch.full((31, 32), torch.inf)}, ("lm_head.weight", "Inf")),
        (lambda s: s | {"model.layers.0.mlp.gate.weight": torch.ones(1, 32).expand(10**9, 32)}, ("router",)),
        (
            lambda s: (
                {"tok_embeddings.weight": s["model.norm.weight"]}
                | {f"layers.0.attention.w{c}.weight": torch.tensor(1.0) for c in "qk"}
            ),
            ("tensor",),
        ),
        (lambda s: s | {"model.layers.999999999.x": torch.ones(1)}, ("layers",)),
        (lambda s: s | {"model.layers.0.self_attn.k_proj.weight": torch.ones(7, 32)}, ("8 query heads", "7")),
    ],
)
def test_state_dicts_that_are_none(
    change: Callable[[dict[str, Tensor]], Any],
    words: tuple[str, ...],
    tmp_path: Path,
    state: dict[str, Tensor],
) -> None:
    torch.save(change(state), tmp_path / "m.pth")
    says(lambda: read_pth(tmp_path / "m.pth"), "m.pth", *words)


def test_experts_that_are_missing_or_unlike(tmp_path: Path) -> None:
    state = plain(SHARED, tmp_path / "m.pth")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for bad, word in (
        (without(state, "layers.1.mlp.experts.2."), "missing"),
        (state | {name: torch.ones(2, 2)}, "(2, 2)"),
    ):
        torch.save(bad, tmp_path / "m.pth")
        says(lambda: read_pth(tmp_path / "m.pth"), "model.layers.1.mlp.experts.2.", word)


def test_what_has_no_exact_target(tmp_path: Path) -> None:
    """QK-norm beside shared experts: no architecture has both, so no file of it is taken."""
    torch.save(plain(SHARED.with_(qk_norm=True), tmp_path / "m.pth"), tmp_path / "m.pth")
    says(lambda: read_pth(tmp_path / "m.pth"), "m.pth", "shared experts with qk_norm")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("ffn.ffn.0.weight", "ffn.ffn.0.bias"), ("feed-forward is not gated", "mini-171m")),
        (("moe.route.gate.weight", "moe.experts.0.ffn.0.weight"), ("experts are not gated", "noise")),
    ],
)
def test_mini_llm_is_refused_with_the_reason(
    names: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    inside = [f"layers.0.{n}" for n in ("norm1.weight", "attn.q_proj.weight", "attn.q_proj.bias", *names)]
    state = {f"net._orig_mod.{n}": torch.ones(2, 2) for n in ("embedding.weight", *inside, "head.weight")}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "m.ckpt")
    says(lambda: read_pth(tmp_path / "m.ckpt"), "m.ckpt", "mini-llm has no exact target", *words)


def test_recursions_are_refused(tmp_path: Path) -> None:
    names = ("tok_embeddings.weight", "layers.0.feed_forward.shared_ffn.w1.weight")
    torch.save({n: torch.ones(2, 2) for n in names}, tmp_path / "m.pth")
    says(lambda: read_pth(tmp_path / "m.pth"), "mixture of recursions")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", ("no JSON object",)),
        ("[]", ("no JSON object",)),
        (7, ("no JSON object",)),
        (json.dumps(DENSE.with_(num_hidden_layers=3).to_dict()), ("num_hidden_layers 3", "tensors 2")),
        (json.dumps(DENSE.with_(head_dim=8).to_dict()), ("head_dim 8", "tensors 4")),
        (json.dumps(DENSE.to_dict() | {"rope_theta": "x"}), ("rope_theta", "'x'")),
        (
            json.dumps(DENSE.to_dict() | {"rope_scaling": {"rope_type": "yarn", "factor": "x"}}),
            ("rope_scaling",),
        ),
        (json.dumps({"rope_theta": 1e4}), ("no num_attention_heads",)),
        (json.dumps(DENSE.to_dict() | {"window": 4}), ("window", "version")),
        (json.dumps(DENSE.to_dict() | {"qk_norm": 0}), ("qk_norm = 0",)),
    ],
)
def test_a_broken_config_in_the_file(config: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    write_pth(model_of(DENSE), tmp_path / "m.pth")
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    state._metadata["kllm"] = config
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(UserError) as caught:
        read_pth(tmp_path / "m.pth")
    assert "m.pth" in str(caught.value) and all(word in str(caught.value) for word in words)


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "m.pth")
    says(lambda: read_pth(tmp_path / "m.pth"), "no tensors")


# --- adapters


def lora(path: Path, **tensors: Tensor) -> Path:
    name = "model.layers.0.self_attn.q_proj.lora"
    torch.save({f"{name}.{part}.weight": tensor for part, tensor in tensors.items()}, path)
    return path


def test_lora_files(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 32, generator=generator).half(), torch.randn(32, 3, generator=generator).half()
    file = lora(tmp_path / "l.pth", A=a, B=b)
    pairs = read_lora_pth(file)
    read_a, read_b = pairs["model.layers.0.self_attn.q_proj"]
    assert read_a.dtype == torch.float32 and torch.equal(read_b @ read_a, b.float() @ a.float())
    adapter = read_adapter(file)
    assert (adapter.rank, adapter.alpha, adapter.scale, adapter.source) == (3, 3.0, 1.0, "minimind")
    model = model_of(DENSE)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    assert merge_adapter(model, str(file)) == {"modules": 1, "rank": 3, "scale": 1.0}
    change = model.model.layers[0].self_attn.q_proj.weight - before
    torch.testing.assert_close(change, b.float() @ a.float(), atol=1e-5, rtol=1e-5)


def test_lora_of_the_first_generation(tmp_path: Path) -> None:
    """Rows of B move as the rows of its weight do; o_proj's stay."""
    b = torch.arange(32.0)[:, None]
    state = {
        f"layers.0.attention.{w}.lora.{p}.weight": t
        for w in ("wq", "wo")
        for p, t in (("A", torch.ones(1, 32)), ("B", b))
    }
    torch.save(state, tmp_path / "l.pth")
    pairs = read_lora_pth(tmp_path / "l.pth")
    assert pairs["model.layers.0.self_attn.q_proj"][1].flatten().tolist()[:8] == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(pairs["model.layers.0.self_attn.o_proj"][1], b)
    wide = read_lora_pth(tmp_path / "l.pth", head_dim=8)
    assert wide["model.layers.0.self_attn.q_proj"][1].flatten().tolist()[:8] == [0, 2, 4, 6, 1, 3, 5, 7]
    says(lambda: read_lora_pth(tmp_path / "l.pth", head_dim=10), "no heads of 10")


def test_broken_lora_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    file = tmp_path / "l.pth"
    a, b = torch.ones(2, 32), torch.ones(32, 2)
    says(lambda: read_lora_pth(lora(file, A=a)), "only one of")
    says(lambda: read_lora_pth(lora(file, A=a, B=torch.ones(32, 3))), "no product")
    says(lambda: read_lora_pth(lora(file, A=a, B=b * torch.nan)), "NaN")
    torch.save(state, file)
    says(lambda: read_lora_pth(file), "no LoRA matrices")
    says(lambda: read_adapter(tmp_path / "none"), "no such adapter")
    model = model_of(DENSE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    name = "model.layers.{}.self_attn.q_proj.lora.{}.weight"
    torch.save({name.format(n, p): t for n in (0, 5) for p, t in (("A", a), ("B", b))}, file)
    says(lambda: merge_adapter(model, file), "no linear layer model.layers.5")
    lora(file, A=torch.ones(2, 16), B=b)
    says(lambda: merge_adapter(model, file), "(32, 32)", "(32, 16)")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_peft_directories(tmp_path: Path) -> None:
    pairs = {
        "model.layers.0.mlp.shared_expert.down_proj": (torch.ones(2, 48), torch.ones(32, 2)),
        "model.layers.1.self_attn.o_proj": (torch.ones(2, 32), torch.ones(32, 2)),
    }
    write_peft(pairs, tmp_path / "a", alpha=6, rank=2, base="base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "shared_expert.down_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6, "base")
    found = read_adapter(tmp_path / "a")
    assert found.scale == 3.0
    assert torch.equal(found.pairs["model.layers.0.mlp.shared_expert.down_proj"][1], torch.full((32, 2), 2.0))
    model = model_of(SHARED)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merge_adapter(model, tmp_path / "a")
    for name, (a, b) in pairs.items():
        torch.testing.assert_close(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"] + 3 * b @ a)
    write_peft(pairs, tmp_path / "a", alpha=6, rank=2, base="base", shared_expert_gate=True)
    assert torch.equal(
        read_adapter(tmp_path / "a").pairs["model.layers.0.mlp.shared_expert.down_proj"][1], torch.ones(32, 2)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    write_peft(pairs, tmp_path / "a", alpha=12, rank=4, base="x")  # a rank of their own, the same scale
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == dict.fromkeys(pairs, 2)
    assert config["alpha_pattern"] == dict.fromkeys(pairs, 6.0)
    again = model_of(SHARED)
    again.load_state_dict(before)
    merge_adapter(again, tmp_path / "a")
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name])
    says(lambda: write_peft({}, tmp_path / "b", alpha=6, rank=4, base="x"), "no matrices")
    says(
        lambda: write_peft(
            {"lm_head": pairs["model.layers.1.self_attn.o_proj"]}, tmp_path / "b", alpha=1, rank=2, base="x"
        ),
        "lm_head",
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r and lora_alpha"),
        ({"lora_alpha": None}, "r and lora_alpha"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
        ({"alpha_pattern": {"o_proj": "x"}}, "alpha_pattern"),
        ({"alpha_pattern": {"o_proj": float("nan")}}, "alpha_pattern"),
        ({"lora_alpha": float("nan")}, "r and lora_alpha"),
        ({"r": float("inf")}, "r and lora_alpha"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "OLoRA"}, "belongs to a base that PEFT changed"),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
        ({"alora_invocation_tokens": [7]}, "alora_invocation_tokens"),
    ],
)
def test_peft_directories_that_cannot_be_merged(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    pairs = {"model.layers.1.self_attn.o_proj": (torch.ones(2, 32), torch.ones(32, 2))}
    write_peft(pairs, tmp_path / "a", alpha=6, rank=2, base="base")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    says(lambda: read_adapter(tmp_path / "a"), word)


@pytest.mark.parametrize(
    ("name", "gone", "words"),
    [
        (None, "lora_A.weight", ("q_proj.lora_B.weight", "its other half is missing")),
        (None, "lora_B.weight", ("q_proj.lora_A.weight", "its other half is missing")),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", None, ("biases were trained",)),
        ("lm_head.base_layer.weight", None, ("the embedding or the head was trained",)),
        ("model.embed_tokens.lora_embedding_A", None, ("the embedding or the head was trained",)),
        ("model.layers.0.mlp.down_proj.lora_diag", None, ("down_proj.lora_diag cannot be merged",)),
    ],
)
def test_tensors_of_a_peft_file_that_cannot_be_merged(
    name: str | None, gone: str | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    pair = torch.ones(2, 32), torch.ones(32, 2)
    pairs = {f"model.layers.{i}.self_attn.q_proj": pair for i in range(2)}
    write_peft(pairs, tmp_path / "a", alpha=6, rank=2, base="base")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    if name is not None:
        tensors[f"base_model.model.{name}"] = torch.ones(3)
    if gone is not None:
        del tensors[f"base_model.model.model.layers.1.self_attn.q_proj.{gone}"]
    save_file(tensors, file)
    says(lambda: read_adapter(tmp_path / "a"), *words)


def test_weights_of_a_peft_folder_as_a_pickle(tmp_path: Path) -> None:
    pairs = {"model.layers.1.self_attn.o_proj": (torch.ones(2, 32), torch.ones(32, 2))}
    write_peft(pairs, tmp_path / "a", alpha=6, rank=2, base="base")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    says(
        lambda: read_adapter(tmp_path / "a"),
        "only adapter_model.safetensors is read",
        "save_file(torch.load(",
    )
    (tmp_path / "a" / "adapter_model.bin").unlink()
    says(lambda: read_adapter(tmp_path / "a"), "no such file")
