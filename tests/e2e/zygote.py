"""A process that has torch and kllm imported and forks for every command: importing them anew takes most of a
command's time.

Over a socket (its number is the first argument) comes a line of JSON per command ({args, cwd, env, session,
terminal, code}) with four file descriptors: the command's own three, and one for its exit code. The answer is its
process id.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import termios
import threading
import traceback
from typing import Any

STANDARD = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


def run(job: dict[str, Any]) -> int:
    """In the child, whose standard files are in place: becomes the command line."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path.insert(0, job["cwd"])
    if job["session"]:
        os.setsid()
    if job["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number, name, mode in STANDARD:
        lines = number == 2 or os.isatty(number)
        stream = open(number, mode, buffering=1 if lines else -1, encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["kllm", *job["args"]]
    code = 0
    try:
        exec(job["code"], {"__name__": "__main__"})
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def child(job: dict[str, Any], files: list[int], *foreign: int) -> None:
    """Ends with the command; `foreign` are the zygote's own files."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored
        _die_with_parent()
        for number in range(3):
            os.dup2(files[number], number)
        for file in (*files, *foreign):
            os.close(file)
        code = run(job)
    finally:
        os._exit(code)


def _die_with_parent() -> None:
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def prepare(*imported: str) -> None:
    """Imports what commands need."""
    import safetensors.torch
    import tokenizers
    import torch

    import kllm

    assert torch and tokenizers and safetensors
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure

        Figure().savefig(io.BytesIO())  # which imports the rest of it
    for module in pkgutil.walk_packages(kllm.__path__, "kllm."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # a command that needs it will say so
                importlib.import_module(module.name)
    if "transformers" in imported:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        assert AutoModelForCausalLM and LlamaForCausalLM
    else:
        assert "huggingface_hub" not in sys.modules, "it reads the environment when it is imported"
    gc.collect()
    gc.freeze()  # a collection in a child must not copy all these pages


def serve(channel: socket.socket) -> None:
    """Until the other side closes."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running: dict[int, int] = {}
    text = b""
    files: list[int] = []
    while True:
        ready = select.select([channel, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    file = running.pop(pid)
                    os.write(file, b"%d\n" % os.waitstatus_to_exitcode(status))
                    os.close(file)
        if channel in ready:
            got, more, _, _ = socket.recv_fds(channel, 1 << 20, 4)
            if not got:
                return
            text, files = text + got, files + more
            if not text.endswith(b"\n"):
                continue
            job = json.loads(text)
            pid = os.fork()
            if pid == 0:
                child(job, files, channel.fileno(), woken, wake, *running.values())
            running[pid] = files.pop()
            for file in files:
                os.close(file)
            channel.sendall(b"%d\n" % pid)
            text, files = b"", []


if __name__ == "__main__":
    prepare(*sys.argv[2:])
    serve(socket.socket(fileno=int(sys.argv[1])))
