"""The real command line in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KLLM = [sys.executable, "-m", "kllm"]
TINY = [
    "--preset", "k-tiny", "--model.hidden_size", "64", "--model.intermediate_size", "96",
    "--model.num_attention_heads", "4", "--model.num_key_value_heads", "2", "--model.num_hidden_layers", "2",
]  # fmt: skip


def environment() -> dict[str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env.pop("KLLM_DEBUG", None)
    return env


def _hub(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("HF_")}


_HUB = _hub(os.environ)  # what the hub's library reads when it is imported


@functools.cache
def _zygote(*imported: str) -> subprocess.Popen[str]:
    """See zygote.py; it ends with us, when its stdin closes."""
    command = [sys.executable, str(Path(__file__).with_name("zygote.py")), *imported]
    return subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def kllm(
    *args: str | Path, cwd: Path, check: bool = True, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Runs `kllm ARGS` and returns its completed process; output as text."""
    words = list(map(str, args))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        job: dict[str, Any] = {
            "args": words,
            "cwd": str(cwd),
            "env": environment(),
            "out": str(out),
            "err": str(err),
        }
        zygote = _zygote("transformers") if _hub(job["env"]) == _HUB else _zygote()
        assert zygote.stdin is not None and zygote.stdout is not None
        zygote.stdin.write(json.dumps(job) + "\n")
        zygote.stdin.flush()
        if not select.select([zygote.stdout], [], [], timeout)[0]:
            zygote.kill()
            _zygote.cache_clear()
            raise subprocess.TimeoutExpired(words, timeout, out.read_text(), err.read_text())
        code = int(zygote.stdout.readline())
        said = out.read_text("utf-8"), err.read_text("utf-8")
    result = subprocess.CompletedProcess(words, code, *said)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result
