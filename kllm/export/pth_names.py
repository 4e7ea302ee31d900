"""The `.pth` families: what each calls its tensors, and what none of their tensors tells.

MiniMind's three generations, their clones (YuanMeng, MiniLLM) and QiChat, all brought to Hugging Face's
names with one tensor per expert. Facts: seed catalogue 1.1, 1.2, 1.7, 1.8. First-generation models
rotate neighbouring rows of q and k (2i, 2i + 1) where ours rotate halves: `half_rows` reorders them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from kllm.errors import UserError
from kllm.model.presets import ModelShape

_Rules = tuple[tuple[str, str], ...]
_LAYER = r"layers\.(\d+)\."
_OURS = r"model.layers.\1."

_BARE: _Rules = ((r"(embed_tokens|norm|layers\..*)", r"model.\1"),)
"""Hugging Face's names, perhaps of the decoder alone."""
_LLAMA: _Rules = (
    (r"tok_embeddings", "model.embed_tokens"),
    (r"output", "lm_head"),
    (r"norm", "model.norm"),
    (_LAYER + r"attention\.w([qkvo])", _OURS + r"self_attn.\2_proj"),
    (_LAYER + r"attention_norm", _OURS + "input_layernorm"),
    (_LAYER + r"ffn_norm", _OURS + "post_attention_layernorm"),
    (_LAYER + r"feed_forward\.gate", _OURS + "mlp.gate"),
    (_LAYER + r"feed_forward\.((?:experts\.\d+\.)?)w1", _OURS + r"mlp.\2gate_proj"),
    (_LAYER + r"feed_forward\.((?:experts\.\d+\.)?)w3", _OURS + r"mlp.\2up_proj"),
    (_LAYER + r"feed_forward\.((?:experts\.\d+\.)?)w2", _OURS + r"mlp.\2down_proj"),
    (_LAYER + r"feed_forward\.shared_experts\.w1", _OURS + "mlp.shared_experts.0.gate_proj"),
    (_LAYER + r"feed_forward\.shared_experts\.w3", _OURS + "mlp.shared_experts.0.up_proj"),
    (_LAYER + r"feed_forward\.shared_experts\.w2", _OURS + "mlp.shared_experts.0.down_proj"),
)
_QICHAT: _Rules = (
    (r"model\.word_emb\.word_embeddings", "model.embed_tokens"),
    (r"model\.final_layer_norm", "model.norm"),
    (r"lm_head\.dense", "lm_head"),
    (r"model\.blocks\.(\d+)\.self_attention\.([qkvo])_proj", _OURS + r"self_attn.\2_proj"),
    (r"model\.blocks\.(\d+)\.input_layer_norm", _OURS + "input_layernorm"),
    (r"model\.blocks\.(\d+)\.output_layer_norm", _OURS + "post_attention_layernorm"),
    (r"model\.blocks\.(\d+)\.ffn\.(gate|up|down)_proj", _OURS + r"mlp.\2_proj"),
)


@dataclass(frozen=True)
class Generation:
    """One family: its names, and its published values of what no tensor tells."""

    name: str
    rules: _Rules
    num_attention_heads: int
    """0: as many as give heads of 64 (QiChat)."""
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    pairwise: bool = False
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01
    aux_loss_type: str = "sequence"
    lone_expert_weighs_one: bool = False
    """With one expert per token the renormalised weight is 1 (MiniMind-3); before, it stayed p."""

    def rename(self, module: str) -> str:
        """Hugging Face's name of a module (no `.weight`); names outside the table come back unchanged."""
        for pattern, ours in self.rules:
            if match := re.fullmatch(pattern, module):
                return match.expand(ours)
        return module


MINIMIND3 = Generation(
    "minimind-3",
    _BARE,
    8,
    rms_norm_eps=1e-6,
    num_experts_per_tok=1,
    router_aux_loss_coef=5e-4,
    aux_loss_type="switch",
    lone_expert_weighs_one=True,
)
MINIMIND2 = Generation("minimind2", _BARE, 8)
MINIMIND1 = Generation("minimind-1", _LLAMA, 8, max_position_embeddings=8192, pairwise=True)
MINIMIND_V1 = Generation(
    "minimind-v1", _LLAMA, 16, rope_theta=1e4, max_position_embeddings=512, pairwise=True
)
QICHAT = Generation("qichat", _QICHAT, 0, rope_theta=1e4, rms_norm_eps=1e-6, max_position_embeddings=2048)

_PREFIXES = ("_orig_mod.", "module.", "net.")
# tables and masks are recomputed; MiniLLM's shared blocks stand a second time under their real places
_DROPPED = re.compile(r"(?:^|\.)(?:freqs_cos|freqs_sin|pos_cis|mask|inv_freq)$|\.lora\.|^layers_unique\.")
_LORA = re.compile(r"(.+)\.lora\.([AB])\.weight")


