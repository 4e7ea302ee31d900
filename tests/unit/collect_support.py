"""Prompts, a job and a teacher's sentences for the tests of collecting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from collect_fake_server import question, said
from data_tools import write_jsonl

from kllm.observe.console import QuietReporter
from kllm.run.collect import CollectJob, collect

CITIES = [
    "Paris",
    "Rome",
    "Oslo",
    "Bern",
    "Riga",
    "Kyiv",
    "Lima",
    "Cairo",
    "Quito",
    "Tunis",
    "Delhi",
    "Seoul",
]


def ask_of(city: str) -> str:
    return f"What is {city} known for?"


def tell(body: dict[str, Any], before: int = 0) -> Any:
    """A different sentence for each question."""
    city = question(body).split()[2]
    return said(f"{city} is known for {city[::-1].lower()} and its {len(city)} towers.")


def prompts_file(folder: Path, count: int = 6) -> Path:
    return write_jsonl(folder / "prompts.jsonl", [{"prompt": ask_of(city)} for city in CITIES[:count]])


def job_of(folder: Path, url: str, **changes: Any) -> CollectJob:
    given: dict[str, Any] = {"prompts": [str(folder / "prompts.jsonl")], "endpoint": url}
    given |= {"out": folder / "out.jsonl", "backoff": 0.01, "retries": 3, "timeout": 5.0, "parallel": 4}
    return CollectJob(**{**given, **changes})


def run(folder: Path, url: str, **changes: Any) -> Any:
    return collect(job_of(folder, url, **changes), QuietReporter())


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers_of(path: Path) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows_of(path)]
