"""`kllm serve MODEL --adapter NAME=DIR` and `kllm chat MODEL --adapter DIR`: by name, together, each as merged."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from chat_support import chat_model
from serve_client import Server, events
from support import kllm

from kllm.engine import Completion, Engine, SamplingParams
from kllm.export.adapter import merge_adapter, write_peft
from kllm.export.load import load_model
from kllm.model.decode_adapters import adaptable

NAMES = ("base", "poet", "cook")
RANKS = {"poet": (4, ("q_proj", "v_proj", "down_proj")), "cook": (9, ("_proj",))}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `base`, a PEFT folder `poet`, a run `cook` of a LoRA stage, `other` of another model."""
    folder = tmp_path_factory.mktemp("adapters")
    chat_model(folder / "base", context=512)
    model, _ = load_model(folder / "base", tokenizer=False)
    for seed, (name, (rank, modules)) in enumerate(RANKS.items()):
        generator = torch.Generator().manual_seed(seed)
        pairs = {
            module: (
                torch.randn(rank, i, generator=generator) / 6,
                torch.randn(o, rank, generator=generator) / 6,
            )
            for module, (o, i) in adaptable(model.shape).items()
            if module.endswith(modules)
        }
        at = folder / name if name == "poet" else folder / name / "01-lora" / "adapter"
        at.parent.mkdir(parents=True, exist_ok=True)
        write_peft(pairs, at, alpha=2.0 * rank, rank=rank, base="base")
    (folder / "cook" / "run.json").write_text("{}")
    wide = {"model.layers.0.self_attn.q_proj": (torch.zeros(2, 64), torch.zeros(64, 2))}
    write_peft(wide, folder / "other", alpha=2.0, rank=2, base="base")
    experts = {"model.layers.1.mlp.down_proj": (torch.zeros(2, 64), torch.zeros(32, 2))}
    write_peft(experts, folder / "torn", alpha=2.0, rank=2, base="base")
    weights = folder / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    return folder


def references(place: Path) -> dict[str, Path]:
    return {"poet": place / "poet", "cook": place / "cook"}


@pytest.fixture(scope="module")
def merged(place: Path) -> dict[str, Engine]:
    """What each name must answer like: an engine over the model that it was merged into."""
    engines = {}
    for name in NAMES:
        model, tokenizer = load_model(place / "base")
        if name == "cook":
            merge_adapter(model, place / "cook" / "01-lora" / "adapter")
        elif name == "poet":
            merge_adapter(model, place / "poet")
        engines[name] = Engine(model, tokenizer, kv_memory=1 << 22)
    return engines


@pytest.fixture(scope="module")
def server(place: Path) -> Server:
    flags = [f"--adapter={name}={path}" for name, path in references(place).items()]
    return Server(*flags, "--device", "cpu", models=(place / "base",))


def expected(engine: Engine, prompt: list[int], seed: int | None) -> Completion:
    params = SamplingParams(
        max_tokens=24,
        temperature=0.0 if seed is None else 1.0,
        top_p=1.0,
        seed=seed,
        logprobs=0,
        ignore_eos=True,
    )
    return engine.generate([prompt], params)[0]


def test_all_at_once_each_is_its_merged_model(server: Server, merged: dict[str, Engine]) -> None:
    asked = [
        (name, list(range(20, 25 + 7 * i)), seed) for i, seed in enumerate((None, 5)) for name in NAMES
    ] * 2

    def answer(job: tuple[str, list[int], int | None]) -> dict:
        name, prompt, seed = job
        sampling = {"temperature": 0} if seed is None else {"temperature": 1, "top_p": 1, "seed": seed}
        return server.complete(prompt, model=name, max_tokens=24, logprobs=0, ignore_eos=True, **sampling)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(answer, asked))
    texts = set()
    for (name, prompt, seed), got in zip(asked, answers, strict=True):
        wanted = expected(merged[name], prompt, seed)
        choice = got["choices"][0]
        assert (got["model"], seed, choice["text"]) == (name, seed, wanted.text)
        logprobs = [one.logprob for one in wanted.logprobs]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)
        texts.add(choice["text"])
    assert len(texts) == 6


