"""Two processes on one machine through the real command line: the curve of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import TINY, kllm


def curve(out: Path) -> list[dict]:
    return [json.loads(line) for line in next(out.glob("*-pretrain/metrics.jsonl")).read_text().splitlines()]


def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    rows = [{"text": f"row {i} of the file, {i * 37 % 101} and {i * i}"} for i in range(300)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for nproc in ("1", "2"):
        kllm(
            "pretrain", "--data", "texts.jsonl", "--out", f"run{nproc}", *TINY, "--steps", "6", "--seq-len", "64",
            "--batch-tokens", "512", "--nproc", nproc, "--set", "tokenizer.vocab_size=320",
            "--train.log_every", "1", "-q", cwd=tmp_path,
        )  # fmt: skip
    one, two = curve(tmp_path / "run1"), curve(tmp_path / "run2")
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        for key in ("train/loss", "val/loss", "train/tokens", "opt/grad_norm"):
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=1e-4), (key, a["step"])
    status = json.loads((tmp_path / "run2" / "02-pretrain" / "status.json").read_text())
    assert status["processes"] == 2
