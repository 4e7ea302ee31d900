"""The shape of a `.pth` model: from its tensors, from what a caller says, from what its family publishes.

Sizes are told by the tensors; heads (without QK-norm), constants and the number of chosen experts are
not, and everything that had to be assumed is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kllm.errors import UserError
from kllm.export.pth_names import Generation
from kllm.model.presets import SHAPE_FIELDS, ModelShape
from kllm.model.rope import rope_frequencies

_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_CONSTANTS = ("rms_norm_eps", "rope_theta", "max_position_embeddings")
_COUNTS = ("num_attention_heads", "num_experts_per_tok", "max_position_embeddings")
ASSUMABLE = ("norm_topk_prob", "rope_scaling", *_COUNTS, "rope_theta", "rms_norm_eps")
"""What no tensor of these files tells, and a caller may say."""


def check_assume(assume: Mapping[str, Any]) -> dict[str, Any]:
    """`assume` with its RoPE scaling in Hugging Face's words; UserError for unknown or senseless values."""
    for key, value in assume.items():
        if key not in ASSUMABLE:
            raise UserError(f"{key!r} cannot be assumed", hint=f"known: {', '.join(ASSUMABLE)}")
        if key in _COUNTS:
            fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
        elif key == "norm_topk_prob":
            fits = isinstance(value, bool)
        elif key == "rope_scaling":
            fits = value is None or isinstance(value, Mapping)
        else:
            fits = isinstance(value, int | float) and value > 0
        if not fits:
            raise UserError(f"{key} cannot be {value!r}")
    said = dict(assume)
    if scaling := said.get("rope_scaling"):
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind is None:
            raise UserError("rope_scaling needs a rope_type", hint="yarn, linear or llama3")
        rest = {k: v for k, v in scaling.items() if k != "type"}
        if kind == "yarn":  # MiniMind's inference_rope_scaling leaves cos and sin at their size
            rest.setdefault("attention_factor", 1.0)
        said["rope_scaling"] = None if kind == "default" else {**rest, "rope_type": kind}
        original = scaling.get("original_max_position_embeddings")
        if original and "factor" in scaling:
            said.setdefault("max_position_embeddings", round(original * scaling["factor"]))
    return said


def parse_config(text: str, where: str) -> dict[str, Any]:
    """The ModelShape fields that kllm wrote beside its tensors (JSON); UserError when they are broken."""
    example = ModelShape(1, 1, 1, 1, 1, 1, 1).to_dict() | {"rope_scaling": {}, "no_rope_layers": []}
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, TypeError):
        config = None
    if not isinstance(config, dict):
        raise UserError("the config in it is no JSON object", where=where)
    if unknown := sorted(set(config) - set(SHAPE_FIELDS)):
        raise UserError(f"its config has {unknown[0]}, which this version of kllm does not know", where=where)
    if lacking := [name for name in (*_HEADS, *_CONSTANTS) if name not in config]:
        raise UserError(f"its config has no {lacking[0]}", where=where)
    for name, value in config.items():
        kinds: tuple[type, ...] = (type(example[name]),)
        if kinds == (float,):
            kinds = (int, float)
        optional = name == "rope_scaling" and value is None
        if not optional and (not isinstance(value, kinds) or isinstance(value, bool) != (kinds == (bool,))):
            raise UserError(f"its config has {name} = {value!r}", where=where)
    return config | {"no_rope_layers": tuple(config.get("no_rope_layers", ()))}


@dataclass(frozen=True)
class Inferred:
    """A shape, the widths of the file's shared experts, and what was assumed (lines for a reader)."""

    shape: ModelShape
    shared_widths: list[int]
    assumed: list[str]


def infer_shape(
    tensors: dict[str, Tensor],
    generation: Generation,
    assume: dict[str, Any],
    config: dict[str, Any] | None,
    where: str,
) -> Inferred:
    """The shape that a file's tensors, under Hugging Face's names, and its family have.

    Args:
        tensors: of the whole file; only their sizes are looked at, and whether the head is tied.
        generation: gives what no tensor tells.
        assume: from `check_assume`; goes before the generation's values.
        config: what kllm wrote into the file itself; then nothing is assumed.

    Raises:
        UserError: layers missing, heads that do not divide, a config for other tensors.
    """
    told = _told(tensors, where)
    said = {**(config or {}), **assume}
    q_rows = _size(tensors, "model.layers.0.self_attn.q_proj.weight", 2, where)[0]
    k_rows = _size(tensors, "model.layers.0.self_attn.k_proj.weight", 2, where)[0]
    told |= _heads(tensors, q_rows, k_rows, said.get("num_attention_heads"), generation, where)
    widths: list[int] = []
    if told["num_experts"]:
        while (name := f"model.layers.0.mlp.shared_experts.{len(widths)}.gate_proj.weight") in tensors:
            widths.append(_size(tensors, name, 2, where)[0])
    head = tensors.get("lm_head.weight")
    tied = head is None or torch.equal(head, tensors["model.embed_tokens.weight"])
    if config is not None:
        shape = _with_config(told, config, assume, sum(widths), where)
        shape = shape.with_(tie_word_embeddings=shape.tie_word_embeddings and tied)
        return Inferred(_check_rope(shape, where), widths, [])
    fields: dict[str, Any] = {name: said.get(name, getattr(generation, name)) for name in _CONSTANTS}
    fields |= {"rope_scaling": said.get("rope_scaling"), "tie_word_embeddings": tied}
    if told["num_experts"]:
        fields |= _routing(told, widths, said, generation)
    shape = _check_rope(ModelShape(**told, **fields), where)
    return Inferred(shape, widths, _lines(shape, assume, generation))


