"""Collecting from our own server: what it gives over HTTP is what the same model gives in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serve_client import locked_server, server
from serve_model import model_dir

from kllm.errors import UserError
from kllm.observe.console import QuietReporter
from kllm.run.collect import CollectJob, collect
from kllm.run.collect_client import Sampling
from kllm.run.collect_filter import Rules

RULES = Rules(language="any", refusals=False, max_repetition=1.0)
SAMPLING = Sampling(max_tokens=30, temperature=1.0, top_p=0.9, extra={"stop": ["a", "e", "i"]})


def job(folder: Path, endpoint: str, **options: Any) -> CollectJob:
    folder.mkdir()
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"question number {n}\n" for n in range(8)))
    return CollectJob(
        [str(prompts)], endpoint, folder / "out.jsonl", sampling=SAMPLING, rules=RULES, samples=6, parallel=6,
        device="cpu", backoff=0.05, **options,
    )  # fmt: skip


def kept(job: CollectJob) -> list[Any]:
    return [json.loads(line) for line in job.out.read_text(encoding="utf-8").splitlines()]


def test_the_server_and_the_engine_teach_the_same(tmp_path: Path) -> None:
    remote = job(tmp_path / "remote", server().url)
    report = collect(remote, QuietReporter())
    assert report.model == server().get("/v1/models").json()["data"][0]["id"] and report.retries == 0
    assert report.kept >= 4 and report.completion_tokens > 0 and not report.failed
    local = job(tmp_path / "local", str(model_dir()))
    assert collect(local, QuietReporter()).kept == report.kept
    assert kept(local) == kept(remote)
    assert len({row["messages"][0]["content"] for row in kept(remote)}) == report.kept


def test_a_locked_server_wants_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"it wants a key \(http 401.*set \$OPENAI_API_KEY"):
        collect(job(tmp_path / "none", locked_server().url), QuietReporter())
    monkeypatch.setenv("THE_KEY", locked_server().key or "")
    report = collect(
        job(tmp_path / "key", locked_server().url, api_key_env="THE_KEY", model="first"), QuietReporter()
    )
    assert report.kept
