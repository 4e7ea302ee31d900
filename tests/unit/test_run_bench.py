"""Speed measurement: turns and figures, the load client and its verdicts, the peers on tiny models."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fake_server import Fake
from engine_support import tiny_model

from kllm.cli import bench as cli
from kllm.errors import KllmError, UserError
from kllm.export import llamacpp
from kllm.export.hf import save_model
from kllm.run import bench, bench_generate, bench_quality, bench_server
from kllm.run.bench_client import Manners, Outcome, Target, read_stream
from kllm.run.bench_generate import GenerateBench
from kllm.run.bench_peers import Ours, Task, Transformers, same_share
from kllm.run.bench_serve import ServeBench, bench_serve, make_cases
from kllm.run.bench_server import OwnServer, gauges

FIVE = [[1, 2, 3, 4, 5]]


# -- figures -----------------------------------------------------------------------------------------


def test_candidates_take_turns_and_the_warm_up_does_not_count() -> None:
    seen: list[tuple[str, int]] = []

    def work(name: str, cpu: float) -> bench.Work:
        def one(number: int) -> bench.Cost:
            seen.append((name, number))
            return bench.Cost(cpu if number else 99.0, 2 * cpu)

        return one

    costs = bench.interleave({"a": work("a", 1.0), "b": work("b", 3.0)}, 3)
    assert [number for _, number in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [name for name, _ in seen] == list("abbaabba")
    assert costs["b"].spread("cpu") == {"min": 3.0, "median": 3.0}
    assert costs["a"].spread("wall")["median"] == 2.0
    assert len(costs["a"].rounds) == 3


def test_own_clocks_measure_what_brings_no_figures() -> None:
    cost = bench.timed(lambda number: [i * i for i in range(200_000)] and None, 1)
    assert 0 < cost.cpu < 10
    assert 0 < cost.wall < 10


def test_quantiles_are_values_that_occurred() -> None:
    values = list(range(1, 101))
    assert bench.quantile(values, 0.5) == 50
    assert bench.quantile(values, 0.99) == 99
    assert bench.quantile(values, 1.0) == 100
    assert bench.quantile([7.0], 0.01) == 7.0
    assert bench.quantile([], 0.5) is None


def test_jain_is_one_for_equals_and_a_share_for_one_who_has_all() -> None:
    assert bench.jain([3, 3, 3, 3]) == pytest.approx(1)
    assert bench.jain([8, 0, 0, 0]) == pytest.approx(0.25)
    assert bench.jain([]) is None
    assert bench.jain([0, 0]) is None


def test_tokens_agree_up_to_the_first_difference() -> None:
    assert same_share([[1, 2, 3]], [[1, 2, 3]]) == 1
    assert same_share([[1, 9, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == pytest.approx(4 / 6)
    assert same_share([[1]], [[1, 2]]) == 0.5


# -- generation --------------------------------------------------------------------------------------


def saved(tmp_path: Path, **changes: Any) -> str:
    save_model(tiny_model(**changes), None, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"model": "x", "preset": "k-tiny"}, None),
        ({"model": None, "preset": None}, None),
        ({"rounds": 0}, "flag --rounds"),
        ({"streams": (1, 0)}, "flag --streams"),
        ({"weights": ("fp8",)}, "flag --weights"),
        ({"weights": ()}, None),
        ({"peers": ("vllm",)}, "flag --peers"),
        ({"preset": "k-tinny"}, None),
        ({"new_tokens": 5000}, None),
        ({"text": "no-such-file.txt"}, "flag --text"),
    ],
)
def test_wrong_values_are_the_users_mistake(changes: dict[str, Any], where: str | None) -> None:
    job = GenerateBench(**{"preset": "k-tiny", "peers": (), **changes})
    with pytest.raises(UserError) as caught:
        bench_generate.bench_generate(job)
    assert caught.value.where == where


def test_ours_alone_gives_a_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = GenerateBench(
        model=saved(tmp_path), streams=(1, 4), new_tokens=6, rounds=2, weights=("fp32",), peers=()
    )
    threads = torch.get_num_threads()
    report = bench_generate.bench_generate(job)
    assert torch.get_num_threads() == threads
    assert [task["streams"] for task in report["tasks"]] == [1, 4, 16]
    assert report["perplexity"] == {}
    row = report["tasks"][1]["rows"][0]
    assert row["engine"] == "kllm fp32"
    assert row["cpu_ms_per_token"]["min"] == pytest.approx(1e3 * row["cpu_s"]["min"] / 24)
    assert "ratio" not in row
    assert report["aggregate"]["streams"] == 4
    json.dumps(report)
    cli.print_generate(report)
    shown = capsys.readouterr().out
    assert "shared prefix: 16 samples of one 64-token prompt" in shown
    assert "kllm fp32" in shown


def test_a_shared_prompt_goes_through_the_model_once_and_every_round_anew() -> None:
    ours = Ours(tiny_model(), "fp32", streams=16, context=96)
    task = Task("shared", (tuple(range(64)),) * 16, 2, shared=True)
    for number in range(2):
        _, rows = ours.run(task, number)
        assert ours.computed is not None
        assert 64 <= ours.computed < 2 * 64
    assert len({tuple(row) for row in rows}) > 1, "all samples are the same"


def test_transformers_gives_the_same_tokens_with_its_cache_on(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = tiny_model()
    theirs = Transformers(model, tmp_path / "hf")
    ours = Ours(model, "fp32", streams=2, context=64)
    task = Task("greedy", ((5, 6, 7), (80, 81, 82)), 12)
    assert ours.run(task, 0)[1] == theirs.run(task, 0)[1]
    assert theirs.computed == 6
    shared = Task("shared", ((5, 6, 7),) * 3, 4, shared=True)
    assert [len(row) for row in theirs.run(shared, 0)[1]] == [4, 4, 4]
    generate = theirs._generate
    theirs._generate = lambda rows, n, **how: generate(rows, n, **{**how, "use_cache": False})  # type: ignore[method-assign]
    with pytest.raises(KllmError, match="does not use its cache"):
        theirs._check_cache()


@pytest.mark.skipif(llamacpp.available() is None, reason="llama.cpp is not installed")
def test_every_peer_takes_part_and_is_compared(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    job = GenerateBench(
        model=saved(tmp_path, vocab_size=320),
        streams=(1, 2),
        new_tokens=4,
        rounds=1,
        weights=("fp32", "int8"),
    )
    report = bench_generate.bench_generate(job)
    assert report["absent"] == []
    for task in report["tasks"]:
        rows = {row["engine"]: row for row in task["rows"]}
        assert set(rows) == {
            "kllm fp32", "kllm int8", "transformers fp32", "llama.cpp f32", "llama.cpp q8_0",
        }  # fmt: skip
        assert rows["transformers fp32"]["ratio"]["cpu"] == 1
        if not task["shared"]:
            assert rows["kllm fp32"]["same_tokens"] == 1
            assert rows["llama.cpp f32"]["same_tokens"] > 0.5  # its cache is in 16 bits


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_generate, "has_transformers", lambda: False)
    monkeypatch.setattr(llamacpp, "available", lambda: None)
    said: list[str] = []
    job = GenerateBench(
        model=saved(tmp_path), streams=(1,), new_tokens=2, rounds=1, weights=("fp32",), shared=False
    )
    report = bench_generate.bench_generate(job, said.append)
    assert [line.split()[0] for line in report["absent"]] == ["transformers", "llama.cpp"]
    assert set(report["absent"]) < set(said)


def test_a_file_that_llamacpp_refuses_is_one_line(tmp_path: Path) -> None:
    module = llamacpp.available()
    if module is None:
        pytest.skip("llama.cpp is not installed")
    from kllm.run.bench_llamacpp import LlamaCpp

    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(KllmError, match=r"llama\.cpp ended"):
        LlamaCpp(module, tmp_path / "x.gguf", threads=1, streams=1, context=64)


def test_the_engines_perplexity_is_the_models() -> None:
    model = tiny_model()
    windows = [[(7 * i + k) % 250 for i in range(90)] for k in range(3)]
    total = 0.0
    for window in windows:
        row = torch.tensor(window)
        with torch.no_grad():
            logits = model.logits(model(row[:-1], torch.arange(len(row) - 1)))
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    expected = math.exp(total / (3 * 89))
    assert bench_quality.engine_perplexity(model, windows, weights="fp32") == pytest.approx(
        expected, rel=1e-4
    )
    rounded = bench_quality.engine_perplexity(model, windows, weights="fp32", kv_dtype="int4")
    assert rounded != pytest.approx(expected, rel=1e-6), "the cache was not rounded"


def test_perplexity_stands_beside_the_speed(capsys: pytest.CaptureFixture[str]) -> None:
    cost = {"text": "x", "tokens": 1000, "rows": [{"kind": "int8", "ppl": 2.5, "change": 0.0123}]}
    empty = {
        "model": "m",
        "parameters": 1,
        "tasks": [],
        "aggregate": {},
        "readers": {},
        "absent": ["x is not here"],
    }
    cli.print_generate(
        {**empty, "machine": bench.machine(), "settings": {"threads": 1, "rounds": 1}, "perplexity": cost}
    )
    shown = capsys.readouterr().out
    assert "2.5000" in shown
    assert "+1.230%" in shown
    assert "x is not here" in shown


# -- the load client -----------------------------------------------------------------------------------


def ask(fake: Fake, tokens: int = 8, **manners: Any) -> Outcome:
    body = {"prompt": "ab\u4f60", "max_tokens": tokens, "stream": True}
    with fake.listening():
        return asyncio.run(read_stream(Target.parse(fake.url), "/v1/completions", body, Manners(**manners)))


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_stream_is_read_however_it_is_torn(step: int) -> None:
    out = ask(Fake(step=step))
    assert (out.text, out.finish_reason, out.tokens) == ("ab\u4f60ab\u4f60ab", "length", 8)
    assert out.done
    assert out.error is None
    assert len(out.times) == 8
    assert len(out.gaps) == 7
    assert out.first is not None
    assert out.started < out.times[0] <= out.times[-1] <= out.ended


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("cut", "connection: IncompleteReadError"),
        ("done", "no [DONE]"),
        ("finish", "no finish_reason"),
        ("event", "error event server_error"),
        ("busy", "http 429 queue_full"),
        ("broken", "http 500"),
        ("junk", "not a stream: JSONDecodeError"),
    ],
)
def test_every_fault_has_a_name(fault: str, error: str) -> None:
    out = ask(Fake(fault))
    assert out.error == error
    assert out.retry_after == (0.05 if fault in ("busy", "broken") else None)


def test_silence_is_starvation() -> None:
    out = ask(Fake("silent"), patience=0.3)
    assert out.error == "starved"
    assert out.text == "ab"
    assert out.ended - out.started < 5


def test_a_reader_leaves_in_the_middle_or_rests() -> None:
    left = ask(Fake(), tokens=1000, leave_after=3)
    assert left.left
    assert left.error is None
    assert 3 <= len(left.times) < 1000
    rested = ask(Fake(), tokens=50, stall_after=2, stall=0.5, patience=0.4)
    assert rested.error is None
    assert rested.text == ("ab\u4f60" * 20)[:50]
    assert rested.ended - rested.started > 0.5


def test_nobody_there_is_a_connection_error() -> None:
    target = Target("127.0.0.1", 9)
    assert asyncio.run(read_stream(target, "/", {})).error == "connection: ConnectionRefusedError"


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", "http://", "http://x:port"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError):
        Target.parse(url)


def test_addresses() -> None:
    assert Target.parse("http://h:8000/v1/") == Target("h", 8000)
    assert Target.parse("https://h/api/v1", "k") == Target("h", 443, "/api", True, "k")


# -- the verdict ---------------------------------------------------------------------------------------

QUICK = {"streams": 4, "seconds": 0.6, "cases": 4, "max_tokens": 30, "stall_seconds": 0.1, "patience": 1.0}


def load(fake: Fake, **changes: Any) -> dict[str, Any]:
    with fake.listening():
        return bench_serve(ServeBench(url=fake.url, **{**QUICK, **changes}))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_right_server_passes(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = load(Fake(), endpoint=endpoint, disconnect=0.2, stall=0.2)
    streams = report["load"]["streams"]
    assert report["ok"]
    assert streams["complete"] > 4
    assert streams["left"] > 0
    assert streams["wrong"] == streams["incomplete"] == streams["starved"] == 0
    assert report["load"]["jain"]["mean"] is None or report["load"]["jain"]["mean"] > 0.5
    assert report["load"]["tokens_s"] > report["alone"]["tokens_s"] > 0
    assert report["gauges"]["running"] == 0
    assert report["model"] == "fake"
    cli.print_serve(report)
    assert "all streams whole and right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [("wrong", "wrong"), ("cut", "incomplete"), ("done", "incomplete"), ("silent", "starved")],
)
def test_a_fault_under_load_fails(fault: str, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = load(Fake(fault, spared=20), disconnect=0.0, stall=0.0, min_tokens=8)
    assert not report["ok"]
    assert report["load"]["streams"][verdict] + report["alone"]["streams"][verdict] > 0
    assert any(verdict in line for line in report["failures"])
    cli.print_serve(report)
    assert "NOT all right" in capsys.readouterr().out


def test_refusals_wait_and_are_counted_apart() -> None:
    report = load(Fake("busy", spared=40), disconnect=0.0, stall=0.0)
    assert report["load"]["streams"]["refused"] > 0
    assert report["load"]["streams"]["incomplete"] == 0
    assert report["load"]["errors"] == {"http 429 queue_full": report["load"]["streams"]["refused"]}


def test_a_server_that_goes_on_afterwards_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from kllm.run import bench_serve as module

    settled = module.settled
    monkeypatch.setattr(module, "settled", lambda target: settled(target, patience=0.2))
    report = load(Fake(running=1))
    assert report["gauges"]["running"] == 1
    assert not report["ok"]


def test_a_server_that_cannot_answer_alone_is_an_error() -> None:
    with pytest.raises(KllmError, match="alone: http 500: not now"):
        load(Fake("broken"))


def test_the_key_and_the_request() -> None:
    fake = Fake()
    with fake.listening():
        bench_serve(ServeBench(url=fake.url, key="sk-x", name="mine", ignore_eos=True, **QUICK))
    assert "Authorization: Bearer sk-x" in fake.heads[0]
    body = fake.asked[0]
    assert body["model"] == "mine"
    assert body["temperature"] == 0
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_cases_are_ragged_and_the_same_for_a_seed() -> None:
    job = ServeBench(url="x", cases=30, min_tokens=4, max_tokens=160)
    cases = make_cases(job)
    assert cases == make_cases(job)
    assert cases != make_cases(ServeBench(url="x", cases=30, seed=1))
    lengths = [case.max_tokens for case in cases]
    assert 4 <= min(lengths) < 20
    assert 60 < max(lengths) <= 160
    assert all(case.prompt for case in cases)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "x"},
        {"url": None},
        {"streams": 0},
        {"seconds": 0.0},
        {"disconnect": 1.5},
        {"min_tokens": 10, "max_tokens": 5},
        {"endpoint": "embeddings"},
    ],
)
def test_wrong_loads_are_the_users_mistake(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        bench_serve(ServeBench(**{"url": "http://127.0.0.1:9", **changes}))


def test_gauges_are_added_up_over_models_and_absent_ones_are_none() -> None:
    async def two() -> dict[str, Any]:
        return await gauges(Target.parse(fake.url))

    fake = Fake(running=3)
    with fake.listening():
        assert asyncio.run(two()) == {"running": 3.0, "waiting": 0.0, "kv": None}


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such") as caught, OwnServer(str(tmp_path / "nowhere")):
        pass
    assert "the server" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "the server wants a key (--api-key KEY)"),
        (404, "no OpenAI server (GET /v1/models: 404)"),
        (503, "the model is still being loaded (try again)"),
    ],
)
def test_a_server_that_cannot_be_used_says_why(
    status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(*request: Any) -> tuple[int, bytes]:
        return status, b"{}"

    monkeypatch.setattr(bench_server, "fetch", answer)
    with pytest.raises(KllmError) as caught:
        bench_serve(ServeBench(url="http://h:80/v1"))
    assert str(caught.value) == f"http://h:80: {words}"


def test_nobody_there_is_one_line() -> None:
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(KllmError) as caught:
            bench_serve(ServeBench(url=f"http://{host}:9"))
        assert str(caught.value) == f"http://{host}:9: connection refused (is the server running?)"


def test_the_command_ends_with_1_when_something_is_wrong() -> None:
    fake = Fake("wrong", spared=12)
    with fake.listening():
        command = cli.build_serve()
        assert command(url=fake.url, streams=2, seconds=0.5, cases=4, max_tokens=20, as_json=True) == 1
