"""Adapters per request: in any company each answers as the model that it was merged into."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_support import tiny_model
from model_support import SHAPES, random_model

from kllm.engine import Completion, Engine, SamplingParams
from kllm.errors import UserError
from kllm.export.adapter import merge_adapter, write_peft
from kllm.export.adapter_weights import adapter_weights
from kllm.model.decode import ScratchCache, prepare
from kllm.model.decode_adapters import AdapterWeights, adaptable
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.95)
KINDS = {  # rank, alpha, modules: as people train them
    "wide": (8, 16.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "attention": (3, 6.0, ("q_proj", "v_proj")),
    "mlp": (5, 5.0, ("o_proj", "up_proj", "down_proj")),
}


def random_pairs(
    shape: ModelShape, rank: int, modules: tuple[str, ...], seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, inputs, generator=generator) / inputs**0.5,
            torch.randn(outputs, rank, generator=generator) * 0.2,
        )
        for name, (outputs, inputs) in adaptable(shape).items()
        if name.endswith(modules)
    }


def on_disk(shape: ModelShape, folder: Path) -> dict[str, Path]:
    """The adapters of `KINDS` as PEFT directories."""
    for seed, (name, (rank, alpha, modules)) in enumerate(KINDS.items()):
        pairs = random_pairs(shape, rank, modules, seed)
        write_peft(pairs, folder / name, alpha=alpha, rank=rank, base="x",
                   shared_expert_gate=shape.shared_expert_gate)  # fmt: skip
    return {name: folder / name for name in KINDS}


def merged(model: Transformer, path: Path | None) -> Transformer:
    changed = copy.deepcopy(model)
    if path is not None:
        merge_adapter(changed, path)
    return changed


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(2, 60, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def engine_with(model: Transformer, paths: dict[str, Path], **options: object) -> Engine:
    engine = Engine(model, None, **options)  # type: ignore[arg-type]
    for name, path in paths.items():
        engine.add_adapter(name, adapter_weights(path, model.shape))
    return engine


def assert_same(mixed: list[Completion], alone: list[Completion], gap: float = 1e-5) -> None:
    for one, other in zip(mixed, alone, strict=True):
        assert one.token_ids == other.token_ids
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=gap)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(initializer_range=0.2)


@pytest.fixture(scope="module")
def paths(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return on_disk(model.shape, tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("options", [{}, {"max_batch": 3, "prefill_chunk": 7}], ids=["wide", "chunks"])
def test_in_a_mixed_batch_each_is_its_merged_model(model, paths, params, options):
    asked = prompts(12)
    names = [None, *paths] * 3
    each = [replace(params, adapter=name, seed=i) for i, name in enumerate(names)]
    mixed = engine_with(model, paths, **options).generate(asked, each)
    alone: list[Completion] = []
    engines = {name: Engine(merged(model, paths.get(name)), None) for name in set(names)}
    for prompt, name, one in zip(asked, names, each, strict=True):
        alone += engines[name].generate([prompt], replace(one, adapter=None))
    assert_same(mixed, alone)
    assert len({tuple(c.token_ids) for c in mixed}) == 12


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_on_rounded_weights_a_neighbour_changes_nothing(model, paths, weights):
    asked = [prompts(3)[0]] * 8
    each = [replace(GREEDY, adapter=name) for name in [None, *paths] * 2]
    engine = engine_with(model, paths, weights=weights)
    mixed = engine.generate(asked, each)
    alone = [engine.generate([p], replace(s, salt="x"))[0] for p, s in zip(asked, each, strict=True)]
    rounding = 2e-3  # of the activations, which the last bit of a sum may turn
    assert_same(mixed, alone, rounding)
    assert_same(mixed[:1], Engine(model, None, weights=weights).generate(asked[:1], GREEDY), rounding)
    # the adapter is not rounded: nearer to the merged model than that rounded as a whole may be
    exact = Engine(merged(model, paths["wide"]), None)
    scored = replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    found = [
        e.generate(asked[:1], replace(scored, adapter=a))[0] for e, a in ((engine, "wide"), (exact, None))
    ]
    gaps = [abs(a.logprob - b.logprob) for a, b in zip(*(f.prompt_logprobs[1:] for f in found), strict=True)]
    assert sum(gaps) / len(gaps) < {"int8": 0.1, "int4": 0.8}[weights]


def test_prefixes_are_not_shared(model, paths):
    engine = engine_with(model, paths)
    prompt = list(range(50))
    for name in (None, *paths):
        first = engine.generate([prompt], replace(GREEDY, adapter=name))[0]
        again = engine.generate([prompt], replace(GREEDY, adapter=name))[0]
        assert (first.cached_tokens, again.cached_tokens) == (0, 49) and first.token_ids == again.token_ids
    # at the same time, too: nobody waits for the beginning that another adapter computes
    each = [replace(GREEDY, adapter=name, salt="new") for name in (None, *paths)]
    assert [c.cached_tokens for c in engine.generate([prompt] * 4, each)] == [0] * 4
    # another adapter of the same name starts afresh
    engine.remove_adapter("mlp")
    engine.add_adapter("mlp", adapter_weights(paths["wide"], model.shape))
    assert engine.generate([prompt], replace(GREEDY, adapter="mlp"))[0].cached_tokens == 0


def test_guesses_and_preemption_change_nothing(model, paths):
    asked = [[1, 2, 3, 1, 2, 3, 1, 2] * 4, *prompts(7)]
    each = [replace(SAMPLED, adapter=name, seed=1) for name in [*paths, None] * 2]
    plain = engine_with(model, paths).generate(asked, each)
    for options in ({"speculate": 3}, {"draft": tiny_model(5)}, {"kv_memory": 3 << 15}):
        engine = engine_with(model, paths, **options)
        assert_same(engine.generate(asked, each), plain)
    assert engine.stats().preemptions > 0


def test_embeddings(model, paths):
    engine = engine_with(model, paths)
    for name in (None, *paths):
        wanted = Engine(merged(model, paths.get(name)), None).embed([5, 6, 7])
        torch.testing.assert_close(engine.embed([5, 6, 7], adapter=name), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="no adapter"):
        engine.embed([5], adapter="nope")


def test_names(model, paths):
    engine = engine_with(model, paths)
    assert engine.adapters == list(paths)
    asked = replace(GREEDY, adapter="nope")
    with pytest.raises(
        UserError, match=r"adapter: no adapter is called 'nope' \(there are: wide, attention, mlp\)"
    ):
        engine.check([1], asked)
    with pytest.raises(UserError, match="nope"):
        engine.submit([1], asked)
    with pytest.raises(UserError, match="already"):
        engine.add_adapter("mlp", adapter_weights(paths["mlp"], model.shape))
    number = engine.submit([1, 2], replace(GREEDY, adapter="mlp"))
    engine.step()
    with pytest.raises(UserError, match="in use"):
        engine.remove_adapter("mlp")
    engine.add_adapter("late", adapter_weights(paths["wide"], model.shape))  # others may come meanwhile
    engine.cancel(number)
    engine.step()
    engine.remove_adapter("mlp")
    assert engine.adapters == ["wide", "attention", "late"]
    with pytest.raises(UserError, match="nope"):
        engine.remove_adapter("nope")
    late, wide = (engine.generate([[1, 2]], replace(GREEDY, adapter=name))[0] for name in ("late", "wide"))
    assert late.token_ids == wide.token_ids


def test_more_sets_than_are_kept(model, paths):
    engine = engine_with(model, {f"{name}{i}": path for i in range(3) for name, path in paths.items()})
    for i in range(9):
        names = [engine.adapters[j] for j in (i, (i + 1) % 9, (i + 4) % 9)]
        mixed = engine.generate([[i, 7]] * 3, [replace(GREEDY, adapter=name) for name in names])
        for name, got in zip(names, mixed, strict=True):
            assert_same([got], engine.generate([[i, 7]], replace(GREEDY, adapter=name, salt="alone")))
    assert len(engine.prepared.adapters._sets) <= 4


def test_new_weights_keep_the_adapters(model, paths):
    engine = engine_with(model, paths)
    other = tiny_model(9, initializer_range=0.2)
    engine.generate([[3, 4]], replace(GREEDY, adapter="wide"))
    engine.reload(other)
    assert_same(
        engine.generate([[3, 4]], replace(GREEDY, adapter="wide")),
        Engine(merged(other, paths["wide"]), None).generate([[3, 4]], GREEDY),
    )


# -- every architecture ----------------------------------------------------------------------------------


def with_magnitudes(model: Transformer, weights: AdapterWeights) -> AdapterWeights:
    """The same adapter as DoRA, its magnitudes as after some training."""
    state, generator = model.state_dict(), torch.Generator().manual_seed(3)
    lengths = {name: state[f"{name}.weight"].norm(dim=1) for name in weights.pairs}
    return replace(
        weights,
        magnitudes={n: m * (1 + 0.2 * torch.randn(m.shape, generator=generator)) for n, m in lengths.items()},
    )


@torch.no_grad()
def written_in(model: Transformer, weights: AdapterWeights) -> Transformer:
    """DoRA (Liu et al. 2024, eq. 5) the plain way."""
    changed = copy.deepcopy(model)
    for name, (a, b) in weights.pairs.items():
        weight = changed.get_submodule(name).weight
        whole = weight.double() + b.double() @ a.double()
        if name in weights.magnitudes:
            whole *= (weights.magnitudes[name].double() / whole.norm(dim=1))[:, None]
        weight.copy_(whole.float())
    return changed


SOME = ["llama-bias", "qwen3", "qwen2-moe-shared", "qwen2-moe-gated", "mixtral", "smollm3"]


@pytest.mark.parametrize("name", SOME)
def test_every_architecture_from_disk(name: str, tmp_path: Path) -> None:
    """The shared expert's down projection is doubled on disk, and its adapter with it."""
    shape = SHAPES[name]
    model = random_model(shape)
    paths = on_disk(shape, tmp_path)
    dora = with_magnitudes(model, AdapterWeights(random_pairs(shape, 4, KINDS["wide"][2], 7)))
    paths["dora"] = tmp_path / "dora"
    write_peft(
        dict(dora.pairs), paths["dora"], alpha=4.0, rank=4, base="x", use_rslora=True,
        magnitudes=dora.magnitudes, shared_expert_gate=shape.shared_expert_gate,
    )  # fmt: skip
    tokens = torch.arange(40) % shape.vocab_size
    prepared = prepare(model)
    for kind, path in paths.items():
        number = prepared.adapters.add(kind, adapter_weights(path, shape))
        ours = prepared(tokens, torch.arange(40), ScratchCache(), prepared.adapters.choose([number], [40]))
        with torch.no_grad():
            theirs = merged(model, path)(tokens, torch.arange(40))
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "qwen2-moe-shared"])
def test_dora_is_an_output_scale(name: str) -> None:
    shape = SHAPES[name]
    model = random_model(shape)
    plain = AdapterWeights(random_pairs(shape, 4, KINDS["wide"][2], 1))
    some = AdapterWeights(random_pairs(shape, 2, ("k_proj", "up_proj"), 2))
    prepared = prepare(model)
    each = [plain, with_magnitudes(model, plain), with_magnitudes(model, some)]
    numbers = [0, *(prepared.adapters.add(str(i), one) for i, one in enumerate(each))]
    for weights, own in (("fresh", model), ("reloaded", random_model(shape, seed=5))):
        if weights == "reloaded":
            prepared.reload(own)
        changed = [own, *(written_in(own, one) for one in each)]
        tokens = torch.arange(8) % shape.vocab_size
        rows = []
        for token in tokens.tolist():  # one token of each at a time: a mixed step of single tokens
            chosen = prepared.adapters.choose(numbers, [1] * 4)
            rows.append(
                prepared(torch.tensor([token] * 4), torch.zeros(4, dtype=torch.int64), Alone(), chosen)
            )
        with torch.no_grad():
            for i, one in enumerate(changed):
                wanted = torch.stack([one(t[None], torch.zeros(1, dtype=torch.int64))[0] for t in tokens])
                got = torch.stack([row[i] for row in rows])
                torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-4)


