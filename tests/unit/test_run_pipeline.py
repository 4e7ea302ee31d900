"""Stages in order: skipped, continued, run again, refused, with the reason said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_support import RECIPE, FakeWork, load

from kllm.errors import Interrupted, KllmError, UserError
from kllm.run.context import StageContext
from kllm.run.pipeline import run_recipe, run_stage
from kllm.run.rundir import RunDir, read_json

ALL = ["tokenizer", "pretrain", "sft", "eval"]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWork:
    """The made-up work, in this process, without plots; the working directory is `tmp_path`."""
    fake = FakeWork()
    monkeypatch.setattr("kllm.run.work.do_work", fake)
    monkeypatch.setattr("kllm.observe.plots.available", lambda: False)
    monkeypatch.chdir(tmp_path)
    return fake


def run(folder: Path, *overrides: str, **options: Any) -> int:
    return run_recipe(load(folder, *overrides), in_process=True, reporter_mode="plain", **options)


def stage(folder: Path, name: str, *overrides: str, **options: Any) -> int:
    return run_stage(load(folder, *overrides), name, reporter_mode="plain", **options)


def test_stages_run_in_order_and_take_what_comes_before(work: FakeWork, tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert work.ran == ALL
    given = [{k: v.parent.name for k, v in ctx.inputs.items()} for ctx in work.contexts]
    assert given == [
        {},
        {"tokenizer": "01-tokenizer"},
        {"model": "02-pretrain", "tokenizer": "02-pretrain"},
        {"model": "03-sft"},
    ]
    out = tmp_path / "runs" / "small"
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "finished"] * 4
    status = RunDir(out).status("02-pretrain")
    assert status["state"] == "done" and status["exit_code"] == 0 and status["attempts"] == 1
    assert status["outputs"]["final"] and status["inputs"]["tokenizer"]["from"] == "stage:tokenizer"
    for name in ("report.md", "report.html", "recipe.resolved.yaml", "run.json"):
        assert (out / name).stat().st_size > 0
    card = (out / "02-pretrain" / "final" / "README.md").read_text(encoding="utf-8")
    assert "1,000" in card and "kllm run --recipe" in card and str(tmp_path / "corpus.jsonl") in card


def test_a_finished_run_does_nothing_again(
    work: FakeWork,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path)
    work.ran.clear()
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert work.ran == []
    out = capsys.readouterr().out
    assert "finished already" in out and "kllm chat runs/small" in out


def test_a_changed_stage_and_what_follows_run_again_with_the_reason(
    work: FakeWork,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path)
    work.ran.clear()
    capsys.readouterr()
    assert run(tmp_path, "pretrain.optim.lr=5e-3") == 0
    assert work.ran == ["pretrain", "sft", "eval"]
    err = capsys.readouterr().err
    assert "tokenizer skipped: done, unchanged" in err
    assert "pretrain runs again: optim.lr: 0.001 -> 0.005 (flag --set)" in err
    assert "sft runs again: input model changed" in err
    out = tmp_path / "runs" / "small"
    assert (out / "old" / "02-pretrain.old-1" / "final").is_dir()
    assert not list(out.glob("[0-9][0-9]-*.old*"))


def test_what_follows_is_skipped_when_the_result_is_the_same(work: FakeWork, tmp_path: Path) -> None:
    run(tmp_path)
    work.ran.clear()
    run(tmp_path, "pretrain.train.save_every=3")
    assert work.ran == ["pretrain"]


def test_a_failed_stage_continues(work: FakeWork, tmp_path: Path) -> None:
    def fail(ctx: StageContext) -> None:
        if ctx.name == "sft":
            (ctx.stage_dir / "checkpoint").write_text("half")
            raise KllmError("the loss is not finite")

    work.before = fail
    with pytest.raises(KllmError, match="not finite"):
        run(tmp_path)
    status = RunDir(tmp_path / "runs" / "small").status("03-sft")
    assert status["state"] == "failed" and status["exit_code"] == 1 and "not finite" in status["error"]
    work.before = lambda ctx: None
    work.ran.clear()
    assert run(tmp_path) == 0
    assert work.ran == ["sft", "eval"]
    assert (tmp_path / "runs" / "small" / "03-sft" / "checkpoint").exists()
    status = RunDir(tmp_path / "runs" / "small").status("03-sft")
    assert status["state"] == "done" and status["attempts"] == 2 and "error" not in status


def test_an_interrupt_is_recorded_with_its_exit_code(work: FakeWork, tmp_path: Path) -> None:
    def interrupt(ctx: StageContext) -> None:
        raise KeyboardInterrupt

    work.before = interrupt
    with pytest.raises(Interrupted) as caught:
        run(tmp_path)
    assert caught.value.exit_code == 130
    assert RunDir(tmp_path / "runs" / "small").status("01-tokenizer")["state"] == "interrupted"


def test_a_bug_leaves_its_traceback_in_the_log(work: FakeWork, tmp_path: Path) -> None:
    def bug(ctx: StageContext) -> None:
        raise ZeroDivisionError("oops")

    work.before = bug
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    folder = tmp_path / "runs" / "small" / "01-tokenizer"
    assert "ZeroDivisionError: oops" in (folder / "log.txt").read_text()
    status = read_json(folder / "status.json")
    assert status["crash"] and any("ZeroDivisionError" in line for line in status["log_tail"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "x/model.safetensors"), "no space left"),
        (MemoryError(), "train.micro_batch_tokens"),
        (PermissionError(13, "Permission denied", "secret.jsonl"), "secret.jsonl: permission denied"),
    ],
)
def test_the_world_fails_in_one_line(work: FakeWork, tmp_path: Path, error: Exception, said: str) -> None:
    def fail(ctx: StageContext) -> None:
        raise error

    work.before = fail
    with pytest.raises(KllmError, match=said) as caught:
        run(tmp_path)
    assert caught.value.exit_code == 1


def test_only_from_until_and_force(work: FakeWork, tmp_path: Path) -> None:
    run(tmp_path, until="pretrain")
    assert work.ran == ["tokenizer", "pretrain"]
    work.ran.clear()
    run(tmp_path, from_="sft")
    assert work.ran == ["sft", "eval"]
    work.ran.clear()
    run(tmp_path, only=["sft"], force=["sft"])
    assert work.ran == ["sft"]
    with pytest.raises(UserError, match="did you mean sft"):
        run(tmp_path, only="sfft")
    with pytest.raises(UserError, match="no stage is left"):
        run(tmp_path, from_="eval", until="sft")


def test_a_stage_without_what_it_needs_is_refused(work: FakeWork, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs pretrain"):
        run(tmp_path, only="sft")
    assert work.ran == []


def test_fresh_moves_the_whole_run_aside(work: FakeWork, tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, fresh=True)
    assert work.ran == ALL * 2
    assert (tmp_path / "runs" / "small.old-1" / "03-sft" / "final").is_dir()


def test_nothing_starts_when_something_is_wrong_later(work: FakeWork, tmp_path: Path) -> None:
    text = RECIPE + "    tasks: [perplexity:missing.txt]\n"
    text = text.replace(
        "train: {{steps: 4}}", "dataset: {{seq_len: 4096}}\n    train: {{batch_tokens: 4096}}"
    )
    with pytest.raises(UserError) as caught:
        run_recipe(load(tmp_path, text=text), in_process=True, reporter_mode="plain")
    said = str(caught.value)
    assert "missing.txt" in said and "4096 tokens are longer than the model's 2048 positions" in said
    assert "recipe.yaml:" in said
    assert work.ran == [] and not (tmp_path / "runs").exists()


def test_a_single_stage_refuses_other_settings_and_shows_them(work: FakeWork, tmp_path: Path) -> None:
    assert stage(tmp_path, "pretrain") == 0
    assert work.ran == ["tokenizer", "pretrain"]  # the tokenizer it needs comes first
    work.ran.clear()
    assert stage(tmp_path, "pretrain") == 0
    assert work.ran == []
    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.01 \(flag --set\).*--fresh") as caught:
        stage(tmp_path, "pretrain", "pretrain.optim.lr=1e-2")
    assert caught.value.exit_code == 2
    assert work.ran == []
    assert stage(tmp_path, "pretrain", "pretrain.optim.lr=1e-2", fresh=True) == 0
    assert work.ran == ["pretrain"]
    assert (tmp_path / "runs" / "small" / "old" / "02-pretrain.old-1").is_dir()


def test_a_single_stage_that_kept_nothing_starts_anew(work: FakeWork, tmp_path: Path) -> None:
    """A mistake that only the start could find does not lock the folder; a checkpoint does."""

    def fail(ctx: StageContext) -> None:
        if ctx.name == "pretrain":
            raise KllmError("too large")

    work.before = fail
    for lr in ("1e-2", "2e-2"):
        with pytest.raises(KllmError, match="too large"):
            stage(tmp_path, "pretrain", f"pretrain.optim.lr={lr}")
    folder = tmp_path / "runs" / "small"
    assert (folder / "old" / "02-pretrain.old-1" / "status.json").exists()
    (folder / "02-pretrain" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="an unfinished run exists with other settings"):
        stage(tmp_path, "pretrain", "pretrain.optim.lr=3e-2")
    (folder / "02-pretrain" / "checkpoints").rmdir()
    work.before = lambda ctx: None
    assert stage(tmp_path, "pretrain", "pretrain.optim.lr=3e-2") == 0


def test_a_single_stage_says_when_it_is_finished(
    work: FakeWork,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage(tmp_path, "tokenizer")
    assert "next: kllm pretrain" in capsys.readouterr().out
    stage(tmp_path, "tokenizer")
    assert "finished already" in capsys.readouterr().out


def test_every_stage_ends_with_the_next_command(
    work: FakeWork,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path)
    out = capsys.readouterr().out
    assert out.count("next: kllm ") == 5
    assert "next: kllm sft --recipe" in out and out.rstrip().endswith("next: kllm chat runs/small")


def test_a_smoke_run_has_a_folder_of_its_own(work: FakeWork, tmp_path: Path) -> None:
    run(tmp_path, smoke=True)
    assert (tmp_path / "runs" / "small-smoke" / "report.md").exists()
    assert work.contexts[1].smoke and work.contexts[1].stage.train.steps == 6  # type: ignore[union-attr]
