"""The real command line in a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KLLM = [sys.executable, "-m", "kllm"]
TINY = [
    "--preset", "k-tiny", "--model.hidden_size", "64", "--model.intermediate_size", "96",
    "--model.num_attention_heads", "4", "--model.num_key_value_heads", "2", "--model.num_hidden_layers", "2",
]  # fmt: skip


def environment() -> dict[str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env.pop("KLLM_DEBUG", None)
    return env


def kllm(
    *args: str | Path, cwd: Path, check: bool = True, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Runs `kllm ARGS` and returns its completed process; output as text."""
    result = subprocess.run(
        [*KLLM, *map(str, args)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result
