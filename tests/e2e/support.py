"""The real command line in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

KLLM = [sys.executable, "-m", "kllm"]
TINY = [
    "--preset", "k-tiny", "--hidden-size", "64", "--model.intermediate_size", "96",
    "--model.num_attention_heads", "4", "--model.num_key_value_heads", "2", "--layers", "2",
]  # fmt: skip
MAIN = "from kllm.cli.app import main; main()"


def environment() -> dict[str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env.pop("KLLM_DEBUG", None)
    return env


def _hub(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("HF_")}


_HUB = _hub(os.environ)  # what the hub's library reads when it is imported


@functools.cache
def _zygote(*imported: str) -> socket.socket:
    """See zygote.py; it and its children end with us, when our side of the socket closes."""
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    command = [sys.executable, str(Path(__file__).with_name("zygote.py")), str(number), *imported]
    subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, pass_fds=[number])
    theirs.close()
    return ours


def _file(asked: int) -> tuple[int, IO[str] | None]:
    """A descriptor to give away, and our end where it is a pipe."""
    if asked == subprocess.PIPE:
        ours, theirs = os.pipe()
        return theirs, open(ours, encoding="utf-8")  # noqa: PTH123
    return os.open(os.devnull, os.O_RDWR) if asked == subprocess.DEVNULL else os.dup(asked), None


class Command:
    """`kllm ARGS` in a process of its own, forked from the zygote; used like a `subprocess.Popen`.

    `session` gives it a session of its own, `terminal` makes its stdin its controlling terminal; `code` is run
    instead of the command line's main function.
    """

    def __init__(
        self,
        *args: str | Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        session: bool = False,
        terminal: bool = False,
        code: str = MAIN,
    ) -> None:
        self.args = list(map(str, args))
        self.returncode: int | None = None
        wanted = dict(environment() if env is None else env)
        job = {"args": self.args, "cwd": str(cwd), "env": wanted, "code": code}
        job |= {"session": session or terminal, "terminal": terminal}
        zygote = _zygote("transformers") if _hub(wanted) == _HUB else _zygote()
        self._ended, status = os.pipe()
        files, pipes = zip(*map(_file, (stdin, stdout, stderr)), strict=True)
        self.stdout, self.stderr = pipes[1:]
        socket.send_fds(zygote, [json.dumps(job).encode() + b"\n"], [*files, status])
        for file in (*files, status):
            os.close(file)
        self.pid = int(zygote.recv(100))

    def poll(self) -> int | None:
        return self._look(0)

    def _look(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], seconds)[0]:
            said = os.read(self._ended, 100)
            os.close(self._ended)
            assert said, "the zygote ended"
            self.returncode = int(said)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def kllm(
    *args: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 180,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Runs `kllm ARGS` and returns its completed process; output as text."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        files = {"stdin": given.fileno(), "stdout": out.fileno(), "stderr": err.fileno()}
        command = Command(*args, cwd=cwd, env=env, **files)
        try:
            command.wait(timeout)
        finally:
            command.kill()
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode("utf-8"))
    result = subprocess.CompletedProcess(command.args, command.wait(), *said)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result
