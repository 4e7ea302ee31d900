"""The run folder: locked, atomic, never deleted."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_support import load

from kllm.errors import KllmError
from kllm.run.rundir import RunDir, alive, move_aside, read_json

HOLD = """
import sys, time
from pathlib import Path
from kllm.run.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_in_use_is_refused_with_the_process_that_holds_it(
    tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    with (
        pytest.raises(KllmError, match=f"in use by process {holder.pid}") as caught,
        RunDir(tmp_path / "run").lock(0),
    ):
        pass
    assert caught.value.exit_code == 1


def test_the_lock_goes_with_a_killed_process(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.send_signal(signal.SIGKILL)
    with RunDir(tmp_path / "run").lock(wait=5.0) as fd:
        assert fd is not None
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_running_stage_whose_process_is_gone_was_interrupted(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.write_status("01-a", {"state": "running", "pid": gone.pid, "host": platform.node(), "attempts": 2})
    assert run.status("01-a")["state"] == "interrupted"
    assert run.status("01-a")["attempts"] == 2
    run.write_status("01-a", {"state": "running", "pid": os.getpid(), "host": platform.node()})
    assert run.status("01-a")["state"] == "running"
    assert run.status("02-b") == {"state": "pending"}
    (tmp_path / "01-a" / "status.json").write_text('{"state": "do')
    assert run.status("01-a") == {"state": "pending"}


def test_moving_aside_never_overwrites(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").write_text(str(n))
        assert move_aside(tmp_path / "run") == tmp_path / f"run.old-{n}"
    assert (tmp_path / "run.old-1" / "file").read_text() == "1"
    assert move_aside(tmp_path / "run") is None


def test_a_read_only_place_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(KllmError, match=r"read-only.*another --out") as caught:
        RunDir(tmp_path / "run").create()
    assert caught.value.exit_code == 1


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KllmError, match="cannot write"), RunDir(tmp_path / "file" / "run").lock():
        pass


def test_stages_keep_their_folder_when_their_number_changes(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    run = RunDir(tmp_path / "run")
    (run.path / "02-sft").mkdir(parents=True)
    (run.path / "01-tokenizer").mkdir()
    run.adopt(loaded.recipe)
    assert sorted(p.name for p in run.path.iterdir()) == ["01-tokenizer", "03-sft"]


def test_run_json_lists_stages_and_keeps_its_birthday(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    run = RunDir(tmp_path / "run")
    run.write_recipe(loaded.recipe, loaded.text, "resolved", ["kllm", "run", "a b"])
    born = read_json(run.path / "run.json")["created"]
    time.sleep(1.1)
    run.write_recipe(loaded.recipe, loaded.text, "resolved")
    facts = read_json(run.path / "run.json")
    assert facts["created"] == born < facts["updated"]
    assert [s["dir"] for s in run.stages()] == ["01-tokenizer", "02-pretrain", "03-sft", "04-eval"]
    assert "torch" in facts["versions"]
    assert (run.path / "recipe.yaml").read_text() == loaded.text


def test_alive() -> None:
    assert alive(os.getpid()) and not alive(0) and not alive(2**22 + 1)
