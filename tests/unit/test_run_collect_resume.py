"""Killed at any moment, cut at any byte: the same file comes out, and no answer is paid for twice."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from collect_fake_server import FakeTeacher, question, said
from collect_support import CITIES, job_of, prompts_file, rows_of, run, tell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kllm.config.load import make_recipe
from kllm.errors import Interrupted, KllmError, UserError
from kllm.observe.console import QuietReporter
from kllm.run.blackbox import collected
from kllm.run.collect import _Collector, collect
from kllm.run.collect_filter import Rules
from kllm.run.collect_journal import Journal, Reply
from kllm.run.context import StageContext


def mixed(body: dict[str, Any], before: int) -> Any:
    """Answers of which some are dropped, by the question and the seed alone."""
    city = question(body).split()[2]
    if (CITIES.index(city) + body["seed"]) % 3 == 0:
        return said("I'm sorry, I cannot help.")
    return said(
        tell(body)["choices"][0]["message"]["content"],
        reasoning_content="towers? " + city * (body["seed"] % 5),
    )


OPTIONS: dict[str, Any] = {"model": "m", "samples": 3, "parallel": 3, "plain_ratio": 0.5}


def test_killed_at_any_moment_it_ends_with_the_same_file(tmp_path: Path) -> None:
    prompts_file(tmp_path, 12)
    with FakeTeacher(mixed).listening() as server:
        run(tmp_path, server.url, **OPTIONS)
        whole, needed = (tmp_path / "out.jsonl").read_bytes(), len(server.asked)
    killed = tmp_path / "killed"
    killed.mkdir()
    prompts_file(killed, 12)
    with FakeTeacher(mixed, delay=0.005).listening() as server:
        for stop in (2, 5, 6, 11, 15):
            child = os.fork()
            if not child:
                try:
                    collect(job_of(killed, server.url, **OPTIONS), QuietReporter())
                finally:
                    os._exit(0)
            while len(server.asked) < stop and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.0005)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert not (killed / "out.jsonl").exists(), "it is written at the end"
        report = run(killed, server.url, **{**OPTIONS, "parallel": 1})
        lost = len(server.asked) - needed
    assert (killed / "out.jsonl").read_bytes() == whole
    assert 0 < report.requests < needed and lost <= 5 * 3, "at most the questions under way are asked again"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    folder = tmp_path_factory.mktemp("finished")
    prompts_file(folder, 8)
    with FakeTeacher(mixed).listening() as server:
        run(folder, server.url, **OPTIONS)
    return folder, (folder / "out.jsonl").read_bytes(), (folder / "out.jsonl.answers").read_bytes()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_at_any_byte_and_in_any_order_it_ends_with_the_same_file(
    finished: tuple[Path, bytes, bytes], data: st.DataObject
) -> None:
    folder, whole, journal = finished
    lines = journal.splitlines(keepends=True)
    random.Random(data.draw(st.integers(0, 99))).shuffle(lines)
    there = b"".join(lines)[: data.draw(st.integers(0, len(journal)))]
    (folder / "out.jsonl.answers").write_bytes(there)
    (folder / "out.jsonl").unlink(missing_ok=True)
    with FakeTeacher(mixed).listening() as server:
        report = run(folder, server.url, **OPTIONS)
    assert (folder / "out.jsonl").read_bytes() == whole
    assert report.requests == len(lines) - there.count(b"\n")
    assert sorted(rows_of(folder / "out.jsonl.answers"), key=str) == sorted(map(json.loads, lines), key=str)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_came_and_says_how_to_go_on(tmp_path: Path, signum: int, code: int) -> None:
    """Whatever handler stands, and while nothing else happens; the handler stands again afterwards."""
    prompts_file(tmp_path, 12)

    def answer(body: dict[str, Any], before: int) -> Any:
        if len(server.asked) == 4:
            os.kill(os.getpid(), signum)
            return "silence"
        return tell(body)

    def raising(signum: int, frame: Any) -> None:
        raise AssertionError("in whatever callback runs just now")

    old = signal.signal(signum, raising)
    try:
        with FakeTeacher(answer).listening() as server:
            with pytest.raises(Interrupted, match="the same command goes on") as error:
                run(tmp_path, server.url, parallel=1)
            assert error.value.exit_code == code and signal.getsignal(signum) is raising
            assert run(tmp_path, server.url).requests == 12 - 3
    finally:
        signal.signal(signum, old)


def test_a_signal_ends_the_writing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts_file(tmp_path, 12)
    monkeypatch.setattr("kllm.run.collect._BREATH", 1)
    rows, sent = _Collector._rows, []

    def stopped(self: _Collector, *args: Any) -> Any:
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return rows(self, *args)

    with FakeTeacher(tell).listening() as server:
        run(tmp_path, server.url)
        before = (tmp_path / "out.jsonl").read_bytes()
        monkeypatch.setattr(_Collector, "_rows", stopped)
        with pytest.raises(Interrupted):
            run(tmp_path, server.url, rules=Rules(require=("Rome",)))
    assert (tmp_path / "out.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 3


def test_two_at_one_file_are_noticed(tmp_path: Path) -> None:
    prompts_file(tmp_path)
    with Journal(tmp_path / "out.jsonl.answers"), pytest.raises(KllmError, match="another process collects"):
        run(tmp_path, "http://127.0.0.1:9", model="m")


@pytest.mark.parametrize("content", [b"my notes\nof the day\n", b"my notes", b'{"text": "a"}\n{"text": "b"'])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.answers"
    file.write_bytes(content)
    with pytest.raises(UserError, match="no file of collected answers"), Journal(file):
        pass
    assert file.read_bytes() == content


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    replies = [
        Reply({"content": "héllo 你好 \ud83d", "reasoning_content": "a\nb"}, "stop", 3, 4),
        Reply({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "tool_calls"),
    ]
    with Journal(tmp_path / "deep" / "a.answers") as journal:
        for number, reply in enumerate(replies):
            journal.add("id", number, reply)
            assert journal.get("id", number) == reply
    with (tmp_path / "deep" / "a.answers").open("ab") as file:
        file.write(b"\0" * 50 + b'\n{"id": "id", "sample": 0, "message": {}}\n{"id": "id", "samp')
    with Journal(tmp_path / "deep" / "a.answers") as journal:
        assert [journal.get("id", n) for n in (0, 1, 2)] == [*replies, None] and journal.foreign == 2
        journal.add("id", 2, replies[0])
        assert journal.get("id", 2) == replies[0] and len(journal) == 3


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    prompts_file(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with FakeTeacher(tell).listening() as server, pytest.raises(KllmError, match="no space left"):
        run(tmp_path, server.url)


def test_other_settings_ask_anew_and_old_answers_stay(tmp_path: Path) -> None:
    prompts_file(tmp_path, 3)
    with FakeTeacher(tell).listening() as server:
        assert run(tmp_path, server.url, model="a").requests == 3
        for changes in ({"model": "b"}, {"model": "a", "system": "Be brief."}, {"model": "a", "seed": 1}):
            assert run(tmp_path, server.url, **changes).requests == 3
        assert run(tmp_path, server.url, model="a", rules=Rules(min_chars=5)).requests == 0
    assert run(tmp_path, "http://127.0.0.1:9", model="a").requests == 0, "the address may change or be gone"


def test_a_stage_asks_until_it_is_done_and_then_nobody(tmp_path: Path) -> None:
    """What failed stays out: a training that goes on needs the data it began with, and no server."""
    prompts = str(prompts_file(tmp_path))
    reachable = [False]

    def answer(body: dict[str, Any], before: int) -> Any:
        return tell(body) if reachable[0] or "Rome" not in question(body) else (400, "content policy")

    def collect_into(folder: str, url: str, *more: str) -> Path:
        words = [f"from_endpoint={url}", f"prompts={prompts}", "collect.parallel=1", "model.path=m", *more]
        recipe = make_recipe("distill", words).recipe
        ctx = StageContext(recipe, recipe.stages[0], tmp_path / folder, tmp_path, reporter=QuietReporter())
        return Path(collected(ctx, recipe.stages[0], main=True).data[0].path)  # type: ignore[arg-type]

    with FakeTeacher(answer).listening() as server:
        file = collect_into("stage", server.url)
        whole, reachable[0] = file.read_bytes(), True
        assert len(rows_of(file)) == 5 and len(server.asked) == 6
        assert collect_into("stage", server.url).read_bytes() == whole and len(server.asked) == 6
        assert len(rows_of(collect_into("stage", server.url, "collect.system_prompt=Hm"))) == 6, "another job"
        collect_into("other", server.url)
    assert len(rows_of(collect_into("other", server.url))) == 6, "the server is gone"
