"""A smaller model cut out of a larger one: a start for distillation far ahead of random weights.

Depth: evenly spaced blocks with the first and the last, or the blocks that change their input most,
1 - cos(in, out) (Men et al. 2024, ShortGPT, eq. 1, arXiv 2403.03853). Width: residual channels, MLP
channels and whole groups of heads by the size of their activations on given rows (Muralidharan et al.
2024, Minitron, section 2.2, arXiv 2407.14679), or by the size of their weights. Heads keep their width
and with it their rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kllm.errors import UserError
from kllm.model.attention import PackedLayout
from kllm.model.moe import MoE
from kllm.model.presets import ModelShape
from kllm.model.transformer import MLP, Attention, Block, Transformer

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


class Rows(Protocol):
    """A packed row of T tokens (`data.batch.Batch` is one)."""

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor


@dataclass
class Importance:
    """What each part of a model is worth; float64, larger is kept.

    blocks: [layers] or None when unknown; hidden: [H]; heads: [layers, heads]; neurons: [intermediate] of
    each layer's MLP (of its shared expert in a mixture of experts), None where there is none.
    """

    blocks: Tensor | None
    hidden: Tensor
    heads: Tensor
    neurons: list[Tensor | None]


def student_from(
    teacher: Transformer, shape: ModelShape, batches: Iterable[Rows] = (), depth: str = "spaced"
) -> Transformer:
    """A new model of `shape` made of parts of `teacher`; the same shape gives the same model.

    Args:
        teacher: plain weights (adapters merged).
        shape: the student's; differs from the teacher's in sizes only, all of them at most the teacher's.
            `no_rope_layers` is ignored: blocks keep their kind.
        batches: rows to judge the parts by, on the teacher's device; none = by weights.
        depth: "spaced" or "importance" (needs batches).

    Raises:
        UserError: no part of the teacher can fill the shape.
    """
    _check(teacher.shape, shape)
    batches = list(batches)
    if depth not in ("spaced", "importance"):
        raise UserError(f"must be spaced or importance, not {depth!r}", where="distill.prune")
    if depth == "importance" and not batches:
        raise UserError("the blocks' importance is measured on rows of data", where="distill.prune")
    worth = activations(teacher, batches) if batches else weights(teacher)
    layers = _layers(teacher.shape.num_hidden_layers, shape.num_hidden_layers, worth, depth)
    without_rope = (new for new, old in enumerate(layers) if old in teacher.shape.no_rope_layers)
    student = Transformer(shape.with_(no_rope_layers=tuple(without_rope)))
    student = student.to(teacher.head_weight.device, teacher.head_weight.dtype)
    hidden = _best(worth.hidden, shape.hidden_size)
    with torch.no_grad():
        _copy(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight, None, hidden)
        _copy(student.model.norm.weight, teacher.model.norm.weight, hidden)
        if not shape.tie_word_embeddings:
            _copy(student.lm_head.weight, teacher.lm_head.weight, None, hidden)
        for new, old in enumerate(layers):
            heads, kv_heads = _heads(worth.heads[old], teacher.shape, shape)
            mine, theirs = student.model.layers[new], teacher.model.layers[old]
            assert isinstance(mine, Block) and isinstance(theirs, Block)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                _copy(getattr(mine, norm).weight, getattr(theirs, norm).weight, hidden)
            _copy_attention(mine.self_attn, theirs.self_attn, hidden, heads, kv_heads)
            _copy_mlp(mine.mlp, theirs.mlp, hidden, worth.neurons[old])
    return student.train(teacher.training)


def _check(teacher: ModelShape, student: ModelShape) -> None:
    for field in fields(ModelShape):
        name = field.name
        have, want = getattr(teacher, name), getattr(student, name)
        if name not in (*SIZES, "no_rope_layers") and have != want:
            raise UserError(
                f"a student is cut out of its teacher by sizes only, and the teacher has {have}",
                where=f"model.{name}",
            )
        if name in SIZES and not 0 <= want <= have:
            raise UserError(f"the teacher has only {have}, not {want}", where=f"model.{name}")
    each = teacher.num_attention_heads // teacher.num_key_value_heads
    if student.num_attention_heads % student.num_key_value_heads:
        raise UserError("must be a multiple of num_key_value_heads", where="model.num_attention_heads")
    if student.num_attention_heads // student.num_key_value_heads > each:
        raise UserError(
            f"a key-value head of the teacher serves only {each} heads",
            where="model.num_attention_heads",
            hint="keep more key-value heads or fewer heads",
        )


# -- what is kept -------------------------------------------------------------------------------------


def _best(worth: Tensor, count: int) -> Tensor:
    """The `count` largest of `worth` [n], as rising numbers int64 [count]."""
    return worth.topk(count).indices.sort().values


def _layers(have: int, want: int, worth: Importance, depth: str) -> list[int]:
    if depth == "importance":
        assert worth.blocks is not None
        return _best(worth.blocks, want).tolist()
    return [round(i * (have - 1) / max(want - 1, 1)) for i in range(want)]


def _heads(worth: Tensor, teacher: ModelShape, student: ModelShape) -> tuple[Tensor, Tensor]:
    """Kept heads and key-value heads: whole groups first, then the best heads in each."""
    groups = worth.view(teacher.num_key_value_heads, -1)
    kept = _best(groups.sum(dim=1), student.num_key_value_heads)
    each = student.num_attention_heads // student.num_key_value_heads
    heads = [_best(groups[g], each) + g * groups.shape[1] for g in kept.tolist()]
    return torch.cat(heads), kept


def activations(model: Transformer, batches: Iterable[Rows]) -> Importance:
    """Mean squares of activations over the tokens of `batches`, and the blocks' influence.

    Residual channels by what all norms give, heads by their output, MLP channels by what enters the
    down projection. Routed experts have no place to listen at; `weights` judges them.
    """
    worth, sums = weights(model), dict[Any, Tensor]()
    shape = model.shape
    layers = [b for b in model.model.layers if isinstance(b, Block)]

    def add(name: Any, value: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + value.double().sum(dim=0)

    def norm_hook(_: nn.Module, args: Any, output: Tensor) -> None:
        add("hidden", output.float().square())

    def block_hook(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            add(("block", number), 1 - torch.cosine_similarity(args[0].float(), output.float(), dim=-1))

        return hook

    def input_hook(name: tuple[str, int]) -> Callable[..., None]:
        return lambda _, args: add(name, args[0].float().square())

    hooks = [model.model.norm.register_forward_hook(norm_hook)]
    for number, block in enumerate(layers):
        hooks += [
            n.register_forward_hook(norm_hook)
            for n in (block.input_layernorm, block.post_attention_layernorm)
        ]
        hooks.append(block.register_forward_hook(block_hook(number)))
        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(input_hook(("heads", number))))
        if (mlp := _dense(block.mlp)) is not None:
            hooks.append(mlp.down_proj.register_forward_pre_hook(input_hook(("neurons", number))))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                layout = PackedLayout(batch.cu_seqlens, batch.tokens.device)
                model.ensure_context(layout.max_length)
                model(batch.tokens, batch.positions, layout)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    heads = torch.stack(
        [sums["heads", i].view(shape.num_attention_heads, -1).sum(dim=1) for i in range(len(layers))]
    )
    blocks = torch.stack([sums["block", i] for i in range(len(layers))])
    neurons = [sums.get(("neurons", i), worth.neurons[i]) for i in range(len(layers))]
    return Importance(blocks, sums["hidden"], heads, neurons)


@torch.no_grad()
def weights(model: Transformer) -> Importance:
    """Sums of squares of the weights that read or write each part; the blocks stay unjudged."""
    hidden = _squares(model.model.embed_tokens.weight, 1)
    if not model.shape.tie_word_embeddings:
        hidden = hidden + _squares(model.lm_head.weight, 1)
    heads, neurons = [], []
    for block in model.model.layers:
        assert isinstance(block, Block)
        attention = block.self_attn
        count = model.shape.num_attention_heads
        out = _squares(attention.o_proj.weight, 1).view(count, -1).sum(dim=1)
        value = _squares(attention.v_proj.weight, 0).view(model.shape.num_key_value_heads, -1).sum(dim=1)
        heads.append(out * value.repeat_interleave(count // len(value)))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            hidden = hidden + _squares(linear.weight, 1)
        hidden = hidden + _squares(attention.o_proj.weight, 0)
        mlp = _dense(block.mlp)
        neurons.append(None if mlp is None else _neurons(mlp))
        parts = (
            [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()] if mlp is not None else []
        )
        if isinstance(block.mlp, MoE):
            experts = block.mlp.experts
            parts += [experts.gate_proj, experts.up_proj, experts.down_proj.transpose(1, 2)]
        for part in parts:
            hidden = hidden + _squares(part, -1)
    return Importance(None, hidden, torch.stack(heads), neurons)


def _squares(weight: Tensor, dim: int) -> Tensor:
    """float64 sums of squares over all dimensions but `dim`."""
    others = [d for d in range(weight.dim()) if d != dim % weight.dim()]
    return weight.detach().double().square().sum(dim=others)


def _neurons(mlp: Any) -> Tensor:
    """Products of the squared lengths of what makes a channel and what it writes: [..., I]."""
    gate, up, down = (
        w.detach().double()
        for w in (getattr(p, "weight", p) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    )
    return gate.square().sum(dim=-1) * up.square().sum(dim=-1) * down.square().sum(dim=-2)


def _dense(mlp: nn.Module) -> MLP | None:
    """The MLP that every token passes: a dense block's, or the shared expert."""
    found = mlp.shared_expert if isinstance(mlp, MoE) else mlp
    return found if isinstance(found, MLP) else None


