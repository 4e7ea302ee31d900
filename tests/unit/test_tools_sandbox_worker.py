"""A sandbox's worker in its parent: start, end, other threads, too few descriptors, and where it cannot be."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_tools_sandbox import UNSAFE, alive, gone, pid_of

from kllm.errors import KllmError, UserError
from kllm.tools import sandbox
from kllm.tools.sandbox import Limits, Ran, Sandbox, process, syscalls
from kllm.tools.sandbox import box as box_module


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_start_is_lazy_and_measured() -> None:
    box = Sandbox(unsafe=UNSAFE)
    assert box.startup_seconds is None
    with box:
        box.start()
        assert box.startup_seconds is not None and 0 < box.startup_seconds < 5
        assert box.lock_seconds is not None and box.lock_seconds < box.startup_seconds
        pid, folder = pid_of(box), box._worker.scratch  # type: ignore[union-attr]
        box.start()
        assert pid_of(box) == pid and folder.stat().st_mode & 0o777 == 0o700
    assert not alive(pid) and not folder.exists()
    box.close()
    with pytest.raises(KllmError, match="closed"):
        box.run("1")


def test_a_worker_outlives_the_thread_that_started_it() -> None:
    with Sandbox(unsafe=UNSAFE) as box:
        thread = threading.Thread(target=box.run, args=("x = 1",))
        thread.start()
        thread.join()
        time.sleep(0.1)
        assert box.run("x").output == "1\n"


def test_a_killed_parent_leaves_no_worker(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom kllm.tools.sandbox import Sandbox\n"
        f"box = Sandbox(unsafe={UNSAFE})\n"
        "print(box.run('import os; os.getpid()').output, flush=True)\n"
        "box.run('import time; time.sleep(60)')"
    )
    there = os.environ | {"TMPDIR": str(tmp_path)}  # its folder is left: the next start here removes it
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=there
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    assert gone(pid)


def test_a_sandbox_that_is_forgotten_is_cleaned_up() -> None:
    box = Sandbox(unsafe=UNSAFE)
    pid, folder = pid_of(box), box._worker.scratch  # type: ignore[union-attr]
    del box
    gc.collect()
    assert not alive(pid) and not folder.exists()


def test_no_descriptors_are_left() -> None:
    before = descriptors()
    for code in ("1", "import os; os._exit(1)"):
        with Sandbox(unsafe=UNSAFE) as box:
            box.run(code)
    assert descriptors() == before


def test_unsafe_keeps_the_limits() -> None:
    with Sandbox(limits=Limits(seconds=1), unsafe=True) as box:
        assert box.run("open('/etc/passwd').readline() != ''").output == "True\n"
        assert box.run("bytearray(10**10)").error == "MemoryError"
        ran = box.run(
            "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\nchild.wait()"
        )
        assert ran.error == "time-out after 1 s" and gone(int(ran.output.split()[0]))


# -- other threads


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(group, signal) of each one sent from here."""
    sent: list[tuple[int, int]] = []
    real = os.killpg

    def killpg(group: int, number: int) -> None:
        sent.append((group, number))
        real(group, number)

    monkeypatch.setattr(os, "killpg", killpg)
    return sent


def in_thread(function: Callable[[], Ran]) -> tuple[threading.Thread, list[Ran]]:
    came: list[Ran] = []
    thread = threading.Thread(target=lambda: came.append(function()))
    thread.start()
    return thread, came


