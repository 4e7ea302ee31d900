"""`kllm serve` as a process: start, drain on SIGTERM, a second signal, a dead engine, what it logs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from chat_support import chat_model
from support import KLLM, MAIN, Command, environment, kllm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

ENDLESS = {"prompt": "the cat", "max_tokens": 7000, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("serve") / "tiny")


class Running:
    """A server process; its stderr is collected while it runs."""

    def __init__(self, process: Command | subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert self.process.stdout is not None and self.process.stderr is not None
        self.url = ""
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.match(r"listening on (http://\S+); loading", line):
                self.url = found[1]
                break
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)  # type: ignore[arg-type]
        self._reader.start()

    def wait_ready(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if httpx.get(f"{self.url}/health", timeout=30).status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError("it does not get ready: " + "".join(self.lines))

    def end(self, timeout: float = 30) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    @property
    def log(self) -> str:
        return "".join(self.lines)


def serve(model: Path, *flags: str, code: str = MAIN, **env: str) -> Running:
    command = ["serve", model, "--port", "0", "--device", "cpu", "--kv-memory", "16MiB", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Running(Command(*command, cwd=model.parent, env={**environment(), **env}, code=code, **pipes))


@contextmanager
def until_ready(running: Running) -> Iterator[Running]:
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def served(model: Path, *flags: str, **env: str) -> AbstractContextManager[Running]:
    return until_ready(serve(model, *flags, **env))


def events(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


def test_it_loads_listens_and_leaves(tiny: Path) -> None:
    """In an interpreter of its own, as a user starts it."""
    process = subprocess.Popen(
        [*KLLM, "serve", str(tiny), "--port", "0", "--device", "cpu", "--kv-memory", "16MiB"],
        cwd=tiny.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    with until_ready(Running(process)) as running:
        assert running.url.startswith("http://127.0.0.1:")
        assert running.process.stdout.readline() == f"kllm serves on {running.url}\n"
        assert httpx.get(f"{running.url}/v1/models").json()["data"][0]["id"] == "tiny"
        running.process.send_signal(signal.SIGTERM)
        assert running.end() == 0
    for words in ("parameters", "KV 16 MiB", "ready after", "GET /v1/models 200"):
        assert words in running.log, words
    assert "Traceback" not in running.log and "warning" not in running.log


def test_a_stream_in_flight_is_finished(tiny: Path) -> None:
    with served(tiny) as running:
        body = {**ENDLESS, "max_tokens": 1500}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            stream = events(answer.iter_lines())
            chunks = [next(stream)]
            running.process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 10
            while time.monotonic() < end:
                try:
                    assert httpx.get(f"{running.url}/health").status_code == 503
                except httpx.ConnectError:
                    break
                except httpx.TransportError:
                    pass  # connected just before the port closed, never accepted
                time.sleep(0.02)
            else:
                raise AssertionError("the port stays open")
            chunks += list(stream)
        assert chunks[-1] == "[DONE]"
        parts = [json.loads(chunk) for chunk in chunks[:-1]]
        assert not any("error" in part for part in parts)
        reasons = [c["finish_reason"] for part in parts for c in part["choices"] if c["finish_reason"]]
        assert reasons == ["length"]
        assert running.end() == 0
    assert "finishing 1 request, at most 30 s; Ctrl-C again stops now" in running.log


def test_after_the_drain_streams_end_with_an_error(tiny: Path) -> None:
    with served(tiny, "--drain", "300ms") as running:
        with httpx.stream("POST", f"{running.url}/v1/completions", json=ENDLESS, timeout=60) as answer:
            stream = events(answer.iter_lines())
            next(stream)
            running.process.send_signal(signal.SIGTERM)
            chunks = list(stream)
        assert chunks[-1] == "[DONE]"
        assert json.loads(chunks[-2])["error"]["code"] == "draining"
        assert running.end() == 0
    assert "Traceback" not in running.log


def test_a_second_signal_ends_it_at_once(tiny: Path) -> None:
    with (
        served(tiny) as running,
        httpx.stream("POST", f"{running.url}/v1/completions", json=ENDLESS, timeout=60) as answer,
    ):
        stream = events(answer.iter_lines())  # kept: when it goes, the connection goes
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        assert running.end(5) == 128 + signal.SIGTERM


def test_keys_and_prompts_stay_out_of_the_log(tiny: Path) -> None:
    with served(tiny, "--api-key", "sk-flag-secret", KLLM_API_KEY="sk-env-secret") as running:
        for key in ("sk-flag-secret", "sk-env-secret", "sk-wrong-secret"):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": "my private thoughts", "max_tokens": 1}
            answer = httpx.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=30)
            assert answer.status_code == (401 if "wrong" in key else 200)
            assert "secret" not in answer.text
        running.process.send_signal(signal.SIGINT)
        assert running.end() == 0
    assert running.log.count("POST /v1/completions") == 3
    assert "secret" not in running.log and "private" not in running.log


def test_an_open_door_is_announced(tiny: Path) -> None:
    with served(tiny, "--host", "0.0.0.0") as running:
        pass
    assert "warning: whoever reaches" in running.log
    with served(tiny, "--host", "0.0.0.0", "--api-key", "k") as running:
        pass
    assert "warning" not in running.log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope", "--port", "0"], "nope: no such"),
        (["{tiny}", "--port", "0", "--adapter", "x=nope"], "flag --adapter nope: no such adapter"),
        (["{tiny}", "--port", "0", "--draft", "nope"], "flag --draft nope: no such"),
        (["{tiny}", "--port", "0", "--device", "nope"], "flag --device: unknown device 'nope'"),
        (["{tiny}", "--port", "0", "--kv-memory", "10"], "flag --kv-memory: 10 bytes are too few, at least "),
        (["{tiny}", "--drain", "inf"], "flag --drain: expected a time like 90s, 30m or 1h30m, got 'inf'"),
        (["{tiny}", "--queue-timeout", "nan"], "flag --queue-timeout: expected a time"),
        (["{tiny}", "--rope-scaling", "yarn", "--factor", "inf"], "must be a number from 1 to 1024, got inf"),
        (["{tiny}", "--rope-scaling", "yarn"], "belong together"),
        (["{tiny}", "--port", "70000"], "flag --port: must be at most 65535, got '70000'"),
    ],
)
def test_what_cannot_be_served_is_one_line(tiny: Path, arguments: list[str], words: str) -> None:
    filled = [a.replace("{tiny}", str(tiny)) for a in arguments]
    done = kllm("serve", *filled, cwd=tiny.parent, check=False, timeout=60)
    assert done.returncode == 2 and not done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in done.stderr


def test_a_signal_while_it_starts(tiny: Path) -> None:
    running = serve(tiny)  # its port is open, the model hardly there
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0
    assert "Traceback" not in running.log


BROKEN = f"""
from kllm.engine.engine import Engine
def step(self):
    raise RuntimeError("boom")
Engine.step = step
{MAIN}
"""


@pytest.mark.parametrize("leaves", [True, False])
def test_a_dead_engine(tiny: Path, leaves: bool) -> None:
    flags = ["--exit-on-error"] if leaves else []
    with until_ready(serve(tiny, *flags, code=BROKEN)) as running:
        body = {"prompt": "x", "max_tokens": 2}
        answers = [httpx.post(f"{running.url}/v1/completions", json=body, timeout=30) for _ in range(2)]
        assert answers[0].status_code == 500 and answers[0].headers["x-should-retry"] == "false"
        assert answers[1].status_code in (500, 503) and "boom" not in answers[0].text + answers[1].text
        if leaves:
            assert running.end() == 1
        else:
            health = httpx.get(f"{running.url}/health")
            assert health.status_code == 503 and health.json()["status"] == "engine_dead"
            running.process.send_signal(signal.SIGTERM)
            assert running.end() == 0
