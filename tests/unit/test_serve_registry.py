"""Models by name, and what the command line means by its MODEL and --adapter arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_support import chat_model
from engine_support import tiny_model
from serve_support import registry, run

from kllm.engine import Engine, SamplingParams
from kllm.errors import UserError
from kllm.export.adapter import write_peft
from kllm.export.hf import save_model
from kllm.export.load import generation_defaults, load_model
from kllm.serve.errors import ApiError
from kllm.serve.loading import (
    LoadOptions,
    check,
    load_all,
    load_one,
    stretched,
)
from kllm.serve.registry import Registry, Served
from kllm.serve.settings import Settings
from kllm.serve.sources import Source, default_name, sources_of


def refusal(models: Registry, name: str | None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        models.get(name)
    return caught.value


def test_names_and_the_default() -> None:
    models = registry()
    assert models.get(None).name == "base" and models.get("tuned").parent == "base"
    for name in ("nope", "", "../base", "/etc/passwd", "BASE", "x" * 10_000):
        error = refusal(models, name)
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert len(error.message) < 300
    assert refusal(models, "x").message == 'The model "x" does not exist; this server has: base, tuned.'


def test_the_status() -> None:
    assert registry().status == "ok"
    models = Registry()
    assert models.status == "loading" and refusal(models, None).code == "loading"
    models.open()
    assert models.status == "ok" and refusal(models, None).status == 404
    models = registry()
    models.get(None).runtime._thread.dead = True
    assert models.status == "engine_dead" and refusal(models, None).code == "engine_dead"
    models.drain()
    assert models.status == "draining" and refusal(models, None).code == "draining"
    assert models._models["base"].runtime.draining


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "a=b").mkdir()
    assert sources_of(["small", "big=/models/x", "Org/Model-1@main", "./m/", "x.gguf"]) == [
        Source("small", "small"),
        Source("big", "/models/x"),
        Source("Model-1", "Org/Model-1@main"),
        Source("m", "./m/"),
        Source("x.gguf", "x.gguf"),
    ]
    assert sources_of(["c=a=b"]) == [Source("c", "a=b")]
    found = sources_of(["small"], ["poet=adapters/p", "cook=adapters/c"])
    assert found[1:] == [
        Source("poet", "small", "adapters/p", "small"),
        Source("cook", "small", "adapters/c", "small"),
    ]


@pytest.mark.parametrize(
    ("models", "adapters"),
    [(["a", "x/a"], []), (["a"], ["a=b"]), (["a"], ["b"]), (["a"], ["=b"]), (["a"], ["b="]), (["a b"], [])],
)
def test_names_must_be_plain_and_unique(models: list[str], adapters: list[str]) -> None:
    with pytest.raises(UserError):
        sources_of(models, adapters)


def test_default_names(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    final = run / "02-sft" / "final"
    final.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (tmp_path / "tiny.gguf").write_text("")
    assert default_name(str(run)) == default_name(str(final)) == "quickstart"
    assert default_name(str(tmp_path / "tiny.gguf")) == "tiny"
    assert default_name(str(tmp_path)) == tmp_path.name
    assert default_name("Qwen/Qwen3-0.6B@main") == "Qwen3-0.6B"


def test_generation_defaults(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert generation_defaults(tmp_path) == {}
    file.write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "top_p": "x", "min_p": True, "eos_token_id": 2})
    )
    assert generation_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20}
    for broken in ("[1]", "{", '{"temperature": NaN}'):
        file.write_text(broken)
        assert generation_defaults(tmp_path) == {}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("served") / "tiny", context=128)


CPU = {"device": "cpu", "kv_memory": 1 << 20}


def test_loading(tiny: Path) -> None:
    models, lines = Registry(), []
    load_all(
        [Source("one", str(tiny)), Source("two", str(tiny))],
        LoadOptions(**CPU),
        Settings(),
        models,
        say=lines.append,
    )
    assert models.status == "ok" and [m.name for m in models] == ["one", "two"]
    one = models.get(None)
    assert one.max_model_len == 128 and one.root == "tiny" and one.runtime.encoder is not None
    assert any("parameters" in line for line in lines) and any("KV 1 MiB" in line for line in lines)
    assert one.fingerprint == models.get("two").fingerprint
    assert models.stop()


def test_the_start_names_what_was_chosen(tiny: Path) -> None:
    said: list[str] = []
    options = {
        "kv_dtype": "int8",
        "rope_scaling": "yarn",
        "factor": 2.0,
        "speculate": 3,
        "max_context": 10**6,
    }
    served = load_one(Source("m", str(tiny)), LoadOptions(**CPU, **options), Settings(), say=said.append)
    assert "warning: --max-context 1000000: the model has 256" in said
    for line in (
        "keys and values in int8",
        "positions stretched 2 times (YaRN)",
        "guesses 3 tokens ahead from the text so far",
    ):
        assert line in served.lines
    served = load_one(Source("m", str(tiny)), LoadOptions(**CPU, draft="x"), Settings())
    assert "guesses 4 tokens ahead with x" in served.lines


def test_too_little_memory_names_the_least(tiny: Path) -> None:
    def load(memory: int) -> Served:
        options = LoadOptions(device="cpu", kv_memory=memory)
        return load_one(Source("m", str(tiny)), options, Settings())

    with pytest.raises(
        UserError, match=r"flag --kv-memory: 10 bytes are too few, at least [\d,]+ "
    ) as caught:
        load(10)
    least = int(caught.value.message.rpartition(" ")[2].replace(",", ""))
    assert load(least).max_model_len > 0
    with pytest.raises(UserError):
        load(least - 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft": "nope"}, "flag --draft nope: no such"),
        ({"device": "gpu"}, "flag --device: unknown device 'gpu'"),
    ],
)
def test_what_is_seen_before_anything_is_loaded(tiny: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check([Source("m", str(tiny))], LoadOptions(**options))
    with pytest.raises(UserError, match="flag --adapter none: no such adapter"):
        check([Source("m", str(tiny), adapter="none")], LoadOptions())
    check([Source("m", str(tiny)), Source("far", "Some/Model")], LoadOptions(device="cuda:1"))


def test_the_fingerprint_is_of_weights_and_options(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny)
    assert tokenizer is not None
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    save_model(model, tokenizer, tmp_path / "changed")
    settings = Settings()
    prints = [
        load_one(Source("m", str(place)), LoadOptions(**CPU, **more), settings).fingerprint
        for place, more in [
            (tiny, {}),
            (tiny, {"kv_dtype": "int8"}),
            (tiny, {"rope_scaling": "yarn", "factor": 2.0}),
            (tmp_path / "changed", {}),
        ]
    ]
    assert len(set(prints)) == 4
    assert (
        prints[0]
        == load_one(Source("n", str(tiny)), LoadOptions(**CPU, max_context=64), settings).fingerprint
    )


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    save_model(tiny_model(), None, tmp_path / "bare")
    with pytest.raises(UserError, match="no tokenizer"):
        load_one(Source("m", str(tmp_path / "bare")), LoadOptions(**CPU), Settings())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_stretching_keeps_the_weights(kind: str, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    longer = stretched(model, kind, 4.0)
    assert longer.shape.max_position_embeddings == 4 * 640
    assert longer.shape.rope_scaling is not None and longer.shape.rope_scaling["factor"] == 4.0
    mine, theirs = model.state_dict(), longer.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    engine = Engine(longer, None, kv_memory=1 << 20)
    assert engine.max_context > 640
    prompt = [i % 250 for i in range(700)]
    assert len(engine.generate([prompt], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    with pytest.raises(UserError, match="already"):
        stretched(longer, kind, 2.0)


def test_an_adapter_is_a_model_of_its_own_on_the_bases_engine(tiny: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    pair = (torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator))
    write_peft({name: pair}, tmp_path / "lora", alpha=8.0, rank=4, base=str(tiny))
    models = Registry()
    sources = sources_of([f"base={tiny}"], [f"poet={tmp_path / 'lora'}"])
    load_all(sources, LoadOptions(**CPU), Settings(), models, say=lambda line: None)
    base, poet = models.get(None), models.get("poet")
    assert (base.name, base.parent) == ("base", None)
    assert (poet.parent, poet.root, poet.adapter) == ("base", "base", "poet")
    assert poet.runtime is base.runtime and models.runtimes == [base.runtime]
    assert base.fingerprint != poet.fingerprint

    async def answer(served: Served) -> list[int]:
        asked = SamplingParams(max_tokens=16, temperature=0.0, adapter=served.adapter)
        ticket = served.runtime.submit([[5, 6, 7]], [asked])
        return [t async for batch in ticket.batches() for _, event in batch for t in event.token_ids]

    assert run(lambda: answer(base)) != run(lambda: answer(poet))
    assert models.stop()