class Alone:
    """Every token is a text of its own: it attends to itself."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).flatten(1)


def test_what_cannot_be_chosen_per_request_is_refused() -> None:
    def refusal(shape: ModelShape, name: str, outputs: int, inputs: int) -> str:
        weights = AdapterWeights({name: (torch.zeros(2, inputs), torch.zeros(outputs, 2))}, where="lora")
        with pytest.raises(UserError) as caught:
            prepare(random_model(shape)).adapters.add("x", weights)
        return str(caught.value)

    moe = SHAPES["qwen2-moe-shared"]
    for name in ("experts.1.up_proj", "gate"):
        said = refusal(moe, f"model.layers.0.mlp.{name}", 48, 64)
        assert said.startswith("lora: model.layers.0.mlp.") and "kllm convert --merge" in said
    assert "another base model?" in refusal(SHAPES["llama"], "model.layers.9.self_attn.q_proj", 64, 64)
    said = refusal(SHAPES["llama"], "model.layers.0.self_attn.k_proj", 64, 64)
    assert said == (
        "lora: model.layers.0.self_attn.k_proj is (32, 64), the adapter's (64, 64) (another base model?)"
    )
    half = random_model(SHAPES["llama"]).to(torch.float16)
    pair = torch.full((1, 64), 1e6), torch.ones(64, 1)
    with pytest.raises(UserError, match="do not fit"):
        prepare(half).adapters.add("x", AdapterWeights({"model.layers.0.self_attn.q_proj": pair}))


def test_a_broken_adapter_stays_in_its_rows(model, paths) -> None:
    engine = engine_with(model, paths)
    part = engine.prepared.adapters._alone[1][0]
    part.a[0, 0] = torch.inf  # as if its numbers had run over inside the first product
    asked = [replace(GREEDY, adapter="wide"), replace(GREEDY, adapter="mlp"), GREEDY]
    clean = engine_with(model, paths).generate([[4, 5]] * 2, asked[1:])
    numbers = [engine.submit([4, 5], one) for one in asked]
    said: dict[int, list[int]] = {number: [] for number in numbers}
    reasons = {}
    while engine.has_work:
        for event in engine.step():
            said[event.request_id] += event.token_ids
            reasons[event.request_id] = event.finish_reason
    assert reasons[numbers[0]] == "error"
    assert [said[n] for n in numbers[1:]] == [c.token_ids for c in clean]
