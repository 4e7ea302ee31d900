"""metrics.jsonl survives kills without holes or repeats; optional sinks are asked for by name."""

from __future__ import annotations

import builtins
import errno
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kllm.errors import KllmError, UserError
from kllm.observe import plots
from kllm.observe.sinks import JsonlSink, check_sinks, make_sinks, read_rows


def write(path: Path, steps: range) -> None:
    sink = JsonlSink(path)
    for step in steps:
        sink.write({"step": step, "train/loss": 1.0 / (step + 1)})
    sink.close()


def test_rows_reach_the_file_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1, "train/loss": 2.5})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.5}]
    sink.close()


def test_truncate_drops_later_rows_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 11))
    with path.open("ab") as file:
        file.write(b'{"step": 11, "train/lo')
    sink = JsonlSink(path)
    assert sink.truncate_after(6) == 5
    sink.write({"step": 7, "train/loss": 0.0})
    sink.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_with_nothing_to_drop_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    before = path.stat().st_mtime_ns
    assert JsonlSink(path).truncate_after(3) == 0
    assert path.stat().st_mtime_ns == before
    assert JsonlSink(tmp_path / "none.jsonl").truncate_after(3) == 0


def test_a_torn_line_does_not_swallow_the_next_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    sink = JsonlSink(path)
    sink.write({"step": 2})
    sink.close()
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_not_a_number_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write({"step": 1, "a": float("nan"), "b": [float("inf")]})
    sink.close()
    text = path.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": [None]}


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink._file = Full()
    with pytest.raises(KllmError, match="no space left") as caught:
        sink.write({"step": 1})
    assert caught.value.exit_code == 1
    assert "metrics.jsonl" in str(caught.value)


def test_a_missing_package_is_a_user_error_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(UserError, match=r"pip install 'kllm\[swanlab\]'"):
        make_sinks(tmp_path, ["swanlab"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"kllm\[wandb\]"):
        check_sinks(["wandb"])


def test_optional_sinks_are_not_imported_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.split(".")[0] not in ("wandb", "swanlab", "tensorboard")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    make_sinks(tmp_path).close()


def test_wandb_gets_numbers_and_one_id_per_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            calls.append((step, numbers))

        def finish(self) -> None:
            calls.append("finish")

    def init(**settings: Any) -> Run:
        calls.append(settings["id"])
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        sinks = make_sinks(tmp_path, ["wandb"], project="p", name="n")
        sinks.write({"step": step, "train/loss": 2.0, "note": "text"})
        sinks.close()
    assert calls[0] == calls[3]
    assert calls[1] == (1, {"train/loss": 2.0}) and calls[4] == (2, {"train/loss": 2.0})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_plots_are_drawn_by_family(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(1, 31):
        sink.write({"step": step, "train/loss": 5 / step, "opt/lr": 1e-3, "perf/tok_s": 100.0})
        if step % 10 == 0:
            sink.write({"step": step, "val/loss": 5 / step})
    sink.close()
    names = sorted(p.name for p in plots.plot_run(path, tmp_path / "plots"))
    assert names == ["loss.png", "opt.png", "perf.png"]
    assert all((tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG" for name in names)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == names


def test_without_matplotlib_there_are_no_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "metrics.jsonl", range(1, 5))
    monkeypatch.setattr(plots, "available", lambda: False)
    assert plots.plot_run(tmp_path / "metrics.jsonl", tmp_path / "plots") == []
    line = plots.loss_line(tmp_path / "metrics.jsonl")
    assert line.startswith("loss 0.500 ") and line.endswith(" 0.200")
