"""The server under load: every ragged stream whole and right, fair, and nothing left over afterwards."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serve_client import Server, completion_body, eventually, http_post
from serve_client import server as shared_server
from serve_model import model_dir

from kllm.export.hf import save_model
from kllm.model.presets import PRESETS
from kllm.model.transformer import Transformer
from kllm.run.bench_client import Manners, Target, read_stream
from kllm.run.bench_serve import ServeBench, bench_serve
from kllm.tokenizer.tokenizer import Tokenizer

# A client that dies without a word: reads a little of a long stream, says so, and waits to be killed.
DOOMED = """
import socket, sys
host, port, request = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
connection = socket.create_connection((host, port), timeout=60)
connection.sendall(request)
seen = b""
while seen.count(b"data:") < 3:
    seen += connection.recv(4096)
print("reading", flush=True)
while connection.recv(4096):
    pass
print("ended", flush=True)
"""
LONG = 1900


@functools.cache
def server() -> Server:
    return shared_server()


def check(report: dict[str, Any], streams: int, pause: float = 0.0) -> None:
    """Spec 5.4 and 12.4, without the speed.

    `pause`: seconds that the system may keep the server waiting in a run too short to average over them.
    """
    load = report["load"]
    counts = load["streams"]
    assert report["ok"], report["failures"]
    assert not load["errors"]
    assert counts["complete"] >= 2 * streams
    assert counts["complete"] + counts["left"] == counts["all"]
    assert counts["left"] > 0 and load["stalled_readers"] > 0, "the readers were too well-behaved"
    assert load["gap_s"]["p99"] < max(20 * load["gap_s"]["p50"], pause), load["gap_s"]
    assert load["jain"]["mean"] > 0.9
    assert report["gauges"] | {"seconds": 0} == {
        "running": 0, "waiting": 0, "kv": 0, "seconds": 0, "idle": True,
    }  # fmt: skip


@pytest.mark.parametrize("endpoint", ["completions", pytest.param("chat", marks=pytest.mark.slow)])
def test_every_ragged_stream_is_whole_and_what_it_is_alone(endpoint: str) -> None:
    job = ServeBench(
        url=server().url, endpoint=endpoint, streams=16, seconds=2.5, cases=12, max_tokens=120, disconnect=0.15,
        stall=0.1, stall_seconds=1.0,
    )  # fmt: skip
    check(bench_serve(job), 16, pause=0.5)


def test_a_short_answer_beside_a_long_one_ends_first() -> None:
    async def both() -> tuple[Any, Any]:
        target = Target.parse(server().url)

        def asked(tokens: int) -> dict[str, Any]:
            return completion_body(max_tokens=tokens, ignore_eos=True, stream=True)

        long = asyncio.create_task(read_stream(target, "/v1/completions", asked(1200)))
        while not server_runs(1):
            await asyncio.sleep(0.01)
        short = await read_stream(target, "/v1/completions", asked(4))
        return short, await long

    short, long = asyncio.run(both())
    assert short.error is None and long.error is None
    assert short.finish_reason == long.finish_reason == "length"
    assert short.ended < long.ended
    assert short.ended - short.started < 0.5 * (long.ended - long.started)
    assert long.text.startswith(short.text)


def server_runs(count: int) -> bool:
    return server().metric("num_requests_running") >= count


def doomed_client(rest: dict[str, Any]) -> subprocess.Popen[str]:
    """A client process in the middle of a stream of LONG tokens."""
    body = completion_body(max_tokens=LONG, ignore_eos=True, stream=True, **rest)
    request = http_post("/v1/completions", json.dumps(body).encode()).decode()
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", DOOMED, "127.0.0.1", str(server().port), request],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "reading\n"
    return child


def killed(child: subprocess.Popen[str]) -> bool:
    """Kills it; False if its stream had already ended."""
    child.kill()
    child.wait()
    assert child.stdout is not None
    with child.stdout:
        return "ended" not in child.stdout.read()


def test_the_row_of_a_killed_client_is_free_within_a_step() -> None:
    assert eventually(server().idle)
    for attempt in range(3):
        before = server().metric("request_success_total", finished_reason="cancelled")
        tokens = server().metric("generation_tokens_total")
        child = doomed_client({"prompt": f"number {attempt}"})
        assert server_runs(1)
        assert killed(child)
        assert eventually(server().idle, 2), "the row is still taken"
        assert server().metric("request_success_total", finished_reason="cancelled") == before + 1
        assert server().metric("generation_tokens_total") - tokens < LONG


@pytest.mark.slow
def test_64_streams_for_a_minute_with_clients_killed_at_random() -> None:
    url, pid = server().url, server().process.pid  # started here: it dies with the thread that starts it
    dice, over, kills = random.Random(0), threading.Event(), [0]

    def kill_clients() -> None:
        while not over.is_set():
            child = doomed_client({"prompt": f"number {dice.randrange(10**6)}"})
            time.sleep(dice.uniform(0, 0.5))
            kills[0] += killed(child)

    killer = threading.Thread(target=kill_clients)
    killer.start()
    try:
        job = ServeBench(url=url, pid=pid, streams=64, seconds=60)
        report = bench_serve(job)
    finally:
        over.set()
        killer.join()
    assert kills[0] > 5
    assert eventually(server().idle, 5)
    # a killer may hold its row at the moment when the bench looks
    report["gauges"] |= {"running": 0, "waiting": 0, "kv": 0, "idle": True}
    report["ok"] = not report["failures"]
    check(report, 64)
    # a model that costs next to nothing: what is left is the work for each event of each stream
    assert report["ratio_cpu"] >= 1.5


@pytest.mark.slow
def test_64_streams_of_a_small_model_give_4_times_the_tokens_of_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_dir())
    model = Transformer(PRESETS["k-small"].with_(vocab_size=tokenizer.vocab_size))
    model.init_weights(0)
    save_model(model, tokenizer, tmp_path / "small")
    small = Server(models=(tmp_path / "small",))
    try:
        job = ServeBench(
            url=small.url, pid=small.process.pid, streams=64, seconds=20, max_tokens=80, ignore_eos=True
        )
        report = bench_serve(job)
    finally:
        small.kill()
    check(report, 64)
    # processor seconds: what else runs on this machine does not count
    assert report["ratio_cpu"] >= 4, report["ratio_cpu"]


def test_readers_that_never_read_do_not_hold_others_up() -> None:
    """Readers who take nothing: the others' streams go on at full speed."""

    async def work() -> list[Any]:
        target = Target.parse(server().url)
        body = completion_body(max_tokens=400, ignore_eos=True, stream=True)
        lazy = Manners(stall_after=1, stall=3.0)
        sleepers = [asyncio.create_task(read_stream(target, "/v1/completions", body, lazy)) for _ in range(4)]
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        awake = await asyncio.gather(*(read_stream(target, "/v1/completions", body) for _ in range(4)))
        assert all(out.error is None for out in awake)
        assert time.perf_counter() - began < 60
        return [*awake, *await asyncio.gather(*sleepers)]

    outs = asyncio.run(work())
    assert {out.text for out in outs} == {outs[0].text}
    assert {out.error for out in outs} == {None}
