"""One worker process as the parent sees it: started, stopped between runs, killed, its folder removed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kllm.errors import KllmError, UserError
from kllm.tools.sandbox import syscalls

HERE = Path(__file__).parent
START_SECONDS = 30.0
RUNS_OF_CPU = 20  # the hard CPU limit of a worker, in runs
SCRATCH_FILES = 1000
SCRATCH_SIZES = 16  # the scratch folder's limit, in largest files
UNSAFE = "--unsafe-python runs the code without protection"


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
        seconds: wall clock; then the worker is killed.
        cpu_seconds: processor time (a worker's whole life: 20 times that).
        memory: bytes of address space.
        file_bytes: bytes of one file; the scratch folder holds 16 times that and 1000 entries.
        output: bytes kept of what is printed; the middle is cut.
        open_files: descriptors.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory: int = 512 << 20
    file_bytes: int = 1 << 20
    output: int = 3840  # with what is said about its end, a result of 4 kB
    open_files: int = 32


def landlock_abi() -> int:
    """The kernel's Landlock version, 0 where there is none (also without ctypes)."""
    try:
        from kllm.tools.sandbox import lock
    except (ImportError, OSError):
        return 0
    return lock.landlock_abi()


def check_platform() -> None:
    """Raises UserError, one line, where sandboxed Python cannot be locked."""
    if sys.platform != "linux":
        raise UserError("sandboxed Python needs Linux 5.13 or newer (Landlock)", hint=UNSAFE)
    machine = platform.machine()
    if machine not in syscalls.MACHINES or sys.maxsize < 2**32 or sys.byteorder != "little":
        known = " or ".join(syscalls.MACHINES)
        raise UserError(f"sandboxed Python needs a 64-bit {known} interpreter, not {machine}", hint=UNSAFE)
    if landlock_abi() < 1:
        needs = "needs Linux 5.13 or newer with Landlock switched on, and a container that lets it through"
        raise UserError(f"sandboxed Python {needs}; this is Linux {platform.release()} without", hint=UNSAFE)


def _clear(folder: int) -> str | None:
    """Removes the files and empty folders in an open folder; returns a folder that is left, if one is."""
    left = None
    for entry in list(os.scandir(folder)):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=folder)
            continue
        try:
            os.rmdir(entry.name, dir_fd=folder)
        except OSError:
            left = entry.name
    return left


