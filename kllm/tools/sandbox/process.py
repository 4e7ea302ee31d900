"""One worker process as the parent sees it: started, talked to, stopped between runs, killed."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import platform
import select
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kllm.errors import KllmError, UserError
from kllm.tools.sandbox import syscalls
from kllm.tools.sandbox.held import Held, WorkerClosed, return_code
from kllm.tools.sandbox.scratch import remove_stale

HERE = Path(__file__).parent
START_SECONDS = 30.0
RUNS_OF_CPU = 20  # the hard CPU limit of a worker, in runs
CHUNK = 1 << 16
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


@lru_cache(maxsize=1)
def _tidy() -> None:
    """Once per process: what others left."""
    remove_stale()


def _not_started(error: OSError) -> KllmError:
    what = error.strerror or str(error)
    if error.filename:
        what += f": {error.filename}"
    many = error.errno in (errno.EMFILE, errno.ENFILE)
    hint = "`ulimit -n` says how many this process may have" if many else None
    return KllmError(f"cannot start the Python worker: {what}", hint=hint)


class Worker:
    """A worker that said it is ready. Its pipes: `requests` to it, `replies` and `output` from it.

    Raises UserError where the lock failed, KllmError where the process did not come up.
    """

    def __init__(self, functions: list[str], limits: Limits, unsafe: bool) -> None:
        if sys.platform == "win32":
            raise UserError("sandboxed Python needs Linux, or macOS with --unsafe-python")
        start = time.perf_counter()
        self._held = Held()
        weakref.finalize(self, self._held.close)
        try:
            _tidy()
            self.scratch = self._held.make_scratch()
            self.requests, self.replies, self.output = self._held.make_pipes()
            self.process = self._spawn()
            self.lock_seconds = self._hello(functions, limits, unsafe)
        except OSError as error:
            self.kill()
            raise _not_started(error) from error
        except BaseException:
            self.kill()
            raise
        self.startup_seconds = time.perf_counter() - start

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Starts the interpreter from a thread that lives as long as the worker shall.

        Linux ends the worker when the thread that forked it ends (PDEATHSIG); a server's pool thread may
        end at any time, this one only with the program. Who waits here may be interrupted; what the thread
        starts then goes at once.
        """
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(HERE / "worker.py")]
        kept = ("LD_LIBRARY_PATH",)  # some interpreters do not start without
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        failed: list[Exception] = []
        is_up, held, folder = threading.Event(), self._held, self.scratch

        def start(requests: int, replies: int, output: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [*command, str(requests), str(replies)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=folder,
                pass_fds=(requests, replies),
                start_new_session=True,
            )

        def keep() -> None:
            try:
                held.start(start)
            except Exception as error:
                failed.append(error)
            finally:
                is_up.set()
            held.ended.wait()

        try:
            threading.Thread(target=keep, name="kllm-sandbox", daemon=True).start()
        except RuntimeError as error:
            raise KllmError(f"cannot start the Python worker: {error}") from error
        is_up.wait()
        if failed:
            raise failed[0]
        assert held.process is not None
        return held.process

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
            self.write(self.requests, json.dumps(settings).encode() + b"\n")
        line, end = b"", time.monotonic() + START_SECONDS
        poller = select.poll()
        poller.register(self.replies, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poller.poll(max(0.0, end - time.monotonic()) * 1000):
                raise KllmError(f"the Python worker did not start within {START_SECONDS:g} s")
            chunk = self.read(self.replies)
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
            text = self.read(self.output).decode("utf-8", "replace").strip()
        except BlockingIOError:
            text = ""
        return text.rpartition("\n")[2] or "it ended without a word"

    def read(self, fd: int) -> bytes:
        """What is there of one of the pipes. Raises BlockingIOError: nothing; WorkerClosed: after `kill`."""
        with self._held.use():
            return os.read(fd, CHUNK)

    def write(self, fd: int, data: bytes | bytearray) -> int:
        """How much of it the pipe took; raises as `read`."""
        with self._held.use():
            return os.write(fd, data)

    def check(self) -> None:
        """Raises WorkerClosed after `kill`."""
        with self._held.use():
            pass

    @property
    def unread(self) -> bytes:
        """Output that was still in the pipe when the worker was killed."""
        return self._held.unread

    def signal(self, number: int) -> None:
        """A signal to the worker and what it started; to nobody after `kill`."""
        with contextlib.suppress(WorkerClosed, ProcessLookupError, PermissionError), self._held.use():
            os.killpg(self.process.pid, number)

    def ended_by_itself(self, wait: float = 0.5) -> int | None:
        """Its return code (negative: a signal) if it ends within `wait` seconds without our doing."""
        end = time.monotonic() + wait
        while True:
            with self._held.use():
                code = return_code(self.process)
            if code is not None or time.monotonic() >= end:
                return code
            time.sleep(0.005)

    def kill(self) -> None:
        """Kills the group, closes the pipes, removes the scratch. Idempotent, from any thread."""
        self._held.close()