def test_a_worker_that_is_killed_while_its_run_waits_leaves_the_next_one_alone(
    signalled: list[tuple[int, int]],
) -> None:
    """The next one's pipes have the same numbers, and its thread is still in the first one's run."""
    inside, go = threading.Event(), threading.Event()

    def wait(args: list[Any], kwargs: dict[str, Any]) -> str:
        inside.set()
        go.wait(10)
        return "wrong"

    def release(args: list[Any], kwargs: dict[str, Any]) -> str:
        go.set()
        thread.join(3)
        return "right"

    old = Sandbox({"wait": wait}, limits=Limits(seconds=1), unsafe=UNSAFE)
    thread, came = in_thread(lambda: old.run("print('early'); wait(); print('late')"))
    assert inside.wait(10)
    first = old._worker
    assert first is not None
    old.close()
    assert not alive(first.process.pid)
    signalled.clear()
    with Sandbox({"release": release}, unsafe=UNSAFE) as new:
        new.start()
        second = new._worker
        assert second is not None and {second.requests, second.replies} & {first.requests, first.replies}
        ran = new.run("print('whole')\nprint(release())\nprint('end')")
        assert (ran.output, ran.error) == ("whole\nright\nend\n", None)
    assert not thread.is_alive() and not [group for group, _ in signalled if group == first.process.pid]
    (ran,) = came
    assert ran.lost and ran.error in ("the sandbox was closed", "time-out after 1 s")
    assert ran.output.startswith("early\n[") and ran.output.endswith("variables and files are lost]\n")


def test_output_before_the_kill_is_kept_though_nobody_had_read_it() -> None:
    inside, go = threading.Event(), threading.Event()

    def wait(args: list[Any], kwargs: dict[str, Any]) -> None:
        inside.set()
        go.wait(10)

    with Sandbox({"wait": wait}, unsafe=UNSAFE) as box:
        find = "import gc\nnext(o.replies for o in gc.get_objects() if type(o).__name__ == 'Pipes')"
        # Called without waiting for the answer, so that there is output while the function waits.
        call = (
            f'os.write({int(box.run(find).output)}, b\'{{"call": "wait", "args": [], "kwargs": {{}}}}\\n\')'
        )
        code = f"import os, time\n{call}\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
        thread, came = in_thread(lambda: box.run(code + "print('after')\nopen('done', 'w')\ntime.sleep(9)"))
        assert inside.wait(10) and box._worker is not None
        folder, end = box._worker.scratch, time.monotonic() + 5
        (folder / "go").touch()
        while not (folder / "done").exists() and time.monotonic() < end:
            time.sleep(0.01)
        box.close()
        go.set()
        thread.join(5)
    assert came[0].output.startswith("after\n[the sandbox was closed: ")


def test_a_run_ends_when_another_thread_closes() -> None:
    inside = threading.Event()
    box = Sandbox({"mark": lambda args, kwargs: inside.set()}, unsafe=UNSAFE)
    thread, came = in_thread(lambda: box.run("import time\nprint('so far')\nmark()\ntime.sleep(60)"))
    assert inside.wait(10)
    box.close()
    thread.join(5)
    assert came and came[0].lost and came[0].output.startswith("so far\n[the sandbox was closed: ")


def test_a_box_that_is_closed_while_it_starts_has_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[process.Worker] = []

    def start(*given: Any) -> process.Worker:
        started.append(process.Worker(*given))
        box.close()  # by another thread
        return started[-1]

    monkeypatch.setattr(box_module, "Worker", start)
    box = Sandbox(unsafe=UNSAFE)
    with pytest.raises(KllmError, match="closed"):
        box.run("open('ran', 'w')")
    assert not alive(started[0].process.pid) and not started[0].scratch.exists()


def test_a_worker_that_ended_keeps_its_number_until_its_group_is_killed(
    signalled: list[tuple[int, int]],
) -> None:
    worker = process.Worker([], Limits(), UNSAFE)
    try:
        os.kill(worker.process.pid, signal.SIGKILL)
        assert worker.ended_by_itself(5) == -9 and worker.process.returncode is None
        os.kill(worker.process.pid, 0)  # a zombie: nobody else has the number
    finally:
        worker.kill()
    assert signalled == [(worker.process.pid, signal.SIGKILL)] and worker.process.returncode == -9
    worker.signal(signal.SIGSTOP)
    worker.kill()
    assert len(signalled) == 1


# -- starts that fail


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """No descriptor, file, process or thread more than before."""
    before, threads = descriptors(), threading.active_count()
    yield
    end = time.monotonic() + 5
    while time.monotonic() < end and (descriptors() > before or threading.active_count() > threads):
        time.sleep(0.01)
    assert descriptors() <= before and threading.active_count() <= threads
    assert list(folder.iterdir()) == []
    assert not [pid for pid in children() if "worker.py" in pid]


