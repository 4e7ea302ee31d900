"""What we write, in the other major version of transformers; it is fetched, so this is a slow test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
TESTS = Path(__file__).parents[1]
OTHER = {"4": "transformers>=5,<6", "5": "transformers>=4.56,<5"}


@pytest.mark.slow
def test_folders_load_in_the_other_version(tmp_path: Path) -> None:
    wanted = OTHER[transformers.__version__.split(".")[0]]
    target = tmp_path / "other"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), wanted]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip(f"{wanted} cannot be fetched")
    env = {**os.environ, "PYTHONPATH": str(target)}
    asked = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert found.split(".")[0] != transformers.__version__.split(".")[0]
    files = ["parity/test_model_transformers.py", "parity/test_minimind_pth.py", "e2e/test_convert.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        *(str(TESTS / f) for f in files),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
