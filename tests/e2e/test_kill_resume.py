"""kill -9 at any moment, the same command again: the same bits, and every line of the metrics once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import TINY, Command, kllm

TIMELESS = ("step", "train/loss", "opt/lr", "opt/grad_norm", "val/loss", "val/bpb", "train/tokens")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tokenizer")
    kllm("tokenizer", "train", "--vocab-size", "500", "--max-bytes", "300KB", "--out", "tok", "-q", cwd=where)
    return next(where.glob("tok/*/final"))


def command(out: Path, tokenizer: Path, steps: int, save_every: int) -> list[str]:
    return [
        "pretrain", "--tokenizer", str(tokenizer), "--out", str(out), *TINY,
        "--steps", str(steps), "--batch-tokens", "512", "--seq-len", "128", "--save-every", str(save_every),
        "--train.eval_every", "12", "--train.eval_tokens", "2k", "--train.log_every", "5",
        "--dataset.max_bytes", "300KB", "--train.micro_batch_tokens", "256", "--train.compile", "off", "-q",
    ]  # fmt: skip


def fingerprint(run: Path) -> tuple[str, list[dict]]:
    weights = next(run.glob("*-pretrain/final/model.safetensors")).read_bytes()
    rows = [json.loads(line) for line in next(run.glob("*-pretrain/metrics.jsonl")).read_text().splitlines()]
    return hashlib.sha256(weights).hexdigest(), [{k: r[k] for k in TIMELESS if k in r} for r in rows]


def newest(run: Path) -> int:
    """Step of the newest whole checkpoint, 0 without one."""
    return max(
        (int(p.parent.name[5:]) for p in run.glob("*-pretrain/checkpoints/step-*/COMPLETE")), default=0
    )


def kill_in_training(args: list[str], run: Path, pause: float) -> bool:
    """Kills the process group `pause` seconds after it made a new checkpoint; False if it had ended."""
    before = newest(run)
    process = Command(*args, cwd=run.parent, stderr=subprocess.PIPE, session=True)
    while process.poll() is None and newest(run) <= before:
        time.sleep(0.002)
    try:
        process.wait(pause)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    assert process.returncode == 0, process.stderr.read()
    return False


def check(tmp_path: Path, tokenizer: Path, steps: int, save_every: int, pauses: list[float]) -> None:
    whole = command(tmp_path / "whole", tokenizer, steps, save_every)
    cut = command(tmp_path / "cut", tokenizer, steps, save_every)
    kllm(*whole, cwd=tmp_path, timeout=600)
    killed = sum(kill_in_training(cut, tmp_path / "cut", pause) for pause in pauses)
    assert killed == len(pauses)
    kllm(*cut, cwd=tmp_path, timeout=600)
    expected, rows = fingerprint(tmp_path / "whole")
    got, got_rows = fingerprint(tmp_path / "cut")
    assert got_rows == rows
    assert [r["step"] for r in rows if "train/loss" in r] == sorted({1, *range(5, steps + 1, 5), steps})
    assert got == expected
    leftovers = [p for p in (tmp_path / "cut").rglob("*") if ".tmp-" in p.name or ".old-" in p.name]
    assert not leftovers


def test_two_kills(tmp_path: Path, tokenizer: Path) -> None:
    check(tmp_path, tokenizer, steps=60, save_every=5, pauses=[0.01, 0.09])


@pytest.mark.slow
def test_twenty_kills_of_a_200_step_run(tmp_path: Path, tokenizer: Path) -> None:
    """Saves every third step, so that kills at random moments fall into saves, steps and evaluations."""
    rng = random.Random(1)
    # two saves apart at most: with longer pauses a fast machine reaches step 200 before the twentieth kill
    check(tmp_path, tokenizer, steps=200, save_every=3, pauses=[rng.uniform(0, 0.2) for _ in range(20)])


def interrupt(args: list[str], run: Path, after: float) -> None:
    """Ctrl-C, as a terminal sends it to the whole group, `after` seconds after the first loss."""
    process = Command(*args, cwd=run.parent, stderr=subprocess.PIPE, session=True)
    log = run / "01-pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (log.exists() and '"train/loss"' in log.read_text()):
        time.sleep(0.05)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    err = process.stderr.read()
    assert process.returncode == 130, err
    assert "saved" in err
    assert "Traceback" not in err
    assert list((run / "01-pretrain" / "checkpoints").glob("step-*/COMPLETE"))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, tokenizer: Path) -> None:
    interrupt(command(tmp_path / "run", tokenizer, 100_000, 0), tmp_path / "run", 0)


@pytest.mark.slow
def test_ctrl_c_and_resume_with_compiled_blocks(tmp_path: Path, tokenizer: Path) -> None:
    """The compiler's own processes are in the group that the terminal interrupts."""
    args = command(tmp_path / "run", tokenizer, 100_000, 10)
    args[args.index("off")] = "on"
    interrupt(args, tmp_path / "run", 0.5)
    assert kill_in_training(args, tmp_path / "run", 0.1), "it goes on and saves again"


@pytest.mark.slow
def test_ctrl_c_while_it_compiles(tmp_path: Path, tokenizer: Path) -> None:
    args = command(tmp_path / "run", tokenizer, 100_000, 0)
    args[args.index("off")] = "on"
    process = Command(*args, cwd=tmp_path, stderr=subprocess.PIPE, session=True)
    log = tmp_path / "run" / "01-pretrain" / "log.txt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and "folder" in log.read_text()):
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(120)
    err = process.stderr.read()
    assert process.returncode == 130, err
    assert "Traceback" not in err
