"""Our model against transformers' own classes, on random weights, through files on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_support import BASE, MOE, SHAPES, random_model

from kllm.errors import UserError
from kllm.export.config import config_to_shape, shape_to_config
from kllm.export.hf import save_model
from kllm.export.load import load_model
from kllm.model.presets import PRESETS, count_parameters, hf_model_type
from kllm.model.transformer import Transformer

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(SHAPES[name])
    save_model(model, None, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").float().eval()
    assert theirs.config.model_type == hf_model_type(SHAPES[name])
    tokens = torch.randint(0, 97, (130,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.logits(model(tokens, torch.arange(130)))
        reference = theirs(tokens[None]).logits[0]
    assert reference.abs().max() > 0.5
    assert (ours - reference).abs().max() < 1e-4
    assert (ours.argmax(-1) == reference.argmax(-1)).all()


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip_is_bit_exact(name: str, tmp_path: Path) -> None:
    model = random_model(SHAPES[name])
    save_model(model, None, tmp_path / "m")
    again, tokenizer = load_model(tmp_path / "m")
    assert tokenizer is None
    # a MoE has no dense MLP: the field holds the experts' width on disk
    assert again.shape.with_(intermediate_size=model.shape.intermediate_size) == model.shape
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", [n for n in PRESETS if count_parameters(PRESETS[n]) < 3e7])
def test_presets_load_in_transformers(name: str, tmp_path: Path) -> None:
    model = Transformer(PRESETS[name])
    model.init_weights(0)
    save_model(model, None, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokens = torch.arange(5, 45)
    with torch.no_grad():
        ours = model.eval().logits(model(tokens, torch.arange(40)))
        assert (ours - theirs(tokens[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", PRESETS)
def test_preset_architecture_in_transformers(name: str) -> None:
    """Every preset, the large ones too: the class transformers builds has exactly our parameters."""
    shape = PRESETS[name]
    config = transformers.AutoConfig.for_model(**shape_to_config(shape))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in theirs.parameters())
    neutral = 0
    if shape.is_moe and shape.tie_word_embeddings:
        neutral += shape.vocab_size * shape.hidden_size
    if hf_model_type(shape) == "qwen2_moe":
        neutral += shape.num_hidden_layers * (shape.q_size + 2 * shape.kv_size + shape.hidden_size)
    assert total - neutral == count_parameters(shape)


def test_config_round_trip() -> None:
    for shape in (*SHAPES.values(), *PRESETS.values()):
        again = config_to_shape(shape_to_config(shape))
        if shape.is_moe:  # decided by the tensors, not by the config
            again = again.with_(tie_word_embeddings=shape.tie_word_embeddings)
            again = again.with_(
                attention_bias=shape.attention_bias, shared_expert_gate=shape.shared_expert_gate
            )
            again = again.with_(intermediate_size=shape.intermediate_size)
        assert again == shape


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({**MOE, "num_shared_experts": 1, "qk_norm": True}, "shared experts with qk_norm"),
        ({"qk_norm": True, "attention_bias": True}, "qk_norm with attention_bias"),
        ({**MOE, "num_shared_experts": 1, "head_dim": 32}, "head_dim"),
        ({**MOE, "norm_topk_prob": False}, "norm_topk_prob"),
        ({**MOE, "attention_bias": True}, "attention_bias"),
        ({"hidden_size": 66, "head_dim": 16}, "divisible"),
        ({"num_key_value_heads": 3}, "multiple"),
    ],
)
def test_configurations_without_exact_target_are_refused(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        hf_model_type(BASE.with_(**changes))


def test_a_qwen2_with_its_own_tokenizer_stays_one(tmp_path: Path) -> None:
    """With NFC and Qwen's pattern the class that transformers 5 rebuilds is the same tokenizer."""
    from kllm.tokenizer.tokenizer import Tokenizer
    from kllm.tokenizer.train import train_tokenizer

    ours, _ = train_tokenizer(["some words 123 你好"] * 9, 300, max_bytes=10**6, min_frequency=1)
    ours.save(tmp_path / "nfc")
    spec = ours.spec() | {"normalizer": {"type": "NFC"}}
    (tmp_path / "nfc" / "tokenizer.json").write_text(json.dumps(spec))
    qwen = Tokenizer.load(tmp_path / "nfc")
    shape = SHAPES["llama-bias"].with_(vocab_size=ours.vocab_size)
    model = random_model(shape)
    for tokenizer, expected in ((qwen, "qwen2"), (ours, "llama")):
        save_model(model, tokenizer, tmp_path / expected)
        again, _ = load_model(tmp_path / expected)
        assert again.shape == shape
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / expected).float().eval()
        assert theirs.config.model_type == expected
        tokens = torch.arange(3, 40)
        with torch.no_grad():
            difference = model.logits(model(tokens, torch.arange(37))) - theirs(tokens[None]).logits[0]
        assert difference.abs().max() < 1e-4
        read = transformers.AutoTokenizer.from_pretrained(tmp_path / expected)
        for text in ("some 123 e\u0301", "words  你好\n\n x"):
            assert read(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("name", SHAPES)
def test_64_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    """Cached decoding of another program, token for token, from five prompts."""
    from kllm.export.verify import NEW_TOKENS, verify_hf

    model = random_model(SHAPES[name].with_(max_position_embeddings=max(256, NEW_TOKENS * 2)))
    save_model(model, None, tmp_path / "m")
    report = verify_hf(model, None, tmp_path / "m")
    assert report["greedy_equal"] == report["greedy_total"] >= 4 * NEW_TOKENS
    assert report["max_abs_diff"] < 1e-4


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_round_trips_bit_exactly(name: str, tmp_path: Path) -> None:
    model = random_model(PRESETS[name].with_(num_hidden_layers=1, vocab_size=64))
    save_model(model, None, tmp_path / "m")
    again, _ = load_model(tmp_path / "m")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_gateless_shared_expert_has_all_that_its_readers_take_for_granted(tmp_path: Path) -> None:
    """Without the zero biases vLLM computes from memory that nobody wrote."""
    from safetensors.torch import load_file

    shape = SHAPES["qwen2-moe-shared"]
    model = random_model(shape)
    save_model(model, None, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["qkv_bias"] is True and config["tie_word_embeddings"] is False
    assert torch.equal(tensors["lm_head.weight"], model.model.embed_tokens.weight)
    for layer in range(shape.num_hidden_layers):
        stem = f"model.layers.{layer}"
        for part, size in (("q", shape.q_size), ("k", shape.kv_size), ("v", shape.kv_size)):
            assert torch.equal(tensors[f"{stem}.self_attn.{part}_proj.bias"], torch.zeros(size))
        assert not tensors[f"{stem}.mlp.shared_expert_gate.weight"].any()
        down = model.state_dict()[f"{stem}.mlp.shared_expert.down_proj.weight"]
        assert torch.equal(tensors[f"{stem}.mlp.shared_expert.down_proj.weight"], 2 * down)
