"""The one mapping table between a Transformer's parameters and a Hugging Face directory's tensors.

Names in memory are Hugging Face's but for experts (stacked in memory, one tensor each on disk) and
the gateless shared expert, which Qwen2-MoE runs exactly with a zero gate (sigmoid = 1/2) and a
doubled down projection.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from kllm.errors import UserError
from kllm.model.presets import ModelShape, hf_model_type

_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = re.compile(r"(.*)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")
_FUSED = re.compile(r"(.*)\.mlp\.experts\.(gate_up|gate|up|down)_proj$")


def state_to_hf(
    state: dict[str, Tensor], shape: ModelShape, model_type: str | None = None
) -> dict[str, Tensor]:
    """Tensors of a Transformer under the names and forms of its Hugging Face architecture (or another's)."""
    model_type = model_type or hf_model_type(shape)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and shape.tie_word_embeddings and not shape.is_moe:
            continue
        if fused := _FUSED.match(name):
            prefix, part = fused.group(1), f"{fused.group(2)}_proj"
            for e in range(shape.num_experts):
                if model_type == "mixtral":
                    out[f"{prefix}.block_sparse_moe.experts.{e}.{_MIXTRAL[part]}.weight"] = tensor[e]
                else:
                    out[f"{prefix}.mlp.experts.{e}.{part}.weight"] = tensor[e]
        elif name.endswith(".mlp.gate.weight") and model_type == "mixtral":
            out[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
        elif name.endswith(".mlp.shared_expert.down_proj.weight") and not shape.shared_expert_gate:
            out[name] = tensor * 2
        else:
            out[name] = tensor
    _add_neutral(out, state, shape, model_type)
    return out


def _add_neutral(
    out: dict[str, Tensor], state: dict[str, Tensor], shape: ModelShape, model_type: str
) -> None:
    """Zero tensors that an architecture's readers expect and that change nothing."""
    embedding = state["model.embed_tokens.weight"]
    if shape.is_moe and shape.tie_word_embeddings:
        out["lm_head.weight"] = embedding.clone()
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        if model_type == "qwen2_moe":
            if not shape.attention_bias:
                for part, size in (("q", shape.q_size), ("k", shape.kv_size), ("v", shape.kv_size)):
                    out[f"{layer}.self_attn.{part}_proj.bias"] = embedding.new_zeros(size)
            if not shape.shared_expert_gate:
                out[f"{layer}.mlp.shared_expert_gate.weight"] = embedding.new_zeros(1, shape.hidden_size)
        elif model_type == "llama" and shape.attention_bias:
            out[f"{layer}.self_attn.o_proj.bias"] = embedding.new_zeros(shape.hidden_size)


def hf_to_state(
    tensors: dict[str, Tensor], shape: ModelShape, where: str
) -> tuple[dict[str, Tensor], ModelShape]:
    """The inverse of `state_to_hf`; also says what the tensors reveal (tying, gates, biases)."""
    tensors = {_canonical(n): t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    state: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.match(name):
            key = (match.group(1), f"{match.group(3)}_proj")
            experts.setdefault(key, {})[int(match.group(2))] = tensor
        elif name.endswith(".mlp.experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            if tensor.dim() != 3 or tensor.shape[1] % 2:
                raise UserError(f"tensor {name} has shape {tuple(tensor.shape)}", where=where)
            state[stem + "gate_proj"], state[stem + "up_proj"] = tensor.chunk(2, dim=1)
        else:
            state[name] = tensor
    for (prefix, part), by_number in experts.items():
        stacked = [by_number[e] for e in sorted(by_number)]
        if len(sizes := {tuple(t.shape) for t in stacked}) > 1:
            raise UserError(f"the experts' {part} in {prefix} have shapes {sorted(sizes)}", where=where)
        state[f"{prefix}.mlp.experts.{part}"] = torch.stack(stacked)
    shape = _drop_neutral(state, shape, where)
    return state, shape


def _canonical(name: str) -> str:
    for old, new in (("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w3.", ".up_proj.")):
        name = name.replace(old, new)
    name = name.replace(".w2.", ".down_proj.")
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _drop_neutral(state: dict[str, Tensor], shape: ModelShape, where: str) -> ModelShape:
    for name in [n for n in state if n.endswith("o_proj.bias")]:
        if state.pop(name).any():
            hint = "kllm's attention has no bias there"
            raise UserError(f"{name} is not zero: it cannot be represented", where=where, hint=hint)
    gates = [n for n in state if n.endswith("shared_expert_gate.weight")]
    if gates and not any(state[n].any() for n in gates):  # kllm's own gateless shared expert
        for name in gates:
            del state[name]
        for name in [n for n in state if n.endswith("shared_expert.down_proj.weight")]:
            state[name] = state[name] / 2
    elif gates:
        shape = shape.with_(shared_expert_gate=True)
    biases = [n for n in state if n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    if shape.is_moe and biases and not any(state[n].any() for n in biases):
        for name in biases:
            del state[name]
        biases = []
    shape = shape.with_(attention_bias=bool(biases))
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    tied = shape.tie_word_embeddings  # a missing head of an untied model is found missing later
    if head is not None and embedding is not None and shape.is_moe:
        tied = torch.equal(head, embedding)
    if tied and embedding is not None:
        state["lm_head.weight"] = embedding
    return shape.with_(tie_word_embeddings=tied)
