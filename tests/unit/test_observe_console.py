"""The display: readable on a terminal, plain in a pipe, machine-readable for scripts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kllm.observe.console import (
    JsonReporter,
    LoggedReporter,
    PlainReporter,
    QuietReporter,
    RichReporter,
    make_reporter,
)
from kllm.observe.reporting import Reporter, pretty

METRICS = {
    "train/loss": 3.25,
    "opt/lr": 5e-4,
    "opt/grad_norm": 0.84,
    "perf/tok_s": 12345.0,
    "perf/mfu": 0.613,
    "mem/peak": 3 << 29,
}


def tell(reporter: Reporter) -> None:
    """A short run, every call once."""
    reporter.header("pretrain", {"model": "k-small [26M]", "steps": 20})
    for step in (1, 5, 10):
        reporter.progress("pretrain", step, 20, {**METRICS, "train/loss": 4.0 - step / 10})
    reporter.progress("pretrain", 11, 20, {})
    reporter.evaluation(10, {"val/loss": 2.5, "val/bpb": 1.2})
    reporter.sample(10, "你好", "[bold]red[/bold]\nhello")
    reporter.table("results", ("name", "value"), [("中文", 1), ("b", 22)])
    reporter.spans("sample", [("user: hi\n", False), ("hel", True), ("lo", True)])
    reporter.message("news")
    reporter.warn("careful")
    reporter.done("finished\nnext: kllm chat runs/x")
    reporter.close()


def plain(kind: Callable[..., PlainReporter] = PlainReporter) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    tell(kind(out, err))
    return out.getvalue(), err.getvalue()


def test_plain_lines_have_results_on_stdout_and_news_on_stderr() -> None:
    out, err = plain()
    assert "\x1b" not in out + err
    assert "pretrain 10/20 50%" in err and "12.3k tok/s" in err and "mfu 61%" in err
    assert "mem 1.50 GiB" in err and "lr 5.00e-04" in err and "grad 0.84" in err
    assert "warning: careful" in err and "news" in err
    assert "中文  1\nb     22\n" in out
    assert "user: hi\n[hello]" in out
    assert "next: kllm chat runs/x" in out
    assert sum(line.startswith("pretrain ") for line in err.splitlines()) == 3


def test_loss_is_smoothed_without_start_up_bias() -> None:
    _, err = plain()
    first, *_, last = [line for line in err.splitlines() if line.startswith("pretrain ")]
    assert "loss 3.9000" in first
    assert 3.0 < float(last.split("loss ")[1].split()[0]) < 3.9


def test_unknown_mfu_is_named_not_zero() -> None:
    err = io.StringIO()
    PlainReporter(io.StringIO(), err).progress("sft", 1, 2, {"train/loss": 1.0, "perf/tok_s": 10.0})
    assert "mfu n/a" in err.getvalue() and "0%" not in err.getvalue().replace("50%", "")


def test_quiet_keeps_results_and_warnings() -> None:
    out, err = plain(QuietReporter)
    assert err == "warning: careful\n"
    assert "中文" in out and "finished" not in out


def test_json_lines_are_valid_and_complete() -> None:
    out = io.StringIO()
    reporter = JsonReporter(out)
    tell(reporter)
    reporter.progress("x", 1, 2, {"train/loss": float("nan")})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in out.getvalue().splitlines()]
    kinds = [row["event"] for row in rows]
    assert kinds == [
        "header", "progress", "progress", "progress", "evaluation", "sample", "table", "spans",
        "message", "warning", "done", "progress",
    ]  # fmt: skip
    assert rows[1]["train/loss"] == 3.9 and rows[1]["total"] == 20
    assert rows[7]["spans"] == [{"text": "user: hi\n", "trained": False}, {"text": "hello", "trained": True}]
    assert rows[-1]["train/loss"] is None


def rich_output(monkeypatch: pytest.MonkeyPatch, width: int = 100, **environment: str) -> str:
    from rich.console import Console

    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, width=width, color_system="truecolor", highlight=False, markup=False
    )
    reporter = RichReporter(console, console)
    tell(reporter)
    return file.getvalue()


def test_rich_display_shows_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    text = rich_output(monkeypatch)
    for part in ("k-small [26M]", "11/20", "55.0%", "12.3k tok/s", "mfu 61%", "val loss 2.5000", "中文"):
        assert part in text
    assert "[bold]red[/bold]" in text  # a model's words are never markup
    assert "\x1b[?25h" in text  # the cursor comes back


def test_narrow_terminals_lose_the_least_important_first(monkeypatch: pytest.MonkeyPatch) -> None:
    text = rich_output(monkeypatch, width=46)
    assert "loss 3." in text and "mem 1.50" not in text


def test_no_color_means_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured, plain_text = rich_output(monkeypatch), rich_output(monkeypatch, NO_COLOR="1")
    assert "\x1b[36m" in coloured
    assert "\x1b[36m" not in plain_text and "38;" not in plain_text


def test_a_pipe_gets_plain_lines_even_if_colour_is_forced(tmp_path: Path) -> None:
    code = (
        "from kllm.observe.console import make_reporter\n"
        "r = make_reporter()\n"
        "r.progress('pretrain', 1, 2, {'train/loss': 1.0}); r.table('t', ['a'], [['b']]); r.close()\n"
        "import sys; assert 'rich' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"},
    )
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"pretrain 1/2" in done.stderr and b"b" in done.stdout


def test_modes_by_name() -> None:
    kinds = {mode: type(make_reporter(mode)).__name__ for mode in ("rich", "plain", "json", "quiet")}
    assert kinds == {
        "rich": "RichReporter", "plain": "PlainReporter", "json": "JsonReporter", "quiet": "QuietReporter",
    }  # fmt: skip


def test_log_file_gets_what_the_screen_gets(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    logged = LoggedReporter(PlainReporter(out, err), tmp_path / "stage" / "log.txt")
    logged.log_only("traceback")
    tell(logged)
    text = (tmp_path / "stage" / "log.txt").read_text(encoding="utf-8")
    assert "pretrain 10/20" in text and "traceback" in text and "warning: careful" in text
    assert "traceback" not in err.getvalue()
    assert all(line[2] == ":" for line in text.splitlines() if "pretrain" in line)


def test_figures_are_named_for_people() -> None:
    assert pretty("train/loss", 3.14159) == "loss 3.1416"
    assert pretty("val/loss", None) == "val loss n/a"
    assert pretty("opt/clip_rate", 0.25) == "clipped 25%"
    assert pretty("moe/unknown", 7) == "moe/unknown 7"
