"""`kllm chat` in a real pseudo-terminal and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from chat_support import chat_model
from support import KLLM, Command, kllm

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONUTF8": "1"}
ENV.pop("NO_COLOR", None)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("chat") / "m")


def command(model_dir, max_tokens=8, prompt=None):
    options = ["--max-tokens", str(max_tokens), "--temperature", "0", "--device", "cpu"]
    options += ["--prompt", prompt] if prompt else []
    return ["chat", str(model_dir), *options]


class Terminal:
    """`kllm` on its own controlling terminal, with what it printed so far."""

    def __init__(self, args, fresh):
        self.master, slave = pty.openpty()

        def own_terminal():
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background inherit that it is ignored
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        files = {"stdin": slave, "stdout": slave, "stderr": slave, "env": ENV}
        if fresh:
            self.process = subprocess.Popen([*KLLM, *args], preexec_fn=own_terminal, **files)
        else:
            self.process = Command(*args, cwd=Path.cwd(), terminal=True, **files)
        os.close(slave)
        self.text = ""
        self._at = 0

    def read(self, seconds):
        if select.select([self.master], [], [], seconds)[0]:
            try:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")
            except OSError:  # Linux says this at the end of the other side
                return False
        return True

    def expect(self, wanted, seconds=40):
        """Waits for `wanted` after what was last waited for; returns what came before it."""
        end = time.monotonic() + seconds
        while wanted not in self.text[self._at :]:
            assert time.monotonic() < end, f"no {wanted!r} in {self.text[self._at :]!r}"
            if not self.read(0.2) and wanted not in self.text[self._at :]:
                pytest.fail(f"ended without {wanted!r}: {self.text[self._at :]!r}")
        found = self.text.index(wanted, self._at)
        before, self._at = self.text[self._at : found], found + len(wanted)
        return before

    def grow(self, characters):
        """Waits for that much more output."""
        end = time.monotonic() + 40
        while len(self.text) - self._at < characters:
            assert time.monotonic() < end and self.read(0.2), self.text[self._at :]

    def type(self, text):
        os.write(self.master, text.encode())

    def ctrl_c(self):
        """Presses Ctrl-C once the program waits for a key.

        Python's readline misses a signal that comes just before it starts to wait, until the next key.
        """
        status = Path(f"/proc/{self.process.pid}/stat")
        asleep = 0
        while asleep < 4:
            time.sleep(0.05)
            waits = not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "S"
            asleep = asleep + 1 if waits else 0
        self.type("\x03")

    def close(self):
        while self.process.poll() is None and self.read(0.2):
            pass
        code = self.process.wait(20)
        os.close(self.master)
        return code


@pytest.fixture
def terminal():
    opened = []

    def start(args, fresh=False):
        opened.append(Terminal(args, fresh))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGKILL)
            one.process.wait()


def test_a_session_with_interrupts(model_dir, terminal):
    tty = terminal(command(model_dir, max_tokens=7000), fresh=True)
    tty.expect("/help lists the commands")
    tty.expect(">>> ")
    tty.type("where is the cat?\r")
    tty.expect("cat?\r\n")
    tty.grow(60)
    tty.type("\x03")
    tty.expect("[cut]", 10)
    tokens = int(tty.expect(" tokens").split("m")[-1].split()[-1])
    assert 0 < tokens < 6000
    tty.expect(">>> ")
    tty.type("/set max_tokens=6\r")
    tty.expect("max_tokens=6")
    tty.expect(">>> ")
    tty.type("你好，猫在哪里？\r")  # another question, in Chinese
    tty.expect("6 tokens")
    tty.expect(">>> ")
    tty.type("/stats\r")
    tty.expect("2 turns")
    tty.expect(">>> ")
    tty.type("/retry\r")
    tty.expect("6 tokens")
    tty.expect(">>> ")
    tty.type("/undo\r")
    tty.expect("forgot: 你好，猫在哪里？")
    tty.expect(">>> ")
    tty.type("/undo\r")
    tty.expect("forgot: where is the cat?")
    tty.expect(">>> ")
    tty.type("/nonsense\r")
    tty.expect("error: unknown command /nonsense")
    tty.expect(">>> ")
    tty.type("\x04")
    assert tty.close() == 0
    assert "Traceback" not in tty.text


def test_ctrl_c_at_the_prompt_hints_then_leaves(model_dir, terminal):
    tty = terminal(command(model_dir))
    tty.expect(">>> ")
    tty.type("half a line")
    tty.expect("half a line")
    tty.ctrl_c()  # throws the line away, no more
    tty.expect(">>> ")
    assert "Ctrl-C again" not in tty.text
    tty.ctrl_c()
    tty.expect("Ctrl-C again or Ctrl-D leaves")
    tty.expect(">>> ")
    tty.type("hi\r")  # a word between two presses: they do not add up
    tty.expect("8 tokens")
    tty.expect(">>> ")
    tty.ctrl_c()
    tty.expect("Ctrl-C again")
    tty.expect(">>> ")
    tty.ctrl_c()
    assert tty.close() == 130
    assert "Traceback" not in tty.text


def test_a_pipe_gets_plain_text(model_dir):
    done = kllm(*command(model_dir), cwd=Path.cwd(), stdin="你好\n", env=ENV)
    assert done.stdout.endswith("\n") and len(done.stdout) > 3
    assert "\x1b" not in done.stdout + done.stderr and ">>>" not in done.stdout
    assert done.stderr == "note: cut after 8 tokens\n"


def test_ctrl_c_ends_a_one_shot_answer_with_130(model_dir):
    options = command(model_dir, max_tokens=7000, prompt="go")
    process = Command(*options, cwd=Path.cwd(), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.stdout.read(), process.stderr.read()
    assert process.wait(20) == 130
    assert out.endswith("\n") and "Traceback" not in err
