"""Shared beginnings: one prompt, several answers, the same numbers as each sequence alone."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kllm.model.attention import PackedLayout, _varlen, packed_attention
from kllm.model.head import linear_cross_entropy
from kllm.model.moe import RouterLog
from kllm.model.presets import PRESETS, ModelShape
from kllm.model.transformer import Transformer

TINY = PRESETS["k-tiny"].with_(
    vocab_size=101, hidden_size=32, intermediate_size=48, head_dim=8, num_hidden_layers=2
)
MOE = TINY.with_(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# (lengths, parents): pairs, an ordinary document between them, one prompt of four answers, lengths of one
ROWS = [
    ([9, 5, 7], [-1, 0, 0]),
    ([4, 30, 2, 17, 48, 9, 1, 1, 200, 3], [-1, 0, 0, -1, -1, 4, 4, -1, 7, 7]),
    ([12, 1, 2, 3, 4], [-1, 0, 0, 0, 0]),
    ([6, 6], [-1, 0]),
]


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def sequences_of(lengths: list[int], parents: list[int]) -> list[tuple[Tensor, int]]:
    """For each segment: rows of its whole sequence, and how many of them are the shared beginning."""
    borders = borders_of(lengths).tolist()
    own = [torch.arange(a, b) for a, b in zip(borders[:-1], borders[1:], strict=True)]
    return [
        (torch.cat([own[p], rows]), len(own[p])) if p >= 0 else (rows, 0)
        for rows, p in zip(own, parents, strict=True)
    ]


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [t.transpose(0, 1) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("lengths", "parents"), ROWS)
def test_values_and_gradients_equal_separate_sequences(
    lengths: list[int], parents: list[int], kv_heads: int
) -> None:
    total, generator = sum(lengths), torch.Generator().manual_seed(0)
    shapes = [(total, h, 8) for h in (4, kv_heads, kv_heads)]
    q, k, v = (torch.randn(s, generator=generator, requires_grad=True) for s in shapes)
    layout = PackedLayout(borders_of(lengths), parents=torch.tensor(parents, dtype=torch.int32))
    out = packed_attention(q, k, v, layout)
    expected = torch.empty_like(out)
    for rows, before in sequences_of(lengths, parents):
        expected[rows[before:]] = alone(q[rows], k[rows], v[rows])[before:]
    assert (out - expected).abs().max() < 1e-5
    probe = torch.randn(out.shape, generator=generator)
    got = torch.autograd.grad((out * probe).sum(), (q, k, v))
    want = torch.autograd.grad((expected * probe).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [TINY, MOE], ids=["dense", "moe"])
def test_a_model_with_shared_beginnings_is_the_model_on_each_sequence(
    shape: ModelShape, checkpointing: bool
) -> None:
    """Losses on the answers only: their gradient reaches the prompt once for every answer."""
    lengths, parents = ROWS[1]
    model = Transformer(shape)
    model.init_weights(3)
    tokens = torch.randint(0, 101, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    sequences = sequences_of(lengths, parents)
    answers = [(rows, before) for rows, before in sequences if before or len(rows) == 17]
    positions = torch.cat([torch.arange(before, len(rows)) for rows, before in sequences])

    labels = torch.full_like(tokens, -100)
    apart = torch.zeros(())
    for rows, before in answers:
        own = rows[before:]
        labels[own] = (own * 7) % 101
        hidden = model(tokens[rows], torch.arange(len(rows)))[before:]
        apart = apart + linear_cross_entropy(hidden, model.head_weight, labels[own])
    want = torch.autograd.grad(apart, list(model.parameters()))

    model.activation_checkpointing = checkpointing
    layout = PackedLayout(borders_of(lengths), parents=torch.tensor(parents))
    log = RouterLog() if shape.is_moe else None
    together = linear_cross_entropy(model(tokens, positions, layout, log), model.head_weight, labels)
    got = torch.autograd.grad(together, list(model.parameters()))
    assert float(together.detach()) == pytest.approx(float(apart.detach()), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))
    if log is not None:
        assert all(p.shape[0] == len(tokens) for p in log.probabilities)


def test_a_shared_beginning_stands_once_in_the_row_and_sees_no_answer() -> None:
    lengths, parents = [9, 5, 7], torch.tensor([-1, 0, 0])
    q, k, v = (torch.randn(21, 2, 8) for _ in range(3))
    layout = PackedLayout(borders_of(lengths), parents=parents)
    before = packed_attention(q, k, v, layout)
    k[9:14] += 1.0  # the first answer's keys
    after = packed_attention(q, k, v, layout)
    changed = (before != after).any(dim=1)
    assert not changed[:9].any() and not changed[14:].any() and changed[9:14].all()


def test_parents_that_are_all_absent_change_nothing() -> None:
    lengths = [5, 9, 9, 2]
    q, k, v = (torch.randn(25, 2, 8) for _ in range(3))
    plain = PackedLayout(borders_of(lengths))
    same = PackedLayout(borders_of(lengths), parents=torch.full((4,), -1))
    assert not same.shared
    assert torch.equal(packed_attention(q, k, v, plain), packed_attention(q, k, v, same))


def test_a_beginning_of_a_beginning_is_refused() -> None:
    with pytest.raises(ValueError, match="has a beginning itself"):
        PackedLayout(borders_of([3, 3, 3]), parents=torch.tensor([-1, 0, 1]))


@pytest.mark.parametrize(("lengths", "parents"), ROWS)
def test_the_cuda_path_hands_the_kernel_the_same_keys(
    lengths: list[int], parents: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The varlen kernel needs a GPU; here a slow one with its contract stands in (window at the end)."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        assert window_size == (-1, 0) and enable_gqa
        assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
        pieces = []
        for i in range(len(cu_q) - 1):
            own = slice(int(cu_q[i]), int(cu_q[i + 1]))
            keys = slice(int(cu_k[i]), int(cu_k[i + 1]))
            rows, cols = own.stop - own.start, keys.stop - keys.start
            mask = torch.ones(rows, cols, dtype=torch.bool).tril(cols - rows)
            heads = [t.transpose(0, 1) for t in (q[own], k[keys], v[keys])]
            pieces.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True))
        return torch.cat(pieces, dim=1).transpose(0, 1)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    total, generator = sum(lengths), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, h, 8, generator=generator, requires_grad=True) for h in (4, 2, 2))
    layout = PackedLayout(borders_of(lengths), parents=torch.tensor(parents))
    probe = torch.randn(total, 32, generator=generator)
    ours, theirs = packed_attention(q, k, v, layout), _varlen(q, k, v, layout)
    assert (ours - theirs).abs().max() < 1e-5
    got = torch.autograd.grad((theirs * probe).sum(), (q, k, v))
    want = torch.autograd.grad((ours * probe).sum(), (q, k, v))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, want, strict=True))
