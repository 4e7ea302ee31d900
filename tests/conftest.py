"""Shared fixtures. Everything here is offline, deterministic and small."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent


def pytest_configure() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture(scope="session")
def data_kit() -> Path:
    """The folder with real data; tests that use it are skipped where it is absent."""
    kit = Path(os.environ.get("KLLM_DATA_KIT", REPO.parent / "shared" / "data"))
    if not (kit / "MANIFEST.json").exists():
        pytest.skip("the data kit is not here")
    return kit
