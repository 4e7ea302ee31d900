"""Stages in processes of their own: exit codes kept, signals passed on, orphans impossible."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_support import FakeWork, fake_processes, load, write_recipe

from kllm.run import launch
from kllm.run.pipeline import run_recipe
from kllm.run.rundir import RunDir, alive

RESULT = f"""
if ctx.name == "tokenizer":
    ctx.final_dir.mkdir(parents=True)
    (ctx.final_dir / "tokenizer.json").write_text({json.dumps(json.dumps({"model": {"vocab": {"a": 0}}}))})
    return {{"result": {{}}}}
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kllm.observe.plots.available", lambda: False)


def run(folder: Path, **options: object) -> int:
    return run_recipe(load(folder), reporter_mode="quiet", **options)  # type: ignore[arg-type]


def test_a_stage_runs_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_processes(monkeypatch, tmp_path, RESULT)
    assert run(tmp_path, until="tokenizer") == 0
    status = RunDir(tmp_path / "runs" / "small").status("01-tokenizer")
    assert status["state"] == "done" and status["pid"] != os.getpid()


@pytest.mark.parametrize(
    ("body", "code", "state", "said"),
    [
        ("from kllm.errors import UserError; raise UserError('wrong dialect')", 2, "failed", "wrong dialect"),
        ("raise ValueError('a bug')", 1, "failed", "ValueError: a bug"),
        ("from kllm.errors import Interrupted; raise Interrupted(15)", 143, "interrupted", "interrupted"),
        ("print('last words'); os.kill(os.getpid(), 9)", 1, "failed", "killed by signal 9 (SIGKILL)"),
        ("os._exit(7)", 7, "failed", "exit code 7"),
    ],
)
def test_how_a_stage_ended_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    body: str,
    code: int,
    state: str,
    said: str,
) -> None:
    fake_processes(monkeypatch, tmp_path, body)
    assert run(tmp_path, until="tokenizer") == code
    status = RunDir(tmp_path / "runs" / "small").status("01-tokenizer")
    assert (status["state"], status["exit_code"]) == (state, code) and said in status["error"]
    err = capfd.readouterr().err
    assert f"stage tokenizer {state}" in err and "the same command continues" in err
    assert ("Traceback" in err) == ("a bug" in body)


SLEEP = """
import sys, time
(ctx.stage_dir / "started").write_text(str(os.getpid()))
ctx.reporter.message("working")
time.sleep(60)
"""


def start(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """`kllm run` in a process of its own, once its stage is at work, and the stage's process id."""
    recipe = write_recipe(folder)
    command = [
        sys.executable,
        "-m",
        "kllm",
        "run",
        "--recipe",
        str(recipe),
        "--until",
        "tokenizer",
        "--quiet",
    ]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE)
    started = folder / "runs" / "small" / "01-tokenizer" / "started"
    deadline = time.monotonic() + 30
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process, int(started.read_text())


def gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_stage_and_its_exit_code_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, code: int
) -> None:
    fake_processes(monkeypatch, tmp_path, SLEEP)
    process, child = start(tmp_path)
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert b"Traceback" not in err and b"interrupted" in err
    assert gone(child)
    assert RunDir(tmp_path / "runs" / "small").status("01-tokenizer")["state"] == "interrupted"


def test_kill_9_takes_the_stage_along_and_the_next_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_processes(monkeypatch, tmp_path, SLEEP)
    process, child = start(tmp_path)
    process.kill()
    process.communicate()
    assert gone(child)
    run_dir = RunDir(tmp_path / "runs" / "small")
    assert run_dir.status("01-tokenizer")["state"] == "interrupted"
    work = FakeWork()
    monkeypatch.setattr("kllm.run.work.do_work", work)
    assert run(tmp_path, until="tokenizer", in_process=True) == 0
    assert work.ran == ["tokenizer"]
    assert run_dir.status("01-tokenizer")["attempts"] == 2


def test_a_run_stays_locked_while_its_stage_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_processes(monkeypatch, tmp_path, SLEEP)
    process, _ = start(tmp_path)
    try:
        command = [sys.executable, "-m", "kllm", "run", "--recipe", str(tmp_path / "recipe.yaml")]
        second = subprocess.run(command, cwd=tmp_path, capture_output=True)
        assert second.returncode == 1
        assert f"in use by process {process.pid}".encode() in second.stderr
        assert len(second.stderr.splitlines()) == 1
    finally:
        process.terminate()
        process.communicate()


def test_a_finished_run_answers_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kllm.run.work.do_work", FakeWork())
    assert run(tmp_path, in_process=True) == 0
    code = (
        "import sys\n"
        "from kllm.cli.app import main\n"
        "try: main(['run', '--recipe', 'recipe.yaml'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)\n"
    )
    began = time.process_time(), os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    spent = os.times().children_user - began[1]
    assert done.returncode == 0, done.stderr.decode()
    assert b"finished already" in done.stdout
    assert spent < 2.0


def test_a_distributed_stage_has_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    body = """
    (ctx.run_dir / f"rank{ctx.rank}").write_text(f"{ctx.world} {type(ctx.reporter).__name__}")
    return {"result": {}}
    """
    fake_processes(monkeypatch, tmp_path, body)
    work = FakeWork()
    monkeypatch.setattr("kllm.run.work.do_work", work)
    loaded = load(tmp_path, "nproc=2")
    out = tmp_path / "run"
    assert run_recipe(loaded, out=out, only="tokenizer", in_process=True, reporter_mode="quiet") == 0
    assert run_recipe(loaded, out=out, only="pretrain", in_process=True, reporter_mode="quiet") == 0
    assert work.ran == ["tokenizer"]
    assert [(out / f"rank{r}").read_text().split()[0] for r in (0, 1)] == ["2", "2"]
    assert RunDir(out).status("02-pretrain")["state"] == "done"


def test_exits_are_described() -> None:
    assert launch.describe_exit(3) == "exit code 3"
    assert "SIGKILL" in launch.describe_exit(-9) and "memory" in launch.describe_exit(-9)
    assert "SIGSEGV" in launch.describe_exit(-11)
