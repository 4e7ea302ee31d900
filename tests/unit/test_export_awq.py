"""AWQ directories: the layout, the folding of scales, the search that beats plain rounding, reading back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_support import BASE as SMALL
from model_support import save_quantized

from kllm.errors import UserError
from kllm.export import awq
from kllm.export.awq import quantize_awq
from kllm.export.hf import read_shape, read_tensors
from kllm.export.mapping import hf_to_state
from kllm.export.quantized import (
    QuantizedExport,
    choose_group,
    dequantize_tensors,
    is_quantised,
    pack_nibbles,
    round_asymmetric,
    rounded,
    unpack_nibbles,
)
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

BASE = SMALL.with_(vocab_size=96)
MHA = BASE.with_(num_key_value_heads=4)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHAPES = {
    "llama": BASE,
    "llama-mha": MHA,
    "llama-bias": MHA.with_(attention_bias=True),
    "llama-untied": BASE.with_(tie_word_embeddings=False),
    "qwen3": BASE.with_(qk_norm=True, head_dim=32),
    "smollm3": BASE.with_(no_rope_layers=(1,)),
    "mixtral": BASE.with_(**MOE),
    "qwen3-moe": BASE.with_(**MOE, qk_norm=True),
    "qwen2-moe-shared": BASE.with_(**MOE, num_shared_experts=1),
    "qwen2-moe-gated": MHA.with_(
        **MOE, num_shared_experts=2, shared_expert_gate=True, attention_bias=True, norm_topk_prob=False
    ),
}


def outlier_model(shape: ModelShape, seed: int = 0) -> Transformer:
    """Random weights behind norms that blow up three channels, as real models do."""
    model = Transformer(shape).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("layernorm.weight"):
                parameter.copy_(1 + 0.2 * noise)
                parameter[[3, 17, 40]] *= 15
            elif name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * 0.08)
                if name.endswith(("q_proj.weight", "k_proj.weight")):  # attention that is not one-hot
                    parameter.mul_(0.3)
    return model


def token_rows(count: int, length: int, seed: int = 1) -> list[torch.Tensor]:
    """Documents that repeat a short random phrase with noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        phrase = torch.randint(0, 96, (7,), generator=generator)
        row = phrase.repeat(length // 7 + 1)[:length].clone()
        noise = torch.rand(length, generator=generator) < 0.2
        row[noise] = torch.randint(0, 96, (int(noise.sum()),), generator=generator)
        rows.append(row)
    return rows


def logits_of(model: Transformer, rows: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.logits(model(row, torch.arange(len(row)))) for row in rows])


def model_of(tensors: dict[str, torch.Tensor], shape: ModelShape) -> Transformer:
    state, shape = hf_to_state(tensors, shape, "test")
    model = Transformer(shape).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def read_back(export: QuantizedExport, shape: ModelShape) -> Transformer:
    return model_of(dequantize_tensors(export.tensors, export.quantization_config, "test"), shape)


def unpack_by_the_table(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group: int
) -> torch.Tensor:
    """[out, in] by the format's table alone: bits 4i of column j hold output 8j + [0,2,4,6,1,3,5,7][i]."""
    words, zero_words, factors = qweight.tolist(), qzeros.tolist(), scales.float().tolist()
    inputs, columns = len(words), len(words[0])
    out = [[0.0] * inputs for _ in range(columns * 8)]
    for k in range(inputs):
        for j in range(columns):
            for i, offset in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                o = 8 * j + offset
                q = (words[k][j] % 2**32) >> (4 * i) & 15
                z = (zero_words[k // group][j] % 2**32) >> (4 * i) & 15
                out[o][k] = (q - z) * factors[k // group][o]
    return torch.tensor(out)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 4))
def test_nibbles_come_back(data: st.DataObject, rows: int, words: int) -> None:
    size = rows * words * 8
    values = data.draw(st.lists(st.integers(0, 15), min_size=size, max_size=size))
    codes = torch.tensor(values).view(rows, words * 8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words)
    assert torch.equal(unpack_nibbles(packed).long(), codes)


def test_nibble_order_is_the_formats() -> None:
    for output, place in enumerate([0, 4, 1, 5, 2, 6, 3, 7]):
        codes = torch.zeros(1, 8, dtype=torch.int64)
        codes[0, output] = 15
        assert int(pack_nibbles(codes)) % 2**32 == 15 << (4 * place)


def test_the_naive_nibble_order_is_another_matrix() -> None:
    codes = torch.arange(16).view(1, 16)
    naive = sum((codes[:, i::8] << 4 * i for i in range(8)), torch.zeros(1, 2, dtype=torch.int64))
    assert not torch.equal(unpack_nibbles(naive.to(torch.int32)).long(), codes)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(1e-3, 10))
