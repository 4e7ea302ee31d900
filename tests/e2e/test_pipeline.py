"""A recipe from text to an evaluated model, with the real work in every stage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kllm.config.load import load_recipe
from kllm.observe.sinks import read_rows
from kllm.run.pipeline import run_recipe, run_stage
from kllm.run.rundir import RunDir


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models of this size are fastest on one thread, and results depend on their number."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("kllm.observe.plots.available", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TINY = """\
name: tiny
stages:
  - {stage: tokenizer, vocab_size: 400, max_bytes: 64KiB}
  - stage: pretrain
    model: {preset: k-tiny, hidden_size: 64, num_hidden_layers: 2, intermediate_size: 128}
    dataset: {seq_len: 128, max_bytes: 64KiB, val_fraction: 0.05}
    train: {steps: 60, batch_tokens: 512, micro_batch_tokens: 256, save_every: 7, eval_every: 20,
            eval_tokens: 512, log_every: 1, keep_last: 2, compile: "off"}
"""


def test_a_shipped_recipe_runs_through_at_smoke_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe("quickstart")
    assert run_recipe(loaded, smoke=True, in_process=True, reporter_mode="plain") == 0
    out = tmp_path / "runs" / "quickstart-smoke"
    said = capsys.readouterr()
    assert "kllm chat runs/quickstart-smoke" in said.out and "builtin:world: exact answers" in said.out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["quickstart-smoke"]
    run = RunDir(out)
    assert all(run.status(stage["dir"])["state"] == "done" for stage in run.stages())
    trained = [stage["dir"] for stage in run.stages() if stage["kind"] in ("pretrain", "sft")]
    for name in trained:
        final = out / name / "final"
        for file in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "README.md",
        ):
            assert (final / file).stat().st_size > 0, file
        rows = read_rows(out / name / "metrics.jsonl")
        steps = [row["step"] for row in rows if "train/loss" in row]
        assert steps == [1, 2, 3, 4, 5, 6]
        assert any("val/bpb" in row for row in rows)
    assert "exact answers" in (out / "report.md").read_text(encoding="utf-8")
    assert run_recipe(loaded, smoke=True, in_process=True, reporter_mode="plain") == 0
    assert "finished already" in capsys.readouterr().out


def test_a_stopped_training_continues_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    loaded = load_recipe(tmp_path / "tiny.yaml")
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert run_recipe(loaded, out=calm, in_process=True, reporter_mode="quiet") == 0
    assert run_stage(loaded, "tokenizer", out=rough, reporter_mode="quiet") == 0
    metrics = rough / "02-pretrain" / "metrics.jsonl"
    command = [sys.executable, "-m", "kllm", "pretrain", "--recipe", "tiny.yaml", "--out", "rough", "-q"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(read_rows(metrics)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err.decode()
    assert b"Traceback" not in err and b"continues" in err
    assert RunDir(rough).status("02-pretrain")["state"] == "interrupted"
    assert run_stage(loaded, "pretrain", out=rough, reporter_mode="quiet") == 0
    assert losses(rough) == losses(calm)
    assert [step for step, _ in losses(rough)] == list(range(1, 61))
    assert weights(rough) == weights(calm)
    assert RunDir(rough).status("02-pretrain")["attempts"] == 2


def weights(run: Path) -> bytes:
    return (run / "02-pretrain" / "final" / "model.safetensors").read_bytes()


def losses(run: Path) -> list[tuple[int, float]]:
    rows = read_rows(run / "02-pretrain" / "metrics.jsonl")
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def test_the_command_line_runs_a_recipe_in_processes(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "kllm", "run", "tiny.yaml", "--json", "--set", "pretrain.train.steps=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    events = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [e["step"] for e in events if e["event"] == "progress"]
    assert steps[-1] == 2
    assert events[-1]["event"] == "done" and "kllm chat runs/tiny" in events[-1]["text"]
