"""What a model is called in GGUF: its llama.cpp architecture, its metadata keys, its tensors.

llama.cpp rotates neighbouring pairs in some architectures and halves in others; for the first kind the
rows of q and k (weights and biases) are reordered. Names and keys: llama.cpp's own converter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kllm.errors import UserError
from kllm.model.presets import ModelShape, is_llama3
from kllm.model.rope import rope_frequencies

PAIRWISE = ("llama", "granitemoe", "bailingmoe", "smollm3")
"""Architectures in which llama.cpp rotates pairs (2j, 2j + 1) and not halves (j, j + D/2)."""

OWN_OUTPUT = ("bailingmoe", "qwen2moe")
"""Architectures that need an output of their own, also when it is the embedding."""

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.gate_proj": "ffn_gate_exps.weight",
    "mlp.experts.up_proj": "ffn_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
_NATIVE = {gguf: native for native, gguf in _BLOCK.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_BLK = re.compile(r"blk\.(\d+)\.(.+)")
_ROTATED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")


def hyperparameters(shape: ModelShape, arch: str) -> dict[str, Any]:
    """Metadata keys without the architecture's prefix -> int, float, bool or str."""
    width = shape.moe_intermediate_size if shape.is_moe else shape.intermediate_size
    keys: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "context_length": shape.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "block_count": shape.num_hidden_layers,
        "feed_forward_length": width,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_key_value_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(shape.rms_norm_eps),
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": float(shape.rope_theta),
    }
    keys |= _rope_keys(shape)
    if shape.is_moe:
        keys |= {
            "expert_count": shape.num_experts,
            "expert_used_count": shape.num_experts_per_tok,
            "expert_feed_forward_length": width,
        }
    if arch in ("granitemoe", "qwen2moe"):
        keys["expert_shared_feed_forward_length"] = shape.shared_size
    if arch == "granitemoe":
        keys["logit_scale"] = 1.0
    if arch == "bailingmoe":
        keys |= {
            "expert_shared_count": shape.shared_size // width,
            "expert_weights_norm": False,
            "expert_weights_scale": 1.0,
            "leading_dense_block_count": 0,
        }
    return keys


def _rope_keys(shape: ModelShape) -> dict[str, Any]:
    scaling = shape.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}  # llama3 is a tensor, see `tensors`
    factor = float(scaling["factor"])
    keys: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "yarn":
        _, attention = rope_frequencies(shape.head_dim, shape.rope_theta, scaling)
        keys |= {
            "rope.scaling.original_context_length": int(scaling["original_max_position_embeddings"]),
            "rope.scaling.yarn_beta_fast": float(scaling.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(scaling.get("beta_slow") or 1),
        }
        own = 1 + 0.1 * math.log(factor)  # llama.cpp's own factor, which it multiplies by this key
        if abs(attention - own) > 1e-6:
            keys["rope.scaling.attn_factor"] = attention / own
    return keys


def tensors(state: dict[str, Tensor], shape: ModelShape, arch: str) -> Iterator[tuple[str, Tensor]]:
    """(GGUF name, tensor) of every tensor of a Transformer, rows in the order that `arch` rotates."""
    for name, tensor in state.items():
        if name == "lm_head.weight":
            if not shape.tie_word_embeddings or arch in OWN_OUTPUT:
                yield _TOP[name], tensor
        elif name in _TOP:
            yield _TOP[name], tensor
        elif (match := _LAYER.fullmatch(name)) and match[2] in _BLOCK:
            short = _BLOCK[match[2]]
            if arch in PAIRWISE and short in _ROTATED:
                tensor = to_pairs(tensor, shape.head_dim)
            if short == "ffn_gate_inp_shexp.weight":
                tensor = tensor.reshape(-1)
            yield f"blk.{match[1]}.{short}", tensor
        else:
            raise UserError(f"tensor {name} has no name in GGUF", where="GGUF")
    if is_llama3(shape):
        plain, _ = rope_frequencies(shape.head_dim, shape.rope_theta, None)
        scaled, _ = rope_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling)
        yield "rope_freqs.weight", plain / scaled


def native_name(name: str) -> str | None:
    """The parameter of a Transformer that a GGUF tensor is; None for tables that follow from the config."""
    if name == "rope_freqs.weight":
        return None
    for native, gguf in _TOP.items():
        if name == gguf:
            return native
    match = _BLK.fullmatch(name)
    if match is None or match[2] not in _NATIVE:
        raise UserError(f"tensor {name} belongs to no architecture that kllm runs", where="GGUF")
    return f"model.layers.{match[1]}.{_NATIVE[match[2]]}"


def rotated(name: str) -> bool:
    """Whether a GGUF tensor's rows are reordered in the `PAIRWISE` architectures."""
    match = _BLK.fullmatch(name)
    return match is not None and match[2] in _ROTATED


def to_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * D, ...] of halves (j, j + D/2) in the order of pairs (2j, 2j + 1)."""
    heads = tensor.shape[0] // head_dim
    split = tensor.reshape(heads, 2, head_dim // 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def to_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_pairs`."""
    heads = tensor.shape[0] // head_dim
    split = tensor.reshape(heads, head_dim // 2, 2, *tensor.shape[1:])
    return torch.transpose(split, 1, 2).reshape(tensor.shape)
