"""What can stand where an adapter is expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from kllm.errors import UserError
from kllm.export import hub
from kllm.export.resolve import resolve
from kllm.export.resolve_adapter import check_unmerged, resolve_adapter


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_folders_runs_stages_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = adapter(tmp_path / "plain")
    assert resolve_adapter(plain) == resolve_adapter(plain / "adapter_config.json") == plain
    run = tmp_path / "run"
    first, last = adapter(run / "01-lora" / "adapter"), adapter(run / "03-dpo" / "final" / "adapter")
    (run / "04-export").mkdir()
    assert resolve_adapter(run) == last
    assert resolve_adapter(str(run / "01-lora")) == resolve_adapter(first) == first
    file = tmp_path / "lora_x_512.pth"
    file.touch()
    assert resolve_adapter(file) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_adapter("~/plain") == plain


def test_a_stage_that_has_not_ended(tmp_path: Path) -> None:
    """Its newest whole checkpoint holds the adapter; the run's model is the one of the stage before."""
    run = tmp_path / "run"
    (run / "01-sft" / "final").mkdir(parents=True)
    checkpoints = run / "02-lora" / "checkpoints"
    places = [adapter(checkpoints / f"step-00000{step}" / "adapter") for step in (1, 2, 3)]
    for place in places[:2]:
        (place.parent / "COMPLETE").touch()
    for place in (run, run / "02-lora", places[1].parent):
        assert resolve_adapter(place) == places[1]
    with pytest.raises(
        UserError, match="02-lora: no model in it, only an adapter .kllm convert .* OUT --merge"
    ):
        resolve(run / "02-lora")
    with pytest.raises(UserError, match="no model in it, only an adapter"):
        resolve(run)
    (run / "01-sft" / "final" / "config.json").touch()
    assert resolve(run) == run / "01-sft" / "final"
    done = adapter(run / "02-lora" / "adapter")
    assert resolve_adapter(run) == done


def test_an_adapter_that_is_merged_already(tmp_path: Path) -> None:
    """A stage leaves both: its adapter is for the base, not for its final."""
    run = tmp_path / "run"
    stage, kept = run / "01-lora", tmp_path / "kept"
    own = adapter(stage / "adapter")
    beside = adapter(stage / "final" / "adapter")  # kept beside a model: that one is its base
    for model in (stage / "final", tmp_path / "base", kept):
        model.mkdir(exist_ok=True)
        (model / "config.json").touch()
    (stage / "status.json").touch()
    (own / "adapter_config.json").write_text('{"base_model_name_or_path": "/models/base"}')
    for model in (run, stage, stage / "final"):
        with pytest.raises(UserError, match="merged into .* already .name its base instead: /models/base"):
            check_unmerged(model, own)
    with pytest.raises(UserError, match="merged into"):
        check_unmerged(run, run)
    for model, given in (
        (tmp_path / "base", own),
        (run, adapter(kept / "adapter")),
        (run, beside),
        ("a/b", own),
        (run, "a/b"),
    ):
        check_unmerged(model, given)
    (stage / "status.json").unlink()
    check_unmerged(run, own)  # somebody's own folders that happen to have these names


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nope: no such adapter"):
        resolve_adapter("nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no adapter in it"):
        resolve_adapter(tmp_path / "empty")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    whole = adapter(tmp_path / "whole")

    def snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append((repo, revision, patterns))
        return whole

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    monkeypatch.setattr(hub, "_prepare_client", lambda name: None)
    monkeypatch.setattr(hub, "_instead", lambda *names: None)
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        resolve_adapter("Owner/lora@v2")
    (whole / "adapter_model.safetensors").touch()
    assert resolve_adapter("Owner/lora@v2") == whole
    assert asked[0] == ("Owner/lora", "v2", ["adapter_config.json", "adapter_model.safetensors"])
