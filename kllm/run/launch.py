"""Stages in processes of their own: memory freed at the end, crashes isolated, signals passed on.

Run as a module (`python -m kllm.run.launch N ...`) it is the launcher of a distributed stage: torchrun
on this machine, without its tracebacks, ending with the process that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kllm.run.rundir import alive

PARENT = "KLLM_PARENT"
SMOKE = "KLLM_SMOKE"
_PR_SET_PDEATHSIG = 1
STOP_SECONDS = 900


def is_child() -> bool:
    """This process runs one stage for a `kllm` above it, which holds the lock.

    A command that such a stage starts in turn is none: it only inherits the environment.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return False
    if "RANK" in os.environ or parent == str(os.getppid()):
        return True
    if not alive(int(parent)):
        os._exit(1)  # it died before this process got here
    return False


def child_environment(smoke: bool, nproc: int) -> dict[str, str]:
    """The environment of a stage's process."""
    extra = {PARENT: str(os.getpid()), SMOKE: "1" if smoke else ""}
    if "OMP_NUM_THREADS" not in os.environ and (nproc > 1 or smoke):
        # threads of all processes together, not each, as many as cores; a smoke-size model needs but one
        extra["OMP_NUM_THREADS"] = "1" if smoke else str(max(1, (os.cpu_count() or 1) // nproc))
    # the package must be found from any working directory, also when it is not installed
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **extra}


def run_child(arguments: Sequence[str], *, lock_fd: int | None, smoke: bool = False, nproc: int = 1) -> int:
    """Runs `python -m kllm ARGUMENTS` (on `nproc` processes) and returns its exit code.

    A signal that reaches this process is passed on once; the child lives in its own session so that
    Ctrl-C in a terminal does not reach it twice. A child killed by signal N gives -N. The child holds
    the lock of the run too (`lock_fd`), so that the run stays locked while anyone works in it.
    """
    command = [sys.executable, "-m", "kllm", *arguments]
    if nproc > 1:
        command = [sys.executable, "-m", "kllm.run.launch", str(nproc), *arguments]
    with _forwarding() as target:
        process = subprocess.Popen(
            command,
            env=child_environment(smoke, nproc),
            pass_fds=[] if lock_fd is None else [lock_fd],
            start_new_session=True,
        )
        target.append(process)
        if signum := next((s for s in target if isinstance(s, int)), None):
            process.send_signal(signum)  # it came before there was a child
        return process.wait()


@contextlib.contextmanager
def _forwarding() -> Iterator[list[Any]]:
    """Passes SIGINT and SIGTERM to the process in the yielded list; before there is one, keeps the number."""
    target: list[Any] = []

    def forward(signum: int, frame: Any) -> None:
        processes = [p for p in target if isinstance(p, subprocess.Popen)]
        if not processes:
            target.append(signum)
        for process in processes:
            process.send_signal(signum)

    if threading.current_thread() is not threading.main_thread():
        yield target
        return
    old = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield target
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def die_with_parent() -> None:
    """Ends this process when the one that started it is gone, even by kill -9.

    Otherwise an orphan would go on training in a folder that the next command wants to continue.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def describe_exit(code: int) -> str:
    """'exit code 1' or 'killed by signal 9 (SIGKILL): often the system ran out of memory'."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    why = ": often the system ran out of memory" if -code == signal.SIGKILL else ""
    return f"killed by signal {-code} ({name}){why}"


def _torchrun(nproc: str, arguments: Sequence[str]) -> int:
    """torchrun in this process; its workers say what is wrong, so its own report is left out."""
    die_with_parent()
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.disable(logging.ERROR)
    _let_steps_finish(SignalException)
    options = ["--standalone", "--nproc-per-node", nproc, "--max-restarts", "0"]
    try:
        main([*options, "-m", "kllm", *arguments])
    except SignalException as e:
        return 128 + int(e.sigval)
    except ChildFailedError as e:
        codes = [failure.exitcode for failure in e.failures.values()]
        return codes[0] if codes and codes[0] > 0 else 1
    return 0


def _let_steps_finish(stopped: type[BaseException]) -> None:
    """After a signal of ours the workers finish their step and save, which may take longer than the 30 s
    after which torchrun kills them. A worker's own failure keeps the 30 s: the others may hang."""
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    close = SubprocessContext._close

    def patient(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        close(self, death_sig, STOP_SECONDS if isinstance(sys.exc_info()[1], stopped) else timeout)

    SubprocessContext._close = patient  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(_torchrun(sys.argv[1], sys.argv[2:]))