# -- copying ------------------------------------------------------------------------------------------


def _copy(mine: Tensor, theirs: Tensor, *kept: Tensor | None) -> None:
    """mine = theirs with the numbers `kept` of each dimension (None = all)."""
    for dim, index in enumerate(kept):
        if index is not None:
            theirs = theirs.index_select(dim, index.to(theirs.device))
    mine.copy_(theirs)


def _copy_attention(
    mine: Attention, theirs: Attention, hidden: Tensor, heads: Tensor, kv_heads: Tensor
) -> None:
    inside = torch.arange(theirs.head_dim, device=heads.device)
    rows, kv_rows = ((h[:, None] * theirs.head_dim + inside).flatten() for h in (heads, kv_heads))
    for name, kept in (("q_proj", rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
        to, source = getattr(mine, name), getattr(theirs, name)
        _copy(to.weight, source.weight, kept, hidden)
        if to.bias is not None:
            _copy(to.bias, source.bias, kept)
    _copy(mine.o_proj.weight, theirs.o_proj.weight, hidden, rows)
    for to, source in ((mine.q_norm, theirs.q_norm), (mine.k_norm, theirs.k_norm)):
        if to is not None and source is not None:
            _copy(to.weight, source.weight)


def _copy_mlp(mine: nn.Module, theirs: nn.Module, hidden: Tensor, neurons: Tensor | None) -> None:
    to, source = _dense(mine), _dense(theirs)
    if to is not None and source is not None and neurons is not None:
        kept = _best(neurons, to.gate_proj.out_features)
        _copy(to.gate_proj.weight, source.gate_proj.weight, kept, hidden)
        _copy(to.up_proj.weight, source.up_proj.weight, kept, hidden)
        _copy(to.down_proj.weight, source.down_proj.weight, hidden, kept)
    if not (isinstance(mine, MoE) and isinstance(theirs, MoE)):
        return
    _copy(mine.gate.weight, theirs.gate.weight, None, hidden)
    if mine.shared_expert_gate is not None and theirs.shared_expert_gate is not None:
        _copy(mine.shared_expert_gate.weight, theirs.shared_expert_gate.weight, None, hidden)
    for number, worth in enumerate(_neurons(theirs.experts)):
        kept = _best(worth, mine.experts.gate_proj.shape[1])
        _copy(mine.experts.gate_proj[number], theirs.experts.gate_proj[number], kept, hidden)
        _copy(mine.experts.up_proj[number], theirs.experts.up_proj[number], kept, hidden)
        _copy(mine.experts.down_proj[number], theirs.experts.down_proj[number], hidden, kept)
