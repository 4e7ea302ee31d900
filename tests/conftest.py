"""Shared fixtures. Everything here is offline, deterministic and small."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent


def pytest_configure() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # tiny models: more threads only wait for each other, above all beside other test workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_kit() -> Path:
    """The folder with real data; tests that use it are skipped where it is absent."""
    kit = Path(os.environ.get("KLLM_DATA_KIT", REPO.parent / "shared" / "data"))
    if not (kit / "MANIFEST.json").exists():
        pytest.skip("the data kit is not here")
    return kit
