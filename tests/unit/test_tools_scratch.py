"""The sandbox's folder: its limits, what looking at them costs, and that it goes, whoever had it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_tools_sandbox import UNSAFE

from kllm.tools.sandbox import Limits, Sandbox, run, scratch


def test_scratch_is_bounded_and_removed(tmp_path: Path) -> None:
    limits = Limits(file_bytes=1 << 18)
    with Sandbox(limits=limits, unsafe=UNSAFE) as box:
        ran = box.run("for i in range(10000): open(str(i), 'wb').write(bytes(1 << 18))")
        assert ran.lost and "over 4,194,304 bytes" in ran.output
        assert box.run("for i in range(999): open(str(i), 'w').close()").error is None
        assert box.run("open('a', 'w').close(); open('b', 'w').close()").lost


def test_deep_and_hidden_folders_are_noticed_and_removed(tmp_path: Path) -> None:
    at = tmp_path / "scratch"
    at.mkdir()
    here = os.open(at, os.O_RDONLY)
    for _ in range(1100):  # far beyond PATH_MAX and the recursion limit
        os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (at / "no").mkdir()
    (at / "no" / "file").write_text("x")
    (at / "no").chmod(0o100)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (at / "link").symlink_to(outside)
    assert scratch.scratch_is_full(at, 1 << 30)
    scratch.remove_scratch(at)
    assert not at.exists() and (outside / "kept").read_text() == "kept"


def test_folders_may_be_50_deep_and_no_deeper() -> None:
    nested = "import os\nfor i in range({}): os.mkdir('d'); os.chdir('d')"
    with Sandbox(unsafe=UNSAFE) as box:
        assert box.run(nested.format(50)).error is None
        ran = box.run(nested.format(1))
        assert ran.lost and ran.error is not None and "over 50 folders deep" in ran.error


def test_looking_takes_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    cost = [0.0]

    def look(folder: Path, limit: int) -> bool:
        looks.append(time.thread_time())
        while time.thread_time() < looks[-1] + cost[0]:
            pass
        return False

    monkeypatch.setattr(run, "scratch_is_full", look)
    with Sandbox(unsafe=UNSAFE) as box:
        box.run("import time; time.sleep(0.5)")
        cheap = len(looks)
        looks.clear()
        cost[0] = 0.01
        box.run("time.sleep(0.5)")
    assert len(looks) <= 4 < cheap  # one every 0.2 s, and one at the end


def test_the_size_holds_at_the_end_of_a_run_whenever_it_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "TICK", 60.0)
    with Sandbox(limits=Limits(file_bytes=1 << 16), unsafe=UNSAFE) as box:
        ran = box.run("for i in range(20): open(str(i), 'wb').write(bytes(1 << 16))")
    assert ran.lost and ran.error is not None and "over 1,048,576 bytes" in ran.error


def test_a_folder_that_moves_while_it_is_removed_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is not quite dead could make `..` lead out of the scratch folder."""
    at = tmp_path / "scratch"
    (at / "x" / "y" / "z").mkdir(parents=True)
    (at / "x" / "y" / "z" / "file").write_text("x")
    (tmp_path / "y").mkdir()
    (tmp_path / "outside").write_text("kept")
    real = scratch._clear

    def clear(folder: int) -> object:
        if "file" in os.listdir(folder):
            (at / "x" / "y" / "z").rename(at / "z")
        return real(folder)

    monkeypatch.setattr(scratch, "_clear", clear)
    scratch.remove_scratch(at)
    assert (tmp_path / "outside").read_text() == "kept" and (tmp_path / "y").is_dir()
    scratch.remove_scratch(at)
    assert not at.exists()


def test_many_full_folders_are_removed_in_time(tmp_path: Path) -> None:
    at = tmp_path / "scratch"
    for i in range(800):
        (at / str(i) / "below").mkdir(parents=True)
    start = time.thread_time()
    scratch.remove_scratch(at)
    assert not at.exists() and time.thread_time() - start < 1


# -- of owners that are gone

OWNER = """
import os, sys
from kllm.tools.sandbox import Sandbox
box = Sandbox(unsafe={unsafe})
print(box.run("import os; open('file', 'w').write('x'); os.getcwd()").output, end="", flush=True)
{then}
"""


def owner(folder: Path, then: str) -> subprocess.Popen[str]:
    code = OWNER.format(unsafe=UNSAFE, then=then)
    there = os.environ | {"TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=there
    )


def folder_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip().strip("'"))


def test_a_dead_owners_folder_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    with owner(tmp_path, "sys.stdin.read()") as alive:
        kept = folder_of(alive)
        with owner(tmp_path, "os._exit(1)") as dead:
            left = folder_of(dead)
        assert (left / "file").exists() and (kept / "file").exists()
        with owner(tmp_path, "") as later:  # it starts, tidies and ends
            own = folder_of(later)
        assert not left.exists() and not own.exists()
        assert (kept / "file").exists()
        alive.kill()
    with owner(tmp_path, ""):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tidied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_only_what_is_surely_a_dead_workers_is_removed(
    tidied: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("target")
    (target / "kept").write_text("kept")
    (tidied / "kllm-python-12-link").symlink_to(target)
    (tidied / "kllm-python-12-file").write_text("kept")
    (tidied / "kllm-python-abcdefgh").mkdir()  # of a version that did not hold its folders
    (tidied / "kllm-python-own-folder").mkdir()
    if os.geteuid() == 0:
        (tidied / "kllm-python-12-others").mkdir()
        os.chown(tidied / "kllm-python-12-others", 12345, 12345)
    kept = sorted(tidied.iterdir())
    path, held = scratch.make_scratch()
    (tidied / "kllm-python-12-dead_one" / "deep").mkdir(parents=True)
    (tidied / "kllm-python-12-dead_one" / "deep" / "link").symlink_to(target)
    scratch.remove_stale()
    assert sorted(tidied.iterdir()) == sorted([*kept, path]) and (target / "kept").read_text() == "kept"
    os.close(held)
    scratch.remove_stale()
    assert sorted(tidied.iterdir()) == kept


def test_a_folder_that_is_swept_before_it_is_held_is_made_anew(
    tidied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tempfile.mkdtemp
    made: list[str] = []

    def mkdtemp(prefix: str) -> str:
        made.append(real(prefix=prefix))
        if len(made) == 1:
            scratch.remove_stale()  # another process that starts just now
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    path, held = scratch.make_scratch()
    os.close(held)
    assert [str(path)] == made[1:] and [path] == list(tidied.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_an_unreadable_folder_is_removed_by_who_is_not_root() -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to others
    os.chown(place, 12345, 12345)
    code = f"""
import os, tempfile
from pathlib import Path
from kllm.tools.sandbox import scratch
os.setgroups([]); os.setgid(12345); os.setuid(12345)
tempfile.tempdir = {str(place)!r}
for name in ("1-aa", "2-aa"):
    path = Path(tempfile.tempdir, "kllm-python-" + name)
    (path / "below" / "deep").mkdir(parents=True)
    (path / "below" / "deep" / "file").write_text("x")
    (path / "below").chmod(0)
    path.chmod(0)
assert scratch.scratch_is_full(path, 1 << 30)
scratch.remove_scratch(path)
assert not path.exists()
scratch.remove_stale()
"""
    try:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
        assert list(place.iterdir()) == []
    finally:
        shutil.rmtree(place)
