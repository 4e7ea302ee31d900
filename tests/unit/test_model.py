"""Presets' exact sizes and the model's own promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kllm.data.batch import IGNORE
from kllm.model.attention import PackedLayout, packed_attention
from kllm.model.head import linear_cross_entropy, token_losses
from kllm.model.moe import MoE, RouterLog, expert_load, load_balance_loss
from kllm.model.presets import (
    PRESETS,
    ModelShape,
    active_parameters,
    count_parameters,
    flops_per_token,
    get_preset,
    hf_model_type,
)
from kllm.model.transformer import Transformer

TINY = PRESETS["k-tiny"].with_(vocab_size=101, hidden_size=32, intermediate_size=48, head_dim=8)
MOE = TINY.with_(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, num_hidden_layers=2)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("k-small", 25_829_888),
        ("k-base", 104_030_976),
        ("k-moe", 145_029_760),
        ("k3-dense", 63_912_192),
        ("k3-moe", 198_416_640),
        ("minimind2-small", 25_829_888),
        ("minimind2", 104_030_976),
        ("minimind2-moe", 145_029_760),
        ("minimind3", 63_912_192),
        ("minimind3-moe", 198_416_640),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    assert count_parameters(PRESETS[name]) == parameters


def test_sizes_without_a_published_count() -> None:
    assert 2_900_000 < count_parameters(PRESETS["k-tiny"]) < 3_500_000
    assert abs(count_parameters(PRESETS["mini-171m"]) / 171_303_936 - 1) < 0.01


@pytest.mark.parametrize("name", PRESETS)
def test_the_module_has_what_the_formula_counts(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert model.num_parameters() == count_parameters(PRESETS[name])
    hf_model_type(PRESETS[name])  # every preset has an exact target


def test_active_parameters_and_flops() -> None:
    shape = PRESETS["k3-moe"]
    assert active_parameters(shape) == 63_912_192 + 8 * 4 * 768  # the dense twin and the routers
    dense = PRESETS["k3-dense"]
    assert flops_per_token(dense) == pytest.approx(6 * count_parameters(dense), rel=1e-3)
    assert flops_per_token(dense, training=False) * 3 == flops_per_token(dense)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(Exception, match="did you mean k-small"):
        get_preset("k-smal")


def borders_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 30, 2, 2, 17, 48, 9, 200], [1, 1, 3]])
def test_attention_of_documents_is_attention_of_each(lengths: list[int]) -> None:
    total, generator = sum(lengths), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, h, 8, generator=generator, requires_grad=True) for h in (4, 2, 2))
    out = packed_attention(q, k, v, PackedLayout(borders_of(lengths)))
    probe = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad((out * probe).sum(), (q, k, v))
    start = 0
    for n in lengths:
        piece = slice(start, start + n)
        heads = [t[piece].transpose(0, 1) for t in (q, k, v)]
        alone = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        alone = alone.transpose(0, 1).flatten(1)
        assert torch.allclose(out[piece], alone, atol=1e-5)
        expected = torch.autograd.grad((alone * probe[piece]).sum(), (q, k, v), retain_graph=True)
        for got, want in zip(grads, expected, strict=True):
            assert torch.allclose(got[piece], want[piece], atol=1e-5)
        start += n


@pytest.mark.parametrize("shape", [TINY, MOE], ids=["dense", "moe"])
def test_packed_losses_equal_documents_alone(shape: ModelShape) -> None:
    model = Transformer(shape).eval()
    model.init_weights(3)
    lengths = [3, 40, 11, 11, 64, 1]
    borders = borders_of(lengths)
    tokens = torch.randint(0, 101, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1)
    labels[borders[1:] - 1] = IGNORE
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        hidden = model(tokens, positions, PackedLayout(borders))
        packed = token_losses(hidden, model.head_weight, labels)
        for a, b in zip(borders[:-1], borders[1:], strict=True):
            alone = model(tokens[a:b], torch.arange(int(b - a)))
            losses = token_losses(alone, model.head_weight, labels[a:b])
            assert (losses - packed[a:b]).abs().max() < 1e-5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_chunked_loss_and_gradients_equal_autograd(weighted: bool, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (20,), generator=generator)
    labels[::4] = IGNORE
    weights = torch.rand(20, generator=generator) if weighted else None
    h32, w32 = hidden.float().detach().requires_grad_(), head.float().detach().requires_grad_()
    ours = linear_cross_entropy(h32, w32, labels, weights, chunk)
    (ours * 0.5).backward()
    each = F.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORE, reduction="none")
    reference = (each if weights is None else each * weights).sum()
    (reference * 0.5).backward()
    assert float(ours.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    assert torch.allclose(h32.grad.double(), hidden.grad, atol=1e-5)
    assert torch.allclose(w32.grad.double(), head.grad, atol=1e-5)


def test_loss_never_holds_all_logits() -> None:
    """Peak of tensors alive in the forward stays near one chunk: 64 x 5000, not 2048 x 5000."""
    sizes: list[int] = []
    original = torch.Tensor.float

    def spy(self: torch.Tensor) -> torch.Tensor:
        sizes.append(self.numel())
        return original(self)

    torch.Tensor.float = spy  # type: ignore[method-assign]
    try:
        hidden, head = torch.randn(2048, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
        linear_cross_entropy(hidden, head, torch.randint(0, 5000, (2048,)), chunk=64).backward()
    finally:
        torch.Tensor.float = original  # type: ignore[method-assign]
    assert max(sizes) == 64 * 5000


@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_equal_a_plain_loop(k: int) -> None:
    shape = MOE.with_(num_experts_per_tok=k, num_shared_experts=1, norm_topk_prob=k > 1)
    moe = MoE(shape)
    torch.manual_seed(0)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(30, 32)
    out = moe(x)
    weights, chosen = moe.route(x, None)
    expected = moe.shared_expert(x)
    for t in range(30):
        for w, e in zip(weights[t], chosen[t], strict=True):
            gate, up = moe.experts.gate_proj[e] @ x[t], moe.experts.up_proj[e] @ x[t]
            expected[t] = expected[t] + w * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_top1_routing_trains_its_router(norm: bool) -> None:
    """Normalised top-1 weights are identically 1; their gradient must not be identically 0."""
    moe = MoE(MOE.with_(num_experts_per_tok=1, norm_topk_prob=norm))
    torch.manual_seed(0)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    out = moe(torch.randn(30, 32))
    out.square().sum().backward()
    assert moe.gate.weight.grad.abs().max() > 1e-3
    if norm:
        weights, _ = moe.route(torch.randn(30, 32), None)
        assert torch.equal(weights, torch.ones_like(weights))


@pytest.mark.parametrize(("kind", "even"), [("switch", 1.0), ("sequence", 1.0), ("kl_uniform", 0.0)])
def test_balance_losses_have_their_minimum_at_even_load(kind: str, even: float) -> None:
    shape = MOE.with_(aux_loss_type=kind, num_experts_per_tok=1)
    layout = PackedLayout(torch.tensor([0, 4, 8]))
    chosen = torch.arange(8).remainder(4)[:, None]
    flat = RouterLog([torch.full((8, 4), 0.25)], [chosen], [torch.zeros(8, 4)])
    assert float(load_balance_loss(flat, shape, layout)) == pytest.approx(even, abs=1e-5)
    skewed = RouterLog([torch.tensor([[0.7, 0.1, 0.1, 0.1]]).repeat(8, 1)], [chosen * 0], [torch.zeros(8, 4)])
    assert float(load_balance_loss(skewed, shape, layout)) > even + 0.1
    assert expert_load(skewed, 4).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_initial_weights_depend_on_the_seed_alone() -> None:
    a, b, c = Transformer(TINY), Transformer(TINY), Transformer(TINY)
    a.init_weights(1)
    torch.manual_seed(99)
    b.init_weights(1)
    c.init_weights(2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head_weight, c.head_weight)
    scaled = a.model.layers[0].mlp.down_proj.weight.std() / a.model.layers[0].mlp.up_proj.weight.std()
    assert float(scaled) == pytest.approx((2 * TINY.num_hidden_layers) ** -0.5, rel=0.1)


def test_activation_checkpointing_changes_nothing() -> None:
    model = Transformer(TINY)
    model.init_weights(0)
    tokens, positions = torch.arange(40), torch.arange(40)
    grads = []
    for on in (False, True):
        model.activation_checkpointing = on
        model.zero_grad()
        linear_cross_entropy(model(tokens, positions), model.head_weight, tokens.roll(-1)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