def remove_scratch(folder: Path) -> None:
    """Removes a folder however deep, step by step: no path grows too long, no recursion, no link followed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    names: list[str] = []  # the way down from `folder` to `here`
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
        here = os.open(folder, flags)
        try:
            while (below := _clear(here)) is not None or names:
                if below is not None:
                    os.chmod(below, 0o700, dir_fd=here)
                    names.append(below)
                step = (
                    os.open("..", flags, dir_fd=here) if below is None else os.open(below, flags, dir_fd=here)
                )
                os.close(here)
                here = step
                if below is None:
                    os.rmdir(names.pop(), dir_fd=here)
        finally:
            os.close(here)
        folder.rmdir()


def scratch_is_full(folder: Path, limit: int) -> bool:
    """Whether the files there hold over `limit` bytes or are too many, too deep, or hidden from us."""
    total = count = 0
    waiting = [str(folder)]
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    count += 1
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if total > limit or count > SCRATCH_FILES:
                        return True
    except FileNotFoundError:
        return False
    except OSError:  # unreadable, or a path beyond PATH_MAX
        return True
    return False


def _discard(owner: int, process: subprocess.Popen[bytes], scratch: Path, fds: tuple[int, ...]) -> None:
    if os.getpid() != owner:  # a forked child of ours that ends
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for fd in fds:
        os.close(fd)
    remove_scratch(scratch)


class Worker:
    """A worker that said it is ready. Its pipes: `requests` to it, `replies` and `output` from it.

    Raises UserError where the lock failed, KllmError where the process did not come up.
    """

    def __init__(self, functions: list[str], limits: Limits, unsafe: bool) -> None:
        if sys.platform == "win32":
            raise UserError("sandboxed Python needs Linux, or macOS with --unsafe-python")
        start = time.perf_counter()
        self.scratch = Path(tempfile.mkdtemp(prefix="kllm-python-"))
        theirs_in, self.requests = os.pipe()
        self.replies, theirs_out = os.pipe()
        self.output, theirs_print = os.pipe()
        self._ended = threading.Event()
        try:
            self.process = self._spawn(theirs_in, theirs_out, theirs_print)
        except OSError as e:
            for fd in (self.requests, self.replies, self.output):
                os.close(fd)
            remove_scratch(self.scratch)
            raise KllmError(f"cannot start {sys.executable}: {e.strerror}") from e
        finally:
            for fd in (theirs_in, theirs_out, theirs_print):
                os.close(fd)
        fds = (self.requests, self.replies, self.output)
        self._discard = weakref.finalize(self, _discard, os.getpid(), self.process, self.scratch, fds)
        weakref.finalize(self, self._ended.set)
        for fd in fds:
            os.set_blocking(fd, False)
        try:
            self.lock_seconds = self._hello(functions, limits, unsafe)
        except BaseException:
            self.kill()
            raise
        self.startup_seconds = time.perf_counter() - start

    def _spawn(self, requests: int, replies: int, output: int) -> subprocess.Popen[bytes]:
        """Starts the interpreter from a thread that lives as long as the worker shall.

        Linux ends the worker when the thread that forked it ends (PDEATHSIG); a server's pool thread may
        end at any time, this one only with the program.
        """
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(HERE / "worker.py")]
        command += [str(requests), str(replies)]
        kept = ("LD_LIBRARY_PATH",)  # some interpreters do not start without
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        started: list[subprocess.Popen[bytes] | OSError] = []
        is_up, ended = threading.Event(), self._ended

        def keep() -> None:
            try:
                started.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        env=environment,
                        cwd=folder,
                        pass_fds=(requests, replies),
                        start_new_session=True,
                    )
                )
            except OSError as e:
                started.append(e)
            is_up.set()
            ended.wait()

        folder = self.scratch
        threading.Thread(target=keep, name="kllm-sandbox", daemon=True).start()
        is_up.wait()
        if isinstance(started[0], OSError):
            self._ended.set()
            raise started[0]
        return started[0]

    def _hello(self, functions: list[str], limits: Limits, unsafe: bool) -> float:
        """Sends the settings, waits for ready; returns the seconds the lock took."""
        cpu = limits.cpu_seconds * RUNS_OF_CPU
        rlimits = {"AS": limits.memory, "FSIZE": limits.file_bytes, "NOFILE": limits.open_files, "CORE": 0}
        if not unsafe:  # threads and processes are refused anyway; this says so twice
            rlimits |= {"NPROC": 0, "MSGQUEUE": 0, "MEMLOCK": 0}
        program = None if unsafe else base64.b64encode(syscalls.program(platform.machine())).decode()
        settings: dict[str, Any] = {
            "lock": str(HERE / "lock.py"),
            "program": program,
            "scratch": str(self.scratch),
            "limits": {name: [value, value] for name, value in rlimits.items()} | {"CPU": [cpu, cpu]},
            "functions": functions,
            "output": limits.output,
            "cpu_seconds": limits.cpu_seconds,
        }
        with contextlib.suppress(BrokenPipeError):  # its end shows below
            os.write(self.requests, json.dumps(settings).encode() + b"\n")
        line, end = b"", time.monotonic() + START_SECONDS
        poller = select.poll()
        poller.register(self.replies, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poller.poll(max(0.0, end - time.monotonic()) * 1000):
                raise KllmError(f"the Python worker did not start within {START_SECONDS:g} s")
            chunk = os.read(self.replies, 1 << 16)
            if not chunk:
                raise KllmError(f"the Python worker did not start: {self._last_words()}")
            line += chunk
        answer = json.loads(line)
        if "refused" in answer:
            refused = " ".join(answer["refused"].split())
            raise UserError(f"sandboxed Python cannot be locked here: {refused}", hint=UNSAFE)
        return float(answer["ready"])

    def _last_words(self) -> str:
        try:
            text = os.read(self.output, 1 << 16).decode("utf-8", "replace").strip()
        except BlockingIOError:
            text = ""
        return text.rpartition("\n")[2] or "it ended without a word"

    def signal(self, number: int) -> None:
        """A signal to the worker and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def ended_by_itself(self, wait: float = 0.5) -> int | None:
        """Its return code (negative: a signal) if it ends within `wait` seconds without our doing."""
        try:
            return self.process.wait(wait)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kills the group, closes the pipes, removes the scratch. Idempotent."""
        self._discard()
        self._ended.set()