def strip(name: str) -> str:
    """The name without what torch.compile, DistributedDataParallel and Lightning put before it."""
    name = name.replace("._orig_mod.", ".")
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def is_dropped(name: str) -> bool:
    """Whether a (stripped) name is no weight of the model: position tables, masks, adapters."""
    return _DROPPED.search(name) is not None


def lora_module(name: str) -> tuple[str, str] | None:
    """Module and `A` or `B` of a MiniMind LoRA tensor's (stripped) name."""
    match = _LORA.fullmatch(name)
    return (match.group(1), match.group(2)) if match else None


def recognise(tensors: dict[str, Tensor], heads: int | None, where: str) -> Generation:
    """The family of stripped names; a UserError says why a file is none.

    Args:
        tensors: all of the file's, masks too.
        heads: what the user says of the query heads.
    """
    names = set(tensors)
    if "tok_embeddings.weight" in names:
        return _first_generation(tensors, heads, where)
    if "model.word_emb.word_embeddings.weight" in names:
        return QICHAT
    if {"model.embed_tokens.weight", "embed_tokens.weight"} & names:
        return MINIMIND3 if any(n.endswith(".self_attn.q_norm.weight") for n in names) else MINIMIND2
    if "embedding.weight" in names and any(".attn.q_proj." in n for n in names):
        _refuse_mini_llm(names, where)
    if names and all(lora_module(n) for n in names):
        raise UserError(
            "a LoRA adapter, not a model", where=where, hint="give its base, and this as --adapter"
        )
    shown = ", ".join(sorted(names)[:3]) or "no tensors"
    raise UserError(f"no language model that kllm knows: {shown}", where=where)


def _first_generation(tensors: dict[str, Tensor], heads: int | None, where: str) -> Generation:
    """2024's code kept a mask and had half as many key heads as query heads, 2025's a quarter."""
    if any(".shared_ffn." in n for n in tensors):
        raise UserError("a mixture of recursions (MiniLLM's use_mor) has no exact target", where=where)
    q, k = tensors.get("layers.0.attention.wq.weight"), tensors.get("layers.0.attention.wk.weight")
    halved = q is not None and k is not None and q.dim() == k.dim() == 2 and len(q) == 2 * len(k)
    mask = tensors.get("layers.0.attention.mask")
    if mask is not None and mask.dim() == 4:
        return replace(MINIMIND_V1, max_position_embeddings=mask.shape[-1])
    return MINIMIND_V1 if halved and heads in (None, 16) else MINIMIND1


def _refuse_mini_llm(names: Iterable[str], where: str) -> None:
    routed = any(".moe." in n for n in names)
    what = "experts are" if routed else "feed-forward is"
    noise = ", and its router adds random noise when it answers too" if routed else ""
    raise UserError(
        f"mini-llm has no exact target: its {what} not gated and with biases{noise}",
        where=where,
        hint="preset mini-171m is a gated model of its size to train instead",
    )


def half_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * D, ...] that are rotated as pairs, in the order of a rotation by halves."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def file_tensors(shape: ModelShape, shared_widths: list[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole file under MiniMind's names, experts one by one.

    Args:
        shape: the architecture.
        shared_widths: the width of each shared expert in the file.
    """
    H, D = shape.hidden_size, shape.head_dim
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, H)}
    for n in range(shape.num_hidden_layers):
        layer = f"model.layers.{n}"
        table[f"{layer}.input_layernorm.weight"] = (H,)
        table[f"{layer}.post_attention_layernorm.weight"] = (H,)
        for part, size in (("q", shape.q_size), ("k", shape.kv_size), ("v", shape.kv_size)):
            table[f"{layer}.self_attn.{part}_proj.weight"] = (size, H)
            if shape.attention_bias:
                table[f"{layer}.self_attn.{part}_proj.bias"] = (size,)
        table[f"{layer}.self_attn.o_proj.weight"] = (H, shape.q_size)
        if shape.qk_norm:
            table[f"{layer}.self_attn.q_norm.weight"] = (D,)
            table[f"{layer}.self_attn.k_norm.weight"] = (D,)
        if not shape.is_moe:
            table |= _mlp(f"{layer}.mlp", H, shape.intermediate_size)
            continue
        table[f"{layer}.mlp.gate.weight"] = (shape.num_experts, H)
        for e in range(shape.num_experts):
            table |= _mlp(f"{layer}.mlp.experts.{e}", H, shape.moe_intermediate_size)
        for s, width in enumerate(shared_widths):
            table |= _mlp(f"{layer}.mlp.shared_experts.{s}", H, width)
        if shape.shared_expert_gate:
            table[f"{layer}.mlp.shared_expert_gate.weight"] = (1, H)
    table["model.norm.weight"] = (H,)
    table["lm_head.weight"] = (shape.vocab_size, H)
    return table


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