def test_conversations(server: Server, merged: dict[str, Engine]) -> None:
    """The template and the tokenizer are the base's; streams and whole answers are the same."""
    ids = server.prompt_ids([{"role": "user", "content": "where is the cat?"}], model="poet")
    assert ids == server.prompt_ids([{"role": "user", "content": "where is the cat?"}])
    body = {
        "messages": [{"role": "user", "content": "where is the cat?"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    for name in NAMES:
        wanted = expected(merged[name], ids, None).text
        whole = server.answer("/v1/chat/completions", {**body, "model": name, "ignore_eos": True})
        assert (whole["model"], whole["choices"][0]["message"]["content"]) == (name, wanted)
        stream = {**body, "model": name, "ignore_eos": True, "stream": True}
        chunks = events(server.post("/v1/chat/completions", stream).content)
        said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
        assert said == wanted
    prints = {server.chat("hi", model=name, max_tokens=1)["system_fingerprint"] for name in NAMES}
    assert len(prints) == 3
    assert server.chat("hi", max_tokens=1)["model"] == "base"


def test_embeddings(server: Server, merged: dict[str, Engine]) -> None:
    for name in NAMES:
        answer = server.answer("/v1/embeddings", {"input": [[5, 6, 7]], "model": name})
        wanted = torch.nn.functional.normalize(merged[name].embed([5, 6, 7]), dim=0)
        torch.testing.assert_close(torch.tensor(answer["data"][0]["embedding"]), wanted, atol=1e-5, rtol=1e-4)


def test_the_list_of_models(server: Server) -> None:
    listed = server.get("/v1/models").json()["data"]
    assert [(m["id"], m["root"], m["parent"]) for m in listed] == [
        ("base", "base", None),
        ("poet", "base", "base"),
        ("cook", "base", "base"),
    ]
    assert {m["max_model_len"] for m in listed} == {512}
    assert server.get("/v1/models/cook").json() == listed[2]


def test_an_unknown_name_is_404(server: Server) -> None:
    answer = server.post("/v1/completions", {"prompt": "x", "model": "Poet"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["message"].endswith("this server has: base, poet, cook.")


def test_what_is_counted(server: Server) -> None:
    before = {name: server.metric("generation_tokens_total", model_name=name) for name in NAMES}
    prompts = server.metric("prompt_tokens_total", model_name="cook")
    server.complete([7, 8, 9], model="cook", max_tokens=5, ignore_eos=True)
    after = {name: server.metric("generation_tokens_total", model_name=name) for name in NAMES}
    assert {name: after[name] - before[name] for name in NAMES} == {"base": 0, "poet": 0, "cook": 5}
    assert server.metric("prompt_tokens_total", model_name="cook") == prompts + 3
    text = server.get("/metrics").text
    assert text.count("kllm:num_requests_running{") == 1  # one engine, under its model's name
    assert 'kllm:num_requests_running{model_name="base"} ' in text
    assert text.count('kllm:request_success_total{model_name="cook",finished_reason="length"}') == 1


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (["x=nope"], "flag --adapter nope: no such adapter"),
        (["x=base"], "flag --adapter base: no adapter in it"),
        (["nope"], "flag --adapter: expected NAME=DIR, got 'nope'"),
        (["base=poet"], "two models are called 'base'"),
        (["x=poet", "x=cook"], "two models are called 'x'"),
        (["a b=poet"], "'a b' is no name"),
        (["poet=poet", "x=other"], "is (32, 32), the adapter's (64, 64) (another base model?)"),
        (["x=torn"], "damaged adapter"),
    ],
)
def test_what_cannot_be_served_is_one_line_before_the_port_opens(
    place: Path, adapters: list[str], words: str
) -> None:
    flags = [f"--adapter={text}" for text in adapters]
    done = kllm("serve", "base", "--port", "0", *flags, cwd=place, check=False, timeout=60)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], done.stderr
    assert done.returncode in (1, 2) and not done.stdout and "listening" not in done.stderr


@pytest.mark.parametrize("reference", ["poet", "cook", "cook/01-lora", "cook/01-lora/adapter"])
def test_a_talk(place: Path, merged: dict[str, Engine], reference: str) -> None:
    flags = ["--adapter", reference, "--temperature", "0", "--max-tokens", "12", "--device", "cpu"]
    done = kllm("chat", "base", *flags, "-p", "hi", "--json", cwd=place)
    engine = merged[reference.partition("/")[0]]
    from kllm.tokenizer.chat import ChatEncoder

    ids = ChatEncoder(engine.tokenizer).prompt([{"role": "user", "content": "hi"}])
    wanted = engine.generate([ids], SamplingParams(max_tokens=12, temperature=0.0))[0]
    assert json.loads(done.stdout)["text"] == wanted.text


def test_a_talk_with_what_is_no_adapter(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "other", tmp_path / "x")
    for reference, words in (("nope", "nope: no such adapter"), (str(tmp_path / "x"), "another base model?")):
        done = kllm("chat", "base", "--adapter", reference, "-p", "hi", cwd=place, check=False)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
