"""Prepared models compute what the Transformer computes, whatever their layout; rounded ones nearly so."""

from __future__ import annotations

import pytest
import torch
from model_support import BASE, SHAPES, random_model
from torch import Tensor

from kllm.errors import UserError
from kllm.model import decode_probe, kernels
from kllm.model.decode import Prepared, ScratchCache, prepare
from kllm.model.decode_probe import choose
from kllm.model.kernels import INT4, INT8, RowInt8, candidates
from kllm.model.quantize import int4_groups, int8_rows
from kllm.model.transformer import Transformer

TOKENS = 40
WIDE = BASE.with_(hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=128)


def ids(shape=BASE, count: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(0, shape.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def hidden_of(model: Prepared, tokens: Tensor, cache: ScratchCache | None = None) -> Tensor:
    return model(tokens, torch.arange(len(tokens)), cache or ScratchCache())


@torch.no_grad()
def expected(model: Transformer, tokens: Tensor) -> Tensor:
    return model(tokens, torch.arange(len(tokens)))


def off(ours: Tensor, theirs: Tensor) -> float:
    """Error relative to the size of what is right."""
    return float(((ours.float() - theirs.float()).norm() / theirs.float().norm()).detach())


class Growing:
    """One sequence, token by token: keys and values of all steps so far."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.stored:
            keys, values = self.stored[layer]
            k, v = torch.cat((keys, k)), torch.cat((values, v))
        self.stored[layer] = (k, v)
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=len(q) > 1,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_computes_the_transformer(name: str) -> None:
    shape = SHAPES[name]
    model = random_model(shape)
    tokens = ids(shape)
    prepared = prepare(model)
    ours, theirs = hidden_of(prepared, tokens), expected(model, tokens)
    assert off(ours, theirs) < 1e-5
    assert off(prepared.logits(ours), model.logits(theirs)) < 1e-5
    assert prepared.logits(ours).dtype == torch.float32


@pytest.mark.parametrize("kernel", candidates("fp32", torch.float32))
@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "qwen2-moe-gated"])
def test_every_float_layout_computes_the_transformer(name: str, kernel: str) -> None:
    model = random_model(SHAPES[name])
    tokens = ids(SHAPES[name])
    prepared = prepare(model, kernel=kernel)
    theirs = expected(model, tokens)
    assert kernel in prepared.kernel_line()
    assert off(hidden_of(prepared, tokens), theirs) < 1e-5
    cache = Growing()
    for i in range(6):  # one row at a time takes other paths through kernels and experts
        row = prepared(tokens[i : i + 1], torch.tensor([i]), cache)
        assert off(row, theirs[i : i + 1]) < 1e-5


@pytest.mark.parametrize("make", kernels.FLOAT.values(), ids=kernels.FLOAT)
@pytest.mark.parametrize("outputs", [1, 37, 48])
def test_float_kernels_take_any_number_of_rows_and_outputs(make: kernels.Make, outputs: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(*size, generator=generator) for size in ((outputs, 24), (outputs,)))
    for kernel, added in ((make(weight, bias), bias), (make(weight, None), None)):
        for rows in (0, 1, 2, 5):
            x = torch.randn(rows, 24, generator=generator)
            got = kernel(x)
            torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, added))
            got.add_(1)  # callers add in place: what a kernel gives is theirs
            torch.testing.assert_close(kernel(x), torch.nn.functional.linear(x, weight, added))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "qwen3-yarn"])
def test_sixteen_bit_models_stay_as_near_as_the_transformer(name: str, dtype: torch.dtype) -> None:
    exact = expected(random_model(SHAPES[name]), ids())
    model = random_model(SHAPES[name]).to(dtype)
    prepared = prepare(model)
    assert prepared.dtype == dtype
    ours, theirs = off(hidden_of(prepared, ids()), exact), off(expected(model, ids()), exact)
    assert ours < 1.3 * theirs + 1e-3


def test_float_formats_convert() -> None:
    model = random_model(BASE)
    theirs = expected(model, ids())
    assert off(hidden_of(prepare(model.to(torch.bfloat16), weights="fp32"), ids()), theirs) < 0.02
    half = prepare(random_model(BASE), weights="bf16")
    assert half.dtype == torch.bfloat16 and half.weights == "bf16"
    assert off(hidden_of(half, ids()), theirs) < 0.02


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.03), ("int4", 0.35)])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "llama-untied", "qwen3", "qwen2-moe-shared"])
def test_rounded_weights_stay_near(name: str, weights: str, most: float) -> None:
    # experts: one slip of a router moves a token elsewhere, which is no error of the kernels
    shape = SHAPES[name]
    model = random_model(shape)
    tokens = ids(shape)
    prepared = prepare(model, weights=weights)
    assert prepared.dtype == torch.float32
    error = (hidden_of(prepared, tokens) - expected(model, tokens)).norm(dim=-1)
    assert float((error / expected(model, tokens).norm(dim=-1)).median()) < most


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_answer_of_a_row_does_not_depend_on_its_neighbours(weights: str) -> None:
    model = random_model(WIDE)
    prepared = prepare(model, weights=weights)
    x = torch.randn(32, WIDE.hidden_size, generator=torch.Generator().manual_seed(3))
    x[7] *= 1000  # per-tensor activation scales would wipe out all others
    alone = torch.cat([prepared.logits(row[None]) for row in x])
    assert torch.equal(prepared.logits(x), alone)


def test_a_row_of_zeros_or_nan_stays_in_its_row() -> None:
    kernel = RowInt8(torch.randn(64, 64), None)
    x = torch.randn(3, 64)
    clean = kernel(x)
    x[0], x[2] = 0.0, float("nan")
    y = kernel(x)
    assert torch.equal(y[0], torch.zeros(64)) and torch.equal(y[1], clean[1])
    assert y[2].isnan().all()


@pytest.mark.parametrize("options", [INT8, INT4], ids=["int8", "int4"])
def test_low_bit_kernels_agree(options: dict) -> None:
    weight, bias = torch.randn(128, 192), torch.randn(128)
    x = torch.randn(5, 192)
    *fast, last = options.values()
    reference = last(weight, bias)(x)
    ran = 0
    for make in fast:
        try:
            y = make(weight, bias)(x)
        except (RuntimeError, NotImplementedError):
            continue  # not on this machine
        ran += 1
        assert off(y, reference) < 0.03
    assert off(reference, x @ weight.t() + bias) < (0.01 if options is INT8 else 0.1)
    assert ran or not torch.backends.quantized.supported_engines


def test_int8_rounds_to_half_a_step_and_int4_too() -> None:
    weight = torch.randn(6, 50)
    q, scale = int8_rows(weight)
    assert ((q.float() * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert int(q.abs().max()) == 127
    groups = int4_groups(weight, group=16)  # 50 = 3 * 16 + 2: the last group is short
    steps = groups.scale.repeat_interleave(16, dim=1)[:, :50]
    assert ((groups.dequantize() - weight).abs() <= steps * 0.5001).all()
    assert torch.equal(int8_rows(torch.zeros(2, 4)).q, torch.zeros(2, 4, dtype=torch.int8))


def test_int8_products_never_saturate() -> None:
    # two products of an unsigned and a signed byte are added in 16 bits on CPUs without VNNI
    assert torch.allclose(RowInt8(torch.ones(32, 64), None)(torch.ones(2, 64)), torch.full((2, 32), 64.0))


def test_int8_activations_with_outliers_cost_nothing() -> None:
    weight, x = torch.randn(64, 256), torch.randn(9, 256)
    x[:, 5] *= 100  # one channel far above the rest, as trained models have
    q, scale = int8_rows(weight)
    assert off(RowInt8(weight, None)(x), x @ (q * scale[:, None]).t()) < 2e-3


def test_own_empties_the_model_and_reload_takes_new_weights() -> None:
    shape = SHAPES["qwen2-moe-gated"].with_(tie_word_embeddings=False)
    first, second, third = (random_model(shape, seed=seed) for seed in (0, 1, 2))
    kept, renewed, last = expected(first, ids()), expected(second, ids()), expected(third, ids())
    prepared = prepare(first, own=True)
    assert sum(p.numel() for p in first.parameters()) < 0.2 * sum(p.numel() for p in second.parameters())
    assert off(hidden_of(prepared, ids()), kept) < 1e-5
    prepared.reload(second)
    assert off(hidden_of(prepared, ids()), renewed) < 1e-5
    assert second.num_parameters() == third.num_parameters()
    prepared.reload(third, own=True)
    assert off(hidden_of(prepared, ids()), last) < 1e-5
    with pytest.raises(ValueError, match="same shape"):
        prepared.reload(random_model(BASE))


def test_own_keeps_a_tied_embedding() -> None:
    model = random_model(BASE)
    theirs = model.logits(expected(model, ids())).detach()
    prepared = prepare(model, own=True)
    assert off(prepared.logits(hidden_of(prepared, ids())), theirs) < 1e-5


def test_context_grows_beyond_the_table() -> None:
    shape = BASE.with_(max_position_embeddings=16)
    model = random_model(shape)
    prepared = prepare(model)
    for each in (model, prepared):
        each.ensure_context(TOKENS)
    assert off(hidden_of(prepared, ids()), expected(model, ids())) < 1e-5


def test_unknown_formats_and_kernels_are_named() -> None:
    model = random_model(BASE)
    with pytest.raises(UserError, match="int7"):
        prepare(model, weights="int7")
    with pytest.raises(ValueError, match="plain"):
        prepare(model, kernel="magic")


# -- the race ----------------------------------------------------------------------------------------


@pytest.fixture
def clean_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_probe, "_choices", {})
    monkeypatch.setattr(decode_probe, "_SMALL", 0)


class Slow(kernels.Plain):
    def __call__(self, x: Tensor) -> Tensor:
        for _ in range(50):
            super().__call__(x)
        return super().__call__(x)


class Wrong(kernels.Plain):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).flip(-1)


def lacking(weight: Tensor, bias: Tensor | None) -> kernels.Kernel:
    raise RuntimeError("no such kernel in this build")


@pytest.mark.usefixtures("clean_choices")
def test_the_race_takes_the_fast_and_right_one() -> None:
    before = torch.random.get_rng_state()
    matrices = [torch.randn(64, 64) for _ in range(3)]
    torch.random.set_rng_state(before)
    options = {"slow": Slow, "missing": lacking, "wrong": Wrong, "good": kernels.Plain}
    choice = choose(options, matrices, torch.float32)
    assert choice.name == "good"
    assert torch.equal(before, torch.random.get_rng_state()), (
        "a race must not move the caller's random numbers"
    )
    assert all(0 < s < 1 for s in (*choice.seconds, *choice.plain))
    assert "int8: good (1 row " in choice.line("int8") and "fp32 as loaded" in choice.line("int8")
    assert choose(options, matrices, torch.float32) is choice
    assert choose(options, matrices, torch.float32, pinned="slow").name == "slow"
    with pytest.raises(RuntimeError, match="no kernel of missing runs"):
        choose({"missing": lacking}, matrices, torch.float32)


@pytest.mark.parametrize(
    ("mine", "its", "better"),
    [
        ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), False),
        ((0.8, 2.0, 3.0), (1.0, 2.0, 3.0), True),  # one stream alone may decide
        ((0.96, 1.96, 2.96), (1.0, 2.0, 3.0), False),  # a close call
        ((0.9, 2.4, 3.0), (1.0, 2.0, 3.0), False),  # lost elsewhere as much as it won
        ((0.5, 2.4, 3.0), (1.0, 2.0, 3.0), True),  # lost less than it won
    ],
)
def test_what_counts_as_clearly_faster(mine: tuple, its: tuple, better: bool) -> None:
    entries = []
    for seconds in (mine, its):
        entry = object.__new__(decode_probe._Entry)
        entry.seconds = list(seconds)
        entries.append(entry)
    assert entries[0].beats(entries[1]) is better


@pytest.mark.usefixtures("clean_choices")
def test_no_race_under_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    options = {"missing": lacking, "slow": Slow, "good": kernels.Plain}
    choice = choose(options, [torch.randn(8, 8)], torch.float32)
    assert choice.name == "slow" and "not raced" in choice.line("fp32")


@pytest.mark.usefixtures("clean_choices")
def test_a_matrix_that_the_kernel_does_not_take_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(weight: Tensor, bias: Tensor | None) -> kernels.Kernel:
        if weight.shape[0] % 64:
            raise RuntimeError("multiples of 64 only")
        return kernels.Plain(weight, bias)

    monkeypatch.setitem(kernels.FLOAT, "picky", picky)
    shape = WIDE.with_(vocab_size=97)
    model = random_model(shape)
    prepared = prepare(model, kernel="picky")
    tokens = ids(shape)
    ours = hidden_of(prepared, tokens)
    assert off(prepared.logits(ours), model.logits(expected(model, tokens))) < 1e-5
