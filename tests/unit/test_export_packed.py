"""int8 and int4 in compressed-tensors' packed layout: words, scales, what stays as it is, reading back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_support import BASE

from kllm.errors import UserError
from kllm.export import packed
from kllm.export.mapping import hf_to_state
from kllm.export.packed import quantize_packed, round_symmetric
from kllm.export.quantized import dequantize_tensors, is_quantised, pack_bits, unpack_bits
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHAPES = {
    "llama": BASE,
    "llama-bias": BASE.with_(attention_bias=True),
    "qwen3": BASE.with_(qk_norm=True, head_dim=32),
    "mixtral": BASE.with_(**MOE),
    "qwen3-moe": BASE.with_(**MOE, qk_norm=True),
    "qwen2-moe-shared": BASE.with_(**MOE, num_shared_experts=1),
}


def random_model(shape: ModelShape) -> Transformer:
    model = Transformer(shape).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * 0.12)
    return model


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([4, 8]), st.integers(1, 4), st.integers(1, 19))
def test_codes_come_back(data: st.DataObject, bits: int, rows: int, width: int) -> None:
    top = 2 ** (bits - 1)
    size = rows * width
    values = data.draw(st.lists(st.integers(-top, top - 1), min_size=size, max_size=size))
    codes = torch.tensor(values).view(rows, width)
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-width * bits // 32))
    assert torch.equal(unpack_bits(words, bits, width).long(), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    codes = torch.tensor([[7, -8, -8, -8, -8, -8, -8, -8]])
    assert int(pack_bits(codes, 4)) == 15
    assert int(pack_bits(codes.flip(1), 4)) % 2**32 == 15 << 28
    assert int(pack_bits(torch.tensor([[127, -128, -128, -128]]), 8)) == 255


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_errors_are_bounded_and_below_those_of_the_full_range(bits: int, group: int | None) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = round_symmetric(weight, bits, group)
    top = 2 ** (bits - 1)
    assert codes.min() >= -top and codes.max() <= top - 1
    width = group or 64
    step = scales.float().repeat_interleave(width, dim=1)
    back = codes.float() * step
    inside = weight.abs() <= step * (top - 1)
    assert ((back - weight).abs()[inside] <= step[inside] * 0.5001).all()
    largest = weight.view(24, -1, width).abs().amax(-1).repeat_interleave(width, dim=1)
    assert ((back - weight).abs() <= largest * 0.41).all()
    full = (largest / (top - 1)).half().float()
    plain = (weight / full).round().clamp(-top, top - 1) * full
    clipped, simple = ((x - weight).square().view(24, -1, width).sum(-1) for x in (back, plain))
    assert (clipped <= simple * (1 + 1e-6)).all()
    if bits == 4:
        assert clipped.sum() < 0.97 * simple.sum()


def test_rows_of_zeros_stay_zero() -> None:
    codes, scales = round_symmetric(torch.zeros(2, 32), 4, 32)
    assert not codes.any() and (scales > 0).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_written_and_what_comes_back(name: str, bits: int) -> None:
    shape = SHAPES[name]
    model = random_model(shape)
    before = copy.deepcopy(model.state_dict())
    export = quantize_packed(model, bits)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    group = None if bits == 8 else 64 if shape.is_moe else 32
    assert (export.scheme, export.dtype, export.group_size) == (f"int{bits}", "float16", group)
    modules = [n.removesuffix(".weight_packed") for n in export.tensors if n.endswith(".weight_packed")]
    assert len(modules) == 2 * (4 + 3 * (shape.num_experts or 1) + (3 if shape.shared_size else 0))
    for module in modules:
        outputs, inputs = export.tensors[f"{module}.weight_shape"].tolist()
        assert export.tensors[f"{module}.weight_shape"].dtype == torch.int64
        assert export.tensors[f"{module}.weight_packed"].shape == (outputs, inputs * bits // 32)
        assert export.tensors[f"{module}.weight_scale"].shape == (outputs, inputs // group if group else 1)
    assert not any(is_quantised(n) for n in export.tensors)
    assert all(t.is_contiguous() for t in export.tensors.values())
    tensors = dequantize_tensors(export.tensors, export.quantization_config, "test")
    state, _ = hf_to_state(tensors, shape, "test")
    again = Transformer(shape).eval()
    again.load_state_dict({n: t.float() for n, t in state.items()})
    row = torch.arange(50)
    with torch.no_grad():
        ours, theirs = model.logits(model(row, row)), again.logits(again(row, row))
    error = float((ours - theirs).square().mean() / ours.var())
    # a router near a tie sends the token elsewhere: more than rounding
    assert error < (1e-3 if bits == 8 else 0.3 if shape.is_moe else 0.1)


def test_doubling_the_gateless_shared_expert_commutes() -> None:
    model = random_model(SHAPES["qwen2-moe-shared"])
    export = quantize_packed(model, 4)
    name = "model.layers.0.mlp.shared_expert.down_proj"
    codes, scales = round_symmetric(model.state_dict()[f"{name}.weight"], 4, 64)
    assert torch.equal(export.tensors[f"{name}.weight_packed"], pack_bits(codes, 4))
    assert torch.equal(export.tensors[f"{name}.weight_scale"], scales * 2)


def test_routers_are_named_as_left_alone() -> None:
    assert quantize_packed(random_model(BASE), 8).quantization_config["ignore"] == ["lm_head"]
    ignore = quantize_packed(random_model(SHAPES["mixtral"]), 8).quantization_config["ignore"]
    assert ignore == ["lm_head", r"re:.*\.gate$", r"re:.*\.shared_expert_gate$"]


@pytest.mark.parametrize(
    ("bits", "group", "word"),
    [(3, None, "3 bits"), (8, 64, "no group size"), (4, 128, "128 does not divide"), (4, 20, "not one of")],
)
def test_bad_requests_are_one_line(bits: int, group: int | None, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        quantize_packed(random_model(BASE), bits, group)
    assert "\n" not in str(caught.value)


def test_values_beyond_float16_are_refused() -> None:
    model = random_model(BASE)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e9
    with pytest.raises(UserError, match="beyond float16"):
        quantize_packed(model, 8)


@pytest.mark.parametrize(
    ("changes", "weights", "word"),
    [
        ({"format": "int-quantized"}, {}, "int-quantized"),
        ({"format": "float-quantized"}, {"type": "float"}, "float-quantized, float"),
        ({}, {"actorder": "group"}, "act-order"),
        ({}, {"num_bits": 3}, "3 bits"),
        ({"config_groups": {}}, {}, "no scheme"),
    ],
)
def test_other_variants_are_refused_by_name(changes: dict, weights: dict, word: str) -> None:
    config = copy.deepcopy(quantize_packed(random_model(BASE), 4).quantization_config)
    config["config_groups"]["group_0"]["weights"].update(weights)
    config.update(changes)
    with pytest.raises(UserError, match=word):
        dequantize_tensors({}, config, "DIR")


def test_damaged_tensors_are_refused() -> None:
    export = quantize_packed(random_model(BASE), 4)
    name = "model.layers.1.self_attn.q_proj"
    missing = {n: t for n, t in export.tensors.items() if n != f"{name}.weight_scale"}
    with pytest.raises(UserError, match=f"{name}.weight_scale is missing"):
        dequantize_tensors(missing, export.quantization_config, "DIR")
    cut = {**export.tensors, f"{name}.weight_packed": export.tensors[f"{name}.weight_packed"][:, :1]}
    with pytest.raises(UserError, match="do not fit"):
        dequantize_tensors(cut, export.quantization_config, "DIR")


def test_clipping_is_what_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))

    def error() -> float:
        codes, scales = round_symmetric(weight, 4, 64)
        return float((codes * scales.float() - weight).square().mean())

    clipped = error()
    monkeypatch.setattr(packed, "CLIP_RATIOS", (1.0,))
    assert clipped < 0.95 * error()
