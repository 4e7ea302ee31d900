"""A small shape of every architecture, and random models of them."""

from __future__ import annotations

from pathlib import Path

import torch

from kllm.export.hf import write_files
from kllm.export.quantized import QuantizedExport
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

BASE = ModelShape(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rope_theta=1e4,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

SHAPES = {
    "llama": BASE,
    "llama-untied": BASE.with_(tie_word_embeddings=False),
    "llama-head-dim": BASE.with_(head_dim=24),
    "llama-bias": BASE.with_(attention_bias=True),
    "llama-yarn": BASE.with_(rope_scaling=YARN),
    "llama-yarn-factor-1": BASE.with_(rope_scaling={**YARN, "attention_factor": 1.0}),
    "llama-linear": BASE.with_(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama3": BASE.with_(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "smollm3": BASE.with_(no_rope_layers=(1,)),
    "qwen3": BASE.with_(qk_norm=True, head_dim=32),
    "qwen3-yarn": BASE.with_(qk_norm=True, rope_scaling=YARN),
    "mixtral": BASE.with_(**MOE),
    "qwen3-moe": BASE.with_(**MOE, qk_norm=True, head_dim=32),
    "qwen3-moe-raw": BASE.with_(**MOE, qk_norm=True, norm_topk_prob=False),
    "qwen3-moe-top1": BASE.with_(**{**MOE, "num_experts_per_tok": 1}, qk_norm=True),
    "qwen2-moe-shared": BASE.with_(**MOE, num_shared_experts=1),
    "qwen2-moe-shared-yarn": BASE.with_(**MOE, num_shared_experts=2, rope_scaling=YARN),
    "qwen2-moe-gated": BASE.with_(
        **MOE, num_shared_experts=1, shared_expert_gate=True, attention_bias=True, norm_topk_prob=False
    ),
}


def random_model(shape: ModelShape, seed: int = 0) -> Transformer:
    """Weights large enough that a wrong formula shows."""
    model = Transformer(shape).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise if parameter.mean() > 0.5 else 0.2 * noise)
            else:
                parameter.copy_(noise * 0.12)
    return model


def save_quantized(
    export: QuantizedExport, shape: ModelShape, directory: Path, max_shard_bytes: int | None = None
) -> None:
    """A quantised model's directory, without a tokenizer."""
    directory.mkdir()
    write_files(
        export.tensors,
        shape,
        None,
        directory,
        dtype=export.dtype,
        max_shard_bytes=max_shard_bytes,
        quantization_config=export.quantization_config,
    )