def _check_rope(shape: ModelShape, where: str) -> ModelShape:
    try:
        rope_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise UserError(f"rope_scaling {shape.rope_scaling} is not whole", where=where) from None
    return shape


def _size(tensors: dict[str, Tensor], name: str, dims: int, where: str) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"tensor {name} is missing", where=where)
    size = tuple(tensors[name].shape)
    if len(size) != dims or 0 in size:
        raise UserError(f"tensor {name} has shape {size}", where=where)
    return size


def _told(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """The fields that the sizes of layer 0 tell, heads apart."""
    vocab, hidden = _size(tensors, "model.embed_tokens.weight", 2, where)
    numbers = {int(m.group(1)) for n in tensors if (m := re.match(r"model\.layers\.(\d+)\.", n))}
    count = max(numbers, default=-1) + 1
    if missing := sorted(set(range(count)) - numbers) if len(numbers) < count <= 10_000 else []:
        raise UserError(f"layer {missing[0]} of {count} is missing", where=where)
    if not 0 < count == len(numbers):
        raise UserError("no whole layers in it", where=where)
    mlp = "model.layers.0.mlp"
    experts = _size(tensors, f"{mlp}.gate.weight", 2, where)[0] if f"{mlp}.gate.weight" in tensors else 0
    if experts > len(tensors):  # also keeps a crafted size from costing memory
        raise UserError(f"a router for {experts} experts, {len(tensors)} tensors in all", where=where)
    first = f"{mlp}.experts.0" if experts else mlp
    width = _size(tensors, f"{first}.gate_proj.weight", 2, where)[0]
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": count,
        "qk_norm": "model.layers.0.self_attn.q_norm.weight" in tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "num_experts": experts,
        "moe_intermediate_size": width if experts else 0,
        "shared_expert_gate": f"{mlp}.shared_expert_gate.weight" in tensors,
    }


def _heads(
    tensors: dict[str, Tensor],
    q_rows: int,
    k_rows: int,
    said: int | None,
    generation: Generation,
    where: str,
) -> dict[str, int]:
    norm = "model.layers.0.self_attn.q_norm.weight"
    if norm in tensors:
        dim = _size(tensors, norm, 1, where)[0]
        heads = q_rows // dim
        if said is not None and said != heads:
            raise UserError(f"has {heads} query heads of {dim} (q_norm tells), not {said}", where=where)
    else:
        # QiChat's heads are 64 wide in all sizes but its smallest
        heads = said or generation.num_attention_heads or max(q_rows // (32 if k_rows % 64 else 64), 1)
        dim = q_rows // heads
    kv = k_rows // max(dim, 1)
    if dim * heads != q_rows or dim * kv != k_rows or heads % max(kv, 1) or dim % 2:
        raise UserError(
            f"{heads} query heads do not divide q_proj's {q_rows} and k_proj's {k_rows} rows evenly",
            where=where,
            hint="say the right num_attention_heads",
        )
    return dict(zip(_HEADS, (heads, kv, dim), strict=True))


def _routing(
    told: dict[str, Any], widths: list[int], said: dict[str, Any], generation: Generation
) -> dict[str, Any]:
    chosen = said.get("num_experts_per_tok", generation.num_experts_per_tok)
    alike = all(w == told["moe_intermediate_size"] for w in widths)
    return {
        "num_experts_per_tok": chosen,
        "norm_topk_prob": said.get("norm_topk_prob", True)
        and (chosen > 1 or generation.lone_expert_weighs_one),
        "num_shared_experts": len(widths) if alike else 0,
        "shared_expert_intermediate_size": 0 if alike else sum(widths),
        "router_aux_loss_coef": generation.router_aux_loss_coef,
        "aux_loss_type": generation.aux_loss_type,
    }


def _with_config(
    told: dict[str, Any], config: dict[str, Any], assume: dict[str, Any], shared: int, where: str
) -> ModelShape:
    if told["num_experts"]:
        told = {k: v for k, v in told.items() if k != "intermediate_size"}  # a MoE has no dense MLP
    if "num_attention_heads" in assume:
        config = {k: v for k, v in config.items() if k not in _HEADS}
    for name, value in told.items():
        if config.get(name, value) != value:
            raise UserError(f"its config says {name} {config[name]}, its tensors {value}", where=where)
    shape = ModelShape(**{"intermediate_size": 0, **config, **told, **assume})
    if shape.shared_size != shared:
        raise UserError(
            f"its config says shared experts {shape.shared_size} wide, its tensors {shared}", where=where
        )
    return shape


def _lines(shape: ModelShape, assume: dict[str, Any], generation: Generation) -> list[str]:
    lines = []
    if not shape.qk_norm and "num_attention_heads" not in assume:
        lines.append(f"{shape.num_attention_heads} query heads of {shape.head_dim} (no tensor tells)")
    if shape.is_moe and not {"num_experts_per_tok", "norm_topk_prob"} <= set(assume):
        weights = "renormalised" if shape.norm_topk_prob else "as the router gives them"
        k, E = shape.num_experts_per_tok, shape.num_experts
        lines.append(f"{k} of {E} experts per token, weights {weights} ({generation.name}'s)")
    if constants := [f"{n} {getattr(shape, n):g}" for n in _CONSTANTS if n not in assume]:
        lines.append(f"{', '.join(constants)} ({generation.name}'s)")
    return lines
