"""`kllm` on a terminal of its own, and what stands on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte
from support import KLLM, Command

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "PYTHONUTF8": "1"}
for _name in ("NO_COLOR", "COLUMNS", "LINES"):
    ENV.pop(_name, None)


class _Screen(pyte.HistoryScreen):
    """Answers the programs that ask where the cursor is."""

    def __init__(self, columns: int, lines: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, lines, history=2000)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)

    def select_graphic_rendition(self, *attributes: int, **private: bool) -> None:
        if not private:  # pyte does not know that this one sets how keys are sent
            super().select_graphic_rendition(*attributes)


class Terminal:
    """A program and its screen.

    Args:
        args: of `kllm`.
        stdout: a file that it writes to instead.
        fresh: a new interpreter instead of a fork: signals reach it as they reach a user's.
    """

    def __init__(
        self,
        args: list[str],
        *,
        cwd: Path,
        env: Mapping[str, str] = ENV,
        fresh: bool = False,
        columns: int = 80,
        lines: int = 40,
        stdout: Path | None = None,
    ) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

        def own_terminal() -> None:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background inherit that it is ignored
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        out = slave if stdout is None else os.open(stdout, os.O_CREAT | os.O_WRONLY)
        files = {"stdin": slave, "stdout": out, "stderr": slave, "env": dict(env), "cwd": cwd}
        if fresh:
            self.process = subprocess.Popen([*KLLM, *args], preexec_fn=own_terminal, **files)
        else:
            self.process = Command(*args, terminal=True, **files)
        os.close(slave)
        self._screen = _Screen(columns, lines, lambda data: self.type(data))
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self.ended = False

    # -- looking -------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """All that was ever on the screen, what has scrolled away included, without the empty end."""
        columns = self._screen.columns
        history = ["".join(line[i].data for i in range(columns)) for line in self._screen.history.top]
        lines = [*history, *self._screen.display]
        return "\n".join(line.rstrip() for line in lines).rstrip()

    @property
    def line(self) -> str:
        """The line that the cursor is on."""
        return self._screen.display[self._screen.cursor.y].rstrip()

    @property
    def column(self) -> int:
        """Where the cursor is, from 0."""
        return self._screen.cursor.x

    def read(self, seconds: float) -> None:
        """Takes what comes within that time."""
        if self.ended or not select.select([self.master], [], [], seconds)[0]:
            return
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux says this at the end of the other side
            data = b""
        self.ended = not data
        self.raw += data
        self._stream.feed(data)

    def until(self, condition: Callable[[], bool], seconds: float = 40) -> None:
        """Waits for it."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it did not happen:\n{self.text}"
            assert not self.ended, f"it ended:\n{self.text}"
            self.read(0.1)

    def sees(self, wanted: str, seconds: float = 40, times: int = 1) -> None:
        """Waits until that has been on the screen so often."""
        self.until(lambda: self.text.count(wanted) >= times, seconds)

    def ready(self) -> None:
        """Waits for an empty prompt."""
        self.until(lambda: self.line == ">>>")

    # -- typing --------------------------------------------------------------------------------------

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self.master, text.encode())

    def say(self, text: str) -> None:
        """Says something at an empty prompt."""
        self.ready()
        self.type(text)
        self.until(lambda: self.line != ">>>")
        self.type("\r")

    def close(self, seconds: float = 30) -> int:
        """Waits for the end; the exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
            self.read(0.1)
        code = self.process.wait(20)
        os.close(self.master)
        return code

    def kill(self) -> None:
        """Whatever it is doing."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
