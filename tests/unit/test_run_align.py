"""What preferences and distillation learn from: references, teachers, the model's own answers, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_support import chat_model
from data_tools import chat, write_jsonl

from kllm.config.load import make_recipe
from kllm.observe.console import QuietReporter
from kllm.run.context import StageContext
from kllm.run.training import TrainingRun

SIZES = [
    "dataset.seq_len=64", "train.batch_tokens=256", "train.micro_batch_tokens=256", "train.steps=2",
    "train.compile=off", "train.dtype=float32", "log.sinks=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("align")
    chat_model(where / "model", context=512)
    write_jsonl(where / "chats.jsonl", [chat(f"the cat {i}", "the mat") for i in range(12)])
    pairs = [{"prompt": f"the cat {i}", "chosen": "the mat", "rejected": "a fish"} for i in range(30)]
    write_jsonl(where / "pairs.jsonl", pairs)
    return where


def started(lab: Path, kind: str, *more: str, out: Path | None = None) -> TrainingRun:
    """A stage up to its first step."""
    data = "pairs.jsonl" if kind == "dpo" else "chats.jsonl"
    given = [f"data={lab / data}", f"model.path={lab / 'model'}", f"dataset.cache_dir={lab / 'cache'}"]
    if kind == "distill":
        given.append(f"teacher.path={lab / 'model'}")
    recipe = make_recipe(kind, [*given, *SIZES, *more]).recipe
    out = out or lab / "run"
    inputs = {"model": lab / "model"} | ({"teacher": lab / "model"} if kind == "distill" else {})
    stage: Any = recipe.stages[0]
    return TrainingRun(StageContext(recipe, stage, out / "01", out, inputs, QuietReporter(), device="cpu"))


def test_a_reference_is_of_the_model_as_it_is_trained(lab: Path) -> None:
    plain, other = (started(lab, "dpo", *more) for more in ((), ("model.rope_theta=100",)))
    then, now = (run.source.take(1)[0].extras["reference"] for run in (plain, other))
    assert (then - now).abs().max() > 1e-3
    assert (then - started(lab, "dpo").source.take(1)[0].extras["reference"]).abs().max() == 0


def test_a_teacher_is_kept_by_the_precision_it_ran_in(lab: Path) -> None:
    kinds = [started(lab, "distill", "distill.top_k=4", f"train.dtype={x}") for x in ("float32", "bfloat16")]
    then, now = (run.source.take(1)[0].extras["teacher_logprobs"] for run in kinds)
    assert (then - now).abs().max() > 0