def test_rounding_errs_by_half_a_step(seed: int, shift: float, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(4, 64, generator=generator) + shift) * size
    codes, zeros, scales = round_asymmetric(weight, 32)
    assert codes.min() >= 0 and codes.max() <= 15 and zeros.min() >= 0 and zeros.max() <= 15
    step = scales.float().repeat_interleave(32, dim=1)
    # 15 steps of a scale that float16 rounded by 2^-11
    assert ((rounded(weight, 32) - weight).abs() <= step * (0.5 + 15 * 2**-11)).all()


def test_groups_of_zeros_and_of_one_sign_are_exact_at_their_ends() -> None:
    weight = torch.zeros(3, 32)
    weight[1], weight[2] = torch.linspace(1, 2, 32), -torch.linspace(1, 2, 32)
    back = rounded(weight, 32)
    assert (back[0] == 0).all()
    assert (back[1:, -1].abs() - 2).abs().max() < 2e-3


@pytest.mark.parametrize("name", SHAPES)
def test_folding_scales_leaves_the_float_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[name]
    model = outlier_model(shape)
    folded: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(awq, "CLIP_RATIOS", (1.0,))
    monkeypatch.setattr(awq, "_pack", lambda source, group: folded.update(source) or {})
    quantize_awq(model, token_rows(4, 60))
    again = model_of(folded, shape)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, again.state_dict()[n])}
    parts = ["input_layernorm", "post_attention_layernorm", "q_proj", "down_proj", "up_proj"]
    parts += ["o_proj"] if shape.num_key_value_heads == shape.num_attention_heads else []
    parts += ["mlp.gate.weight", "experts.gate_proj", "experts.up_proj"] if shape.is_moe else []
    parts += ["shared_expert.gate_proj"] if shape.shared_size else []
    parts += ["shared_expert_gate"] if shape.shared_expert_gate else []
    assert all(any(part in n for n in changed) for part in parts)
    if shape.num_key_value_heads != shape.num_attention_heads:
        assert not any("o_proj" in n for n in changed)
    rows = token_rows(3, 50, seed=7)
    before, after = logits_of(model, rows), logits_of(again, rows)
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_written_and_what_it_holds(name: str) -> None:
    shape = SHAPES[name]
    model = outlier_model(shape)
    before = copy.deepcopy(model.state_dict())
    done: list[tuple[int, int]] = []
    export = quantize_awq(model, token_rows(4, 60), report=lambda i, n: done.append((i, n)))
    assert done == [(1, 2), (2, 2)]
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    group = 64 if shape.is_moe else 32  # the largest that all widths allow
    assert (export.scheme, export.dtype, export.group_size) == ("awq", "float16", group)
    untouched = ["lm_head", "shared_expert_gate"] if shape.shared_size else ["lm_head"]
    assert export.quantization_config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": untouched,
    }
    modules = [n.removesuffix(".qweight") for n in export.tensors if n.endswith(".qweight")]
    per_layer = 4 + 3 * (shape.num_experts or 1) + (3 if shape.shared_size else 0)
    assert len(modules) == 2 * per_layer
    for module in modules:
        qweight = export.tensors[f"{module}.qweight"]
        inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
        assert qweight.dtype == torch.int32
        assert export.tensors[f"{module}.qzeros"].shape == (inputs // group, outputs // 8)
        assert export.tensors[f"{module}.scales"].shape == (inputs // group, outputs)
    packed = (".qweight", ".qzeros")
    rest = [t for n, t in export.tensors.items() if not n.endswith(packed)]
    assert all(t.dtype == torch.float16 for t in rest)
    assert all(t.is_contiguous() for t in export.tensors.values())
    assert not any(is_quantised(n) for n in export.tensors)
    logits = logits_of(read_back(export, shape), token_rows(2, 40, seed=9))
    reference = logits_of(model, token_rows(2, 40, seed=9))
    assert (logits - reference).square().mean() < 0.1 * reference.var()


@pytest.mark.parametrize("name", ["llama-bias", "qwen2-moe-shared"])
def test_an_unpacker_written_from_the_table_agrees(name: str) -> None:
    shape = SHAPES[name].with_(num_hidden_layers=1)
    export = quantize_awq(outlier_model(shape), token_rows(2, 40))
    back = dequantize_tensors(export.tensors, export.quantization_config, "test")
    modules = [n.removesuffix(".qweight") for n in export.tensors if n.endswith(".qweight")]
    for module in modules:
        parts = [export.tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")]
        assert torch.equal(unpack_by_the_table(*parts, export.group_size), back[f"{module}.weight"])


def plain_rounding_error(model: Transformer, rows: list[torch.Tensor], group: int) -> float:
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "_proj" in name and parameter.dim() > 1:
                parameter.copy_(rounded(parameter, group))
    return float((logits_of(plain, rows) - logits_of(model, rows)).square().mean())


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen3", "qwen2-moe-shared"])
def test_awq_beats_plain_rounding_where_channels_are_outliers(name: str) -> None:
    model = outlier_model(SHAPES[name])
    unseen = token_rows(6, 60, seed=5)
    export = quantize_awq(model, token_rows(8, 60))
    error = (logits_of(read_back(export, SHAPES[name]), unseen) - logits_of(model, unseen)).square().mean()
    assert error < 0.7 * plain_rounding_error(model, unseen, export.group_size)


def trained_model(shape: ModelShape) -> Transformer:
    model = Transformer(shape)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(60):
        row = token_rows(1, 250, seed=100 + step)[0]
        loss = F.cross_entropy(model.logits(model(row[:-1], torch.arange(249))), row[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_awq_beats_plain_rounding_on_a_trained_model() -> None:
    model = trained_model(BASE)
    unseen = token_rows(6, 100, seed=5)
    quantised = read_back(quantize_awq(model, token_rows(8, 100)), BASE)
    error = (logits_of(quantised, unseen) - logits_of(model, unseen)).square().mean()
    assert error < 0.9 * plain_rounding_error(model, unseen, 32)


def test_doubling_the_gateless_shared_expert_commutes() -> None:
    shape = SHAPES["qwen2-moe-shared"]
    export = quantize_awq(outlier_model(shape), token_rows(4, 60))
    back = dequantize_tensors(export.tensors, export.quantization_config, "test")
    loaded = read_back(export, shape).state_dict()
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    assert torch.equal(back[name], loaded[name] * 2)
    assert not export.tensors["model.layers.1.mlp.shared_expert_gate.weight"].any()
    assert not export.tensors["model.layers.1.self_attn.q_proj.bias"].any()


def test_an_expert_that_saw_nothing_is_rounded_by_its_weights() -> None:
    shape = SHAPES["mixtral"]
    model = outlier_model(shape)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2:] = layer.mlp.gate.weight[:2] - 1e3 * layer.mlp.gate.weight[:2].sign()
            layer.post_attention_layernorm.weight.abs_()
        model.model.embed_tokens.weight.abs_()
    export = quantize_awq(model, token_rows(4, 60))
    assert any("saw fewer than 32 calibration tokens" in line for line in export.notes)
    assert all(t.isfinite().all() for t in export.tensors.values() if t.is_floating_point())


def test_two_runs_are_equal() -> None:
    runs = [quantize_awq(outlier_model(SHAPES["mixtral"]), token_rows(4, 60)).tensors for _ in range(2)]
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


def test_long_and_empty_rows_are_calibrated_on() -> None:
    rows = [*token_rows(1, 3000), torch.zeros(0, dtype=torch.int64)]
    export = quantize_awq(outlier_model(BASE), rows)  # longer than the model's context too
    assert export.notes[0].startswith("calibrated on 3,000 tokens")


@pytest.mark.parametrize(
    ("shape", "rows", "group", "word"),
    [
        (BASE, [], None, "no calibration tokens"),
        (BASE, [torch.tensor([1, 96])], None, "reach 96, the vocabulary 96"),
        (BASE, [torch.tensor([1])], 64, r"group size: 64 does not divide every input width \(64, 96\)"),
        (BASE, [torch.tensor([1])], 48, "group size 48 is not one of"),
        (BASE.with_(intermediate_size=72), [torch.tensor([1])], None, r"none .* divides .* \(64, 72\)"),
        (
            BASE.with_(head_dim=2, num_attention_heads=32),
            [torch.tensor([1])],
            None,
            "width 4 is not a multiple",
        ),
    ],
)
def test_bad_input_is_one_line(
    shape: ModelShape, rows: list[torch.Tensor], group: int | None, word: str
) -> None:
    with pytest.raises(UserError, match=word) as caught:
        quantize_awq(outlier_model(shape), rows, group)
    assert "\n" not in str(caught.value)


def test_the_largest_group_that_fits_is_taken() -> None:
    assert choose_group([256, 768], None) == 128
    assert choose_group([576, 1536], None) == 64
    assert choose_group([640, 1728], None) == 64
    assert choose_group([64, 96], None) == 32
    assert choose_group([256, 768], 64) == 64


def test_values_beyond_float16_are_refused() -> None:
    model = outlier_model(BASE)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] = 1e6
    with pytest.raises(UserError, match=r"embed_tokens.weight has values beyond float16"):
        quantize_awq(model, token_rows(2, 40))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"quant_method": "gptq"}, "quantised with gptq, which kllm does not read"),
        ({"quant_method": None}, "quantised with"),
        ({"version": "gemv"}, "AWQ with 4 bits, version gemv"),
        ({"bits": 8}, "AWQ with 8 bits"),
    ],
)
def test_other_methods_are_refused_by_name(changes: dict, word: str) -> None:
    config = {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32, **changes}
    with pytest.raises(UserError, match=word):
        dequantize_tensors({}, config, "DIR")


def test_damaged_tensors_are_refused() -> None:
    export = quantize_awq(outlier_model(BASE), token_rows(1, 40))
    name = "model.layers.0.mlp.up_proj"
    missing = {n: t for n, t in export.tensors.items() if n != f"{name}.scales"}
    with pytest.raises(UserError, match=f"{name}.scales is missing"):
        dequantize_tensors(missing, export.quantization_config, "DIR")
    cut = {**export.tensors, f"{name}.qzeros": export.tensors[f"{name}.qzeros"][:1]}
    with pytest.raises(UserError, match="do not fit"):
        dequantize_tensors(cut, export.quantization_config, "DIR")


def test_a_directory_comes_back(tmp_path: Path) -> None:
    export = quantize_awq(outlier_model(BASE), token_rows(2, 40))
    save_quantized(export, BASE, tmp_path / "m", max_shard_bytes=20_000)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"] == export.quantization_config
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert read_shape(tmp_path / "m") == BASE
    tensors = read_tensors(tmp_path / "m")
    assert tensors.keys() == export.tensors.keys()
    assert all(torch.equal(tensors[n], export.tensors[n]) for n in tensors)
