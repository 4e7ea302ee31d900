"""GGUF files: what is written comes back bit for bit, with the metadata that llama.cpp reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_support import TEXT, chat_tokenizer
from model_support import BASE, MOE, SHAPES, YARN, random_model

from kllm.config.stages import ExportStage
from kllm.errors import KllmError, UserError
from kllm.export.gguf_names import to_halves, to_pairs
from kllm.export.gguf_read import open_gguf, shortest
from kllm.export.gguf_tokens import plain_template, pre_tokenizer_name, tokenizer_metadata
from kllm.export.gguf_write import QUANTS, GgufInfo, write_gguf
from kllm.export.load import load_model
from kllm.export.tokenizers import load_tokenizer
from kllm.model.presets import PRESETS, ModelShape, gguf_arch
from kllm.model.transformer import Transformer
from kllm.tokenizer.chat import render
from kllm.tokenizer.source import Source, bpe_spec
from kllm.tokenizer.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def runnable(name: str) -> ModelShape:
    """The shape with rows for the tokenizer; SmolLM3 in the one pattern that llama.cpp has."""
    shape = SHAPES[name].with_(vocab_size=330)
    return shape.with_(num_hidden_layers=4, no_rope_layers=(3,)) if name == "smollm3" else shape


EXACT = [name for name in SHAPES if name != "qwen3-moe-raw"]


def same(left: Transformer, right: Transformer) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", EXACT)
def test_float32_round_trip_is_bit_exact(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(runnable(name))
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", GgufInfo("m"))
    again, their_tokenizer = load_model(tmp_path / "m.gguf")
    assert same(model, again)
    differs = {k for k, v in model.shape.to_dict().items() if getattr(again.shape, k) != v}
    # a MoE has no dense MLP; a gated shared expert is known by its width alone
    moe = {"intermediate_size", "num_shared_experts", "shared_expert_intermediate_size"}
    assert differs <= (moe if model.shape.is_moe else set())
    assert again.shape.shared_size == model.shape.shared_size
    assert their_tokenizer is not None
    assert their_tokenizer.encode_batch(TEXT) == tokenizer.encode_batch(TEXT)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_round_trips(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(PRESETS[name].with_(num_hidden_layers=1, vocab_size=330))
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", GgufInfo("m"))
    assert same(model, load_model(tmp_path / "m.gguf", tokenizer=False)[0])


ARCHITECTURES = {
    "llama": "llama",
    "llama-bias": "qwen2",
    "llama3": "llama",
    "smollm3": "smollm3",
    "qwen3": "qwen3",
    "mixtral": "llama",
    "qwen3-moe": "qwen3moe",
    "qwen2-moe-shared": "granitemoe",  # qwen2moe would be 0/0 for a gate of zeros
    "qwen2-moe-gated": "qwen2moe",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_of_each_configuration(name: str) -> None:
    assert gguf_arch(runnable(name)) == ARCHITECTURES[name]


def test_a_shared_expert_that_is_not_renormalised_is_bailingmoe(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shape = BASE.with_(**MOE, vocab_size=330, num_shared_experts=2, norm_topk_prob=False)
    assert gguf_arch(shape) == "bailingmoe"
    model = random_model(shape)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", GgufInfo("m"))
    names = {t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert "output.weight" in names  # required there, also of a tied model
    again, _ = load_model(tmp_path / "m.gguf")
    assert same(model, again) and again.shape.tie_word_embeddings


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (SHAPES["qwen3-moe-raw"], "always renormalises"),
        (SHAPES["qwen2-moe-gated"].with_(norm_topk_prob=True), "never renormalises"),
        (SHAPES["smollm3"], "every fourth"),
        (SHAPES["llama3"].with_(qk_norm=True), "qwen3 knows no llama3"),
        (SHAPES["llama3"].with_(**MOE, qk_norm=True), "qwen3moe knows no llama3"),
    ],
)
def test_shapes_that_llama_cpp_cannot_compute_are_refused(shape: ModelShape, says: str) -> None:
    with pytest.raises(UserError, match=says):
        gguf_arch(shape)


def test_rows_of_q_and_k_are_reordered_and_back() -> None:
    rows = torch.arange(16.0)[:, None]
    pairs = to_pairs(rows, 8)
    assert pairs[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(to_halves(pairs, 8), rows)
    assert torch.equal(to_halves(to_pairs(rows[:, 0], 8), 8), rows[:, 0])  # biases too


def fields_of(path: Path) -> dict[str, object]:
    return {name: f.contents() for name, f in gguf.GGUFReader(path).fields.items()}


def test_metadata(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(runnable("llama-yarn-factor-1").with_(vocab_size=tokenizer.vocab_size + 3))
    info = GgufInfo("toy", license="mit", source="runs/toy")
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16", info)
    found = fields_of(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "toy",
        "general.license": "mit",
        "general.size_label": "82K",
        "general.file_type": 1,
        "kllm.source": "runs/toy",
        "llama.context_length": 256,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.bos_token_id": 0,  # else llama.cpp takes 11
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["llama.rope.scaling.attn_factor"] == pytest.approx(1 / (1 + 0.1 * np.log(4)))
    assert "llama.rope.scaling.yarn_attn_factor" not in found  # overwritten when llama.cpp loads
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == model.shape.vocab_size
    assert tokens[-3:] == [f"[PAD{tokenizer.vocab_size + i}]" for i in range(3)] and types[-3:] == [5, 5, 5]
    assert [types[tokenizer.added_tokens[t]] for t in ("<|im_end|>", "<think>")] == [3, 4]
    assert "{%- generation" not in found["tokenizer.chat_template"]


def test_yarn_by_the_book_writes_no_attention_factor(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(BASE.with_(vocab_size=330, rope_scaling=YARN))
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", GgufInfo("m"))
    assert not any("attn_factor" in key for key in fields_of(tmp_path / "m.gguf"))


def test_a_template_without_generation_tags_writes_the_same_text(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho", "reasoning_content": "hm"},
        {"role": "user", "content": "so"},
    ]
    template = tokenizer.chat_template
    assert template is not None and "generation" in template
    plain = plain_template(template)
    assert "{% generation" not in plain and "{%- generation" not in plain
    for more in ({}, {"add_generation_prompt": True, "enable_thinking": False}):
        assert render(messages, plain, **more) == render(messages, template, **more)


@pytest.mark.parametrize("quant", [q for q in QUANTS if q != "f32"])
def test_types_of_tensors_and_their_error(quant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from kllm.export.verify_gguf import ROUNDING

    shape = BASE.with_(**{**MOE, "moe_intermediate_size": 256}, num_shared_experts=1)
    shape = shape.with_(vocab_size=330, hidden_size=256, head_dim=64)
    model = random_model(shape)
    written = write_gguf(model, tokenizer, tmp_path / "m.gguf", quant, GgufInfo("m"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert sum(written.tensor_types.values()) == len(kinds)
    assert {kinds[n] for n in kinds if "norm" in n or "ffn_gate_inp" in n} == {"F32"}
    main = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K"}.get(quant, quant.upper())
    assert kinds["blk.1.attn_q.weight"] == main
    assert kinds["blk.1.ffn_gate_exps.weight"] == main
    if quant[0] == "q" and "k" not in quant:
        assert kinds["token_embd.weight"] == "Q8_0"
    back, _ = load_model(tmp_path / "m.gguf")
    ours, theirs = model.state_dict(), back.state_dict()
    worst = max(
        float((ours[n] - theirs[n]).pow(2).mean().sqrt() / ours[n].pow(2).mean().sqrt()) for n in ours
    )
    assert 0 < worst < ROUNDING[quant]


def test_a_mix_spends_its_bits_on_the_layers_that_llama_cpp_does(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """More bits for the first and last eighth and every third between: 16 layers, 8 of them."""
    shape = BASE.with_(
        vocab_size=330, hidden_size=256, head_dim=64, intermediate_size=256, num_hidden_layers=16
    )
    write_gguf(random_model(shape), tokenizer, tmp_path / "m.gguf", "q4_k_m", GgufInfo("m"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for part in ("ffn_down", "attn_v"):
        more = [i for i in range(16) if kinds[f"blk.{i}.{part}.weight"] == "Q6_K"]
        assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {kinds[f"blk.{i}.attn_q.weight"] for i in range(16)} == {"Q4_K"}


def test_widths_that_blocks_do_not_divide_fall_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(BASE.with_(vocab_size=330, intermediate_size=100))
    written = write_gguf(model, tokenizer, tmp_path / "m.gguf", "q4_k_m", GgufInfo("m"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.attn_q.weight"] == "Q5_0"
    assert {"f32", "f16", "q5_0"} <= set(written.tensor_types)


def test_the_recipe_knows_the_types_that_are_written() -> None:
    stage = ExportStage.model_validate({"stage": "export", "gguf": list(QUANTS)})
    assert tuple(stage.gguf) == QUANTS


# ---- tokenizers


def patterns() -> list[tuple[str, dict]]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    inner = {**level, "use_regex": False}

    def split(pattern: str) -> dict:
        return {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                inner,
            ],
        }

    qwen = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    llama = qwen.replace(r"\p{N}|", r"\p{N}{1,3}|")
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    return [("gpt-2", level), ("smollm", digits), ("qwen2", split(qwen)), ("llama-bpe", split(llama))]


@pytest.mark.parametrize(("name", "pre"), patterns(), ids=[n for n, _ in patterns()])
def test_pre_tokenizers_are_named_and_rebuilt(
    name: str, pre: dict, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    spec = tokenizer.spec()
    spec["pre_tokenizer"] = pre
    assert pre_tokenizer_name(spec) == name
    given = _with_spec(tokenizer, spec)
    model = random_model(BASE.with_(vocab_size=330))
    write_gguf(model, given, tmp_path / "m.gguf", "f16", GgufInfo("m"))
    again = load_tokenizer(tmp_path / "m.gguf")
    texts = [*TEXT, "1234567 it's  IT'S\n\n x", "naïve — 東京 \U0001f600\u00a0end  "]
    assert again.encode_batch(texts) == given.encode_batch(texts)
    assert again.stop_token_ids == given.stop_token_ids
    assert again.special_tokens == given.special_tokens
    assert again.added_tokens == given.added_tokens


def _with_spec(tokenizer: Tokenizer, spec: dict) -> Tokenizer:
    import json

    return Tokenizer(replace(tokenizer._source, spec=json.dumps(spec)))


@pytest.mark.parametrize(
    "change",
    [
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
    ],
)
def test_an_unknown_pattern_is_refused_with_the_pattern(change: dict, tokenizer: Tokenizer) -> None:
    spec = tokenizer.spec() | {"pre_tokenizer": change}
    with pytest.raises(UserError, match="no pre-tokenizer that splits as") as caught:
        tokenizer_metadata(_with_spec(tokenizer, spec), 330)
    assert change["type"] in str(caught.value)


def sentencepiece() -> Tokenizer:
    """A tiny Llama-2-like tokenizer: byte tokens, scores by the order of its merges."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    merges = [["▁", "t"], ["h", "e"], ["▁t", "he"], ["▁", "a"], ["c", "a"], ["ca", "t"], ["▁", "cat"]]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    made = ["".join(m) for m in merges]
    vocab = {t: i for i, t in enumerate([*pieces, *made, *letters])}
    spec = bpe_spec(vocab, merges, [(0, "<unk>", True), (1, "<s>", True), (2, "</s>", True)], {}, {})
    spec["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, space]
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec |= {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
    }
    import json

    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(Source("tiny", json.dumps(spec), config))


def test_a_sentencepiece_tokenizer_keeps_its_order_of_merges(tmp_path: Path) -> None:
    given = sentencepiece()
    model = random_model(BASE.with_(vocab_size=given.vocab_size))
    write_gguf(model, given, tmp_path / "m.gguf", "f16", GgufInfo("m"))
    found = fields_of(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores["▁t"] > scores["he"] > scores["▁the"] > scores["▁cat"]
    again = load_tokenizer(tmp_path / "m.gguf")
    texts = ["the cat", "a cat that", "thecat  猫 cat", "z"]
    assert again.encode_batch(texts) == given.encode_batch(texts)
    assert [again.decode(ids) for ids in again.encode_batch(texts)] == texts


# ---- reading what is wrong


def test_files_that_are_no_models_are_refused_in_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = tmp_path / "m.gguf"
    write_gguf(random_model(BASE.with_(vocab_size=330)), tokenizer, good, "f32", GgufInfo("m"))
    data = good.read_bytes()
    cases = {
        "empty.gguf": (b"", "not a GGUF file"),
        "zip.gguf": (b"PK\x03\x04 and more", "not a GGUF file"),
        "head.gguf": (data[:40], "cut off"),
        "keys.gguf": (data[:3000], "cut off"),
        "weights.gguf": (data[:-5000], "cut off"),
    }
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(KllmError, match=says) as caught:
            load_model(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'bert' is not supported"):
        open_gguf(tmp_path / "m.gguf")


def test_a_changed_file_is_read_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for seed in (0, 1):
        model = random_model(BASE.with_(vocab_size=330), seed)
        write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32", GgufInfo("m"))
        assert same(model, load_model(tmp_path / "m.gguf")[0])


@pytest.mark.parametrize("value", [1e-5, 1e-6, 10000.0, 1e6, 0.1, 500000.0, 1e-8])
def test_float32_metadata_reads_as_the_number_that_was_meant(value: float) -> None:
    assert shortest(float(np.float32(value))) == value


def test_nothing_is_left_when_writing_fails(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(BASE.with_(vocab_size=330, hidden_size=256, head_dim=64))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(KllmError):
        write_gguf(model, tokenizer, tmp_path / "m.gguf", "q4_k_m", GgufInfo("m"))
    assert list(tmp_path.iterdir()) == []
