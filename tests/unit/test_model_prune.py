"""Students cut out of teachers: what is kept, what is dropped, and how good a start it is."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from model_support import BASE, MOE, SHAPES, random_model
from torch import Tensor

from kllm.data.batch import IGNORE, Batch
from kllm.errors import UserError
from kllm.model.attention import PackedLayout
from kllm.model.presets import ModelShape, count_parameters
from kllm.model.prune import activations, student_from, weights
from kllm.model.transformer import Transformer
from kllm.objectives.lm import LanguageModeling

DEEP = BASE.with_(num_hidden_layers=4, tie_word_embeddings=False)


def make_batch(tokens: Tensor) -> Batch:
    """Documents [n, length], each token's label the next one."""
    labels = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)), dim=1)
    n, length = tokens.shape
    borders = torch.arange(n + 1, dtype=torch.int32) * length
    return Batch(tokens.flatten(), labels.flatten(), torch.arange(length).repeat(n), borders)


def some_rows(seed: int = 0, vocab: int = BASE.vocab_size) -> Batch:
    return make_batch(torch.randint(0, vocab, (3, 17), generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def run(model: Transformer, batch: Batch) -> Tensor:
    return model.logits(model(batch.tokens, batch.positions, PackedLayout(batch.cu_seqlens)))


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_shape_is_the_same_model(name: str, measured: bool) -> None:
    teacher = random_model(SHAPES[name])
    student = student_from(teacher, teacher.shape, [some_rows()] if measured else [])
    assert student.shape == teacher.shape
    want, got = teacher.state_dict(), student.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    assert all(
        a.data_ptr() != b.data_ptr() for a, b in zip(student.parameters(), teacher.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_every_size_can_shrink(name: str) -> None:
    teacher = random_model(SHAPES[name])
    shape = teacher.shape.with_(
        num_hidden_layers=1,
        hidden_size=48,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    if shape.is_moe:
        shape = shape.with_(moe_intermediate_size=20)
    student = student_from(teacher, shape, [some_rows()])
    assert student.num_parameters() == count_parameters(shape) < teacher.num_parameters()
    assert torch.isfinite(run(student, some_rows())).all()
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == shape.tie_word_embeddings


def test_spaced_layers_keep_both_ends() -> None:
    shape = BASE.with_(num_hidden_layers=9, no_rope_layers=(3, 7))
    teacher = random_model(shape)
    for count, kept in (
        (1, [0]),
        (2, [0, 8]),
        (4, [0, 3, 5, 8]),
        (5, [0, 2, 4, 6, 8]),
        (8, [0, 1, 2, 3, 5, 6, 7, 8]),
    ):
        student = student_from(teacher, shape.with_(num_hidden_layers=count))
        for new, old in enumerate(kept):
            mine, theirs = (m.model.layers[i] for m, i in ((student, new), (teacher, old)))
            assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
            assert mine.self_attn.rope == theirs.self_attn.rope
        assert student.shape.no_rope_layers == tuple(i for i, old in enumerate(kept) if old in (3, 7))


def test_blocks_that_do_nothing_go_first() -> None:
    teacher = random_model(DEEP)
    with torch.no_grad():
        for dead in (0, 2):
            teacher.model.layers[dead].self_attn.o_proj.weight.zero_()
            teacher.model.layers[dead].mlp.down_proj.weight.zero_()
    assert (activations(teacher, [some_rows()]).blocks < 1e-5).nonzero().flatten().tolist() == [0, 2]
    shape = DEEP.with_(num_hidden_layers=2)
    student = student_from(teacher, shape, [some_rows()], depth="importance")
    assert torch.allclose(run(student, some_rows(1)), run(teacher, some_rows(1)), atol=1e-5)
    spaced = student_from(teacher, shape, [some_rows()])
    assert not torch.allclose(run(spaced, some_rows(1)), run(teacher, some_rows(1)), atol=1e-2)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dead_heads_and_neurons_go_first(measured: bool, bias: bool) -> None:
    """A key-value group, one head of each group left, and a third of the neurons write nothing."""
    shape = DEEP.with_(num_attention_heads=6, num_key_value_heads=3, attention_bias=bias)
    teacher = random_model(shape)
    with torch.no_grad():
        for number, block in enumerate(teacher.model.layers):
            group = number % 3
            block.self_attn.v_proj.weight.view(3, 16, -1)[group] = 0
            if bias:
                block.self_attn.v_proj.bias.view(3, 16)[group] = 0
            for head in range(number % 2, 6, 2):
                block.self_attn.o_proj.weight.view(-1, 6, 16)[:, head] = 0
            block.mlp.up_proj.weight[group::3] = 0
    smaller = shape.with_(num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    student = student_from(teacher, smaller, [some_rows()] if measured else [])
    assert torch.allclose(run(student, some_rows(1)), run(teacher, some_rows(1)), atol=1e-5)
    if not measured:  # by weights a head that writes nothing is seen too
        single = shape.with_(num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
        student = student_from(teacher, single)
        assert torch.allclose(run(student, some_rows(1)), run(teacher, some_rows(1)), atol=1e-5)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("extra", [{}, {**MOE, "num_shared_experts": 1}, {"tie_word_embeddings": True}])
def test_empty_channels_go_first(extra: dict[str, object], measured: bool) -> None:
    """Channels of the residual stream that carry nothing: without them only the norms' mean changes."""
    teacher = random_model(DEEP.with_(**extra))
    dead = torch.arange(1, 64, 4)
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) and p.dim() == 2:
                p[dead] = 0
            elif name.endswith("down_proj"):
                p[:, dead] = 0
            elif p.dim() >= 2:
                p[..., dead] = 0
    student = student_from(teacher, teacher.shape.with_(hidden_size=48), [some_rows()] if measured else [])
    with torch.no_grad():  # rms over 48 live channels instead of 64 with 16 zeros
        for name, p in student.named_parameters():
            if name.endswith(("layernorm.weight", "model.norm.weight")):
                p *= math.sqrt(64 / 48)
    assert torch.allclose(run(student, some_rows(1)), run(teacher, some_rows(1)), atol=1e-3)


def test_experts_lose_their_idle_neurons() -> None:
    teacher = random_model(DEEP.with_(**MOE, qk_norm=True))
    with torch.no_grad():
        for block in teacher.model.layers:
            for expert in range(4):
                block.mlp.experts.down_proj[expert, :, expert::4] = 0
    student = student_from(teacher, teacher.shape.with_(moe_intermediate_size=36))
    assert torch.allclose(run(student, some_rows(1)), run(teacher, some_rows(1)), atol=1e-5)


def test_measuring_leaves_the_teacher_alone() -> None:
    teacher = random_model(DEEP).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    worth = activations(teacher, [some_rows(), some_rows(1)])
    assert teacher.training and all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert worth.blocks.shape == (4,) and worth.heads.shape == (4, 4) and worth.hidden.shape == (64,)
    assert [n.shape for n in worth.neurons] == [(96,)] * 4
    assert weights(teacher).blocks is None


@functools.cache
def trained() -> tuple[Transformer, tuple[Batch, ...]]:
    """A tiny model that knows which token follows which, and rows to judge by."""
    shape = ModelShape(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=1e4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(64, generator=generator)
    batches = []
    for _ in range(60):
        rows = [torch.randint(0, 64, (16,), generator=generator)]
        for _ in range(15):
            other = torch.randint(0, 64, (16,), generator=generator)
            rows.append(torch.where(torch.rand(16, generator=generator) < 0.9, follows[rows[-1]], other))
        batches.append(make_batch(torch.stack(rows, dim=1)))
    model, objective = Transformer(shape), LanguageModeling()
    model.init_weights(0)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step, batch in enumerate(
        batches[:56], 1
    ):  # Adam by hand: torch.optim's first step imports for seconds
        model.zero_grad()
        (objective(model, batch).total / objective.weight(batch)).backward()
        with torch.no_grad():
            for p, (m, v) in zip(model.parameters(), moments, strict=True):
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad.square(), 0.05)
                p -= 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    model.zero_grad()
    return model.eval(), tuple(batches[56:])


def loss_of(model: Transformer) -> float:
    objective, batches = LanguageModeling(), trained()[1][:2]
    with torch.no_grad():
        total = sum(float(objective(model, b).total) for b in batches)
    return total / sum(objective.weight(b) for b in batches)


@pytest.mark.parametrize("depth", ["spaced", "importance"])
def test_three_quarters_of_the_depth_still_knows(depth: str) -> None:
    teacher, batches = trained()
    assert loss_of(teacher) < 0.4 * math.log(64)
    student = student_from(teacher, teacher.shape.with_(num_hidden_layers=3), batches[2:], depth)
    assert loss_of(student) < 0.7 * math.log(64)


def test_three_quarters_of_the_width_still_know() -> None:
    teacher, batches = trained()
    for change in (
        {"hidden_size": 24},
        {"intermediate_size": 48},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
    ):
        student = student_from(teacher, replace(teacher.shape, **change), batches[2:])
        assert loss_of(student) < 0.8 * math.log(64), change


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"vocab_size": 96}, "model.vocab_size"),
        ({"head_dim": 8}, "model.head_dim"),
        ({"hidden_size": 65}, "model.hidden_size"),
        ({"num_hidden_layers": 5}, "model.num_hidden_layers"),
        ({"num_key_value_heads": 1}, "model.num_attention_heads"),
        ({"num_attention_heads": 3}, "model.num_attention_heads"),
        ({"tie_word_embeddings": True}, "model.tie_word_embeddings"),
    ],
)
def test_what_no_teacher_can_fill_is_refused(change: dict[str, object], where: str) -> None:
    with pytest.raises(UserError) as e:
        student_from(random_model(DEEP), DEEP.with_(**change))
    assert e.value.where == where


def test_importance_needs_rows() -> None:
    with pytest.raises(UserError, match="rows of data"):
        student_from(random_model(DEEP), DEEP, depth="importance")
    with pytest.raises(UserError, match="spaced or importance"):
        student_from(random_model(DEEP), DEEP, depth="even")
