"""Quantised directories in transformers: int8 and int4 loaded by it, AWQ by its classes after unpacking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import BASE as SMALL
from model_support import save_quantized

from kllm.export.awq import quantize_awq
from kllm.export.config import shape_to_config
from kllm.export.hf import read_tensors
from kllm.export.mapping import hf_to_state
from kllm.export.packed import quantize_packed
from kllm.export.quantized import QuantizedExport, dequantize_tensors
from kllm.export.shards import save_tensors
from kllm.files import write_json
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

BASE = SMALL.with_(vocab_size=96)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHAPES = {
    "llama": BASE,
    "llama-bias": BASE.with_(attention_bias=True),
    "qwen3": BASE.with_(qk_norm=True, head_dim=32),
    "mixtral": BASE.with_(**MOE),
    "qwen3-moe": BASE.with_(**MOE, qk_norm=True),
    "qwen2-moe-shared": BASE.with_(**MOE, num_shared_experts=1),
    "qwen2-moe-gated": BASE.with_(
        **MOE, num_shared_experts=1, shared_expert_gate=True, attention_bias=True, norm_topk_prob=False
    ),
}
ROW = torch.randint(0, 96, (100,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def random_model(shape: ModelShape) -> Transformer:
    model = Transformer(shape).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.2 if name.endswith("bias") else 0.12))
    return model


def ours(export: QuantizedExport, shape: ModelShape) -> torch.Tensor:
    """Logits of kllm's own model with the dequantised weights."""
    tensors = dequantize_tensors(export.tensors, export.quantization_config, "test")
    state, shape = hf_to_state(tensors, shape, "test")
    model = Transformer(shape).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.no_grad():
        return model.logits(model(ROW, torch.arange(len(ROW))))


def theirs(directory: Path, **how: Any) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **how).eval()
    with torch.no_grad():
        return model(ROW[None], use_cache=False).logits[0].float()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_directories_load(name: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    export = quantize_packed(random_model(SHAPES[name]), bits, dtype="float32")
    save_quantized(export, SHAPES[name], tmp_path / "m")
    reference = ours(export, SHAPES[name])
    assert reference.abs().max() > 0.5
    assert (theirs(tmp_path / "m") - reference).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "bits", "bound"), [("llama", 4, 1e-4), ("llama", 8, 1e-4), ("mixtral", 4, 2e-2)]
)
def test_the_float16_file_loads_as_float32(name: str, bits: int, bound: float, tmp_path: Path) -> None:
    """transformers unpacks experts in the dtype of their scales, so their products are rounded to float16."""
    pytest.importorskip("compressed_tensors")
    export = quantize_packed(random_model(SHAPES[name]), bits)
    save_quantized(export, SHAPES[name], tmp_path / "m")
    difference = theirs(tmp_path / "m", dtype=torch.float32) - ours(export, SHAPES[name])
    assert difference.abs().max() < bound


def test_scales_in_another_order_are_another_model(tmp_path: Path) -> None:
    """The comparison above can fail."""
    pytest.importorskip("compressed_tensors")
    export = quantize_packed(random_model(BASE), 4, dtype="float32")
    reference = ours(export, BASE)
    for name in [n for n in export.tensors if n.endswith(".weight_scale")]:
        export.tensors[name] = export.tensors[name].roll(1, dims=0)
    save_quantized(export, BASE, tmp_path / "m")
    assert (theirs(tmp_path / "m") - reference).abs().max() > 0.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_reads_what_compressed_tensors_packs(bits: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    generator = torch.Generator().manual_seed(0)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    weight = torch.randn(24, 64, generator=generator)
    scale = weight.view(24, 2, 32).abs().amax(-1) / (2 ** (bits - 1) - 1)
    zero = torch.randint(-3, 4, (24, 2), generator=generator, dtype=torch.int8) * (not symmetric)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    made = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    expected = compressor.decompress(made, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    got = dequantize_tensors({f"a.{n}": t for n, t in made.items()}, config, "test")
    assert got.keys() == {"a.weight"}
    assert torch.equal(got["a.weight"], expected)


@pytest.mark.parametrize("name", SHAPES)
def test_awq_unpacked_runs_in_their_classes(name: str, tmp_path: Path) -> None:
    """transformers reads AWQ only with a GPU kernel package; its classes take the unpacked weights."""
    shape = SHAPES[name]
    model = random_model(shape)
    export = quantize_awq(model, [ROW[:60], ROW[40:]])
    save_quantized(export, shape, tmp_path / "awq")
    tensors = dequantize_tensors(read_tensors(tmp_path / "awq"), export.quantization_config, "test")
    (tmp_path / "m").mkdir()
    save_tensors({n: t.float() for n, t in tensors.items()}, tmp_path / "m")
    write_json(tmp_path / "m" / "config.json", shape_to_config(shape))
    reference = ours(export, shape)
    assert (theirs(tmp_path / "m") - reference).abs().max() < 1e-4
    with torch.no_grad():
        original = model.logits(model(ROW, torch.arange(len(ROW))))
    # a router near a tie sends the token elsewhere: more than rounding
    assert (reference - original).square().mean() < (0.3 if shape.is_moe else 0.1) * original.var()