def children() -> list[str]:
    """Command lines of this process's children."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            pids = (task / "children").read_text().split()
            found += [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_too_few_descriptors_are_one_line(folder: Path) -> None:
    """Whichever step gets none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    failures = 0
    for more in range(30):
        with nothing_left(folder):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, hard))
                process.Worker([], Limits(), UNSAFE).kill()
            except KllmError as error:
                failures += 1
                assert (
                    "\n" not in str(error) and "Too many open files" in str(error) and "ulimit" in str(error)
                )
            else:
                break
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert 7 <= failures < 30  # the folder's lock, six ends of pipes, what starting a process takes


def test_no_room_for_its_files_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder / "gone"))
    with nothing_left(folder), pytest.raises(KllmError, match="No such file or directory: .*gone"):
        Sandbox(unsafe=UNSAFE).run("1")


def test_no_thread_to_be_had_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, nothing_left(folder):
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(KllmError, match="cannot start the Python worker: can't start new thread"):
            Sandbox(unsafe=UNSAFE).run("1")


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_while_it_starts_leaves_no_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """While the thread that starts it is at it: who waits is gone before there is a process, or just after."""
    assert threading.current_thread() is threading.main_thread()
    real, unwound = subprocess.Popen, threading.Event()

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
        unwound.wait(5)

    def popen(*given: Any, **named: Any) -> Any:
        if when == "before":
            interrupt()
        started = real(*given, **named)
        if when == "after":
            interrupt()
        return started

    monkeypatch.setattr(subprocess, "Popen", popen)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    try:
        with nothing_left(folder):
            with pytest.raises(KeyboardInterrupt):
                Sandbox(unsafe=UNSAFE).run("1")
            unwound.set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_it_says_hello_leaves_no_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(worker: process.Worker, fd: int) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, nothing_left(folder):
        patch.setattr(process.Worker, "read", read)
        with pytest.raises(KeyboardInterrupt):
            Sandbox(unsafe=UNSAFE).run("1")


# -- where it cannot be locked


def test_no_landlock_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "landlock_abi", lambda: 0)
    with pytest.raises(UserError) as caught:
        Sandbox().run("1")
    text = str(caught.value)
    assert "\n" not in text and os.uname().release in text and "5.13" in text and "--unsafe-python" in text
    with Sandbox(unsafe=True) as box:
        assert box.run("1").output == "1\n"


@pytest.mark.parametrize(
    ("platform", "machine", "words"), [("darwin", "arm64", "Linux"), ("linux", "riscv64", "riscv64")]
)
def test_other_systems_are_one_line(
    monkeypatch: pytest.MonkeyPatch, platform: str, machine: str, words: str
) -> None:
    monkeypatch.setattr(process.sys, "platform", platform)
    monkeypatch.setattr(process.platform, "machine", lambda: machine)
    with pytest.raises(UserError, match=words) as caught:
        sandbox.check_platform()
    assert "\n" not in str(caught.value) and "--unsafe-python" in str(caught.value)


@pytest.mark.skipif(UNSAFE, reason="this kernel has no Landlock")
def test_a_lock_that_fails_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    real = process.Worker.kill

    def kill(self: process.Worker) -> None:
        ended.append(self.process.wait(5))
        real(self)

    monkeypatch.setattr(process.Worker, "kill", kill)
    everything = b"\x06\x00\x00\x00\x00\x00\xff\x7f"  # allows all: the lock's own check must notice
    for broken, words in (
        (b"nonsense" * 3, "seccomp failed: Invalid argument"),
        (everything, "seccomp does not hold"),
    ):
        monkeypatch.setattr(syscalls, "program", lambda machine, broken=broken: broken)
        with pytest.raises(UserError, match=words) as caught:
            Sandbox().run("open('ran', 'w')")
        assert "\n" not in str(caught.value) and "--unsafe-python" in str(caught.value)
    assert ended == [78, 78]  # the worker's own code for it


def test_an_interpreter_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in ("/nonexistent/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(KllmError) as caught:
            Sandbox(unsafe=True).run("1")
        assert "\n" not in str(caught.value)
