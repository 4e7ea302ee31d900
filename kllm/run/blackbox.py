"""Black-box distillation as a stage: an endpoint's answers become the data of a fine-tuning."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kllm.config.parts import DataSource
from kllm.config.stages import DistillStage
from kllm.files import io_errors, write_json
from kllm.run.collect import CollectJob, collect
from kllm.run.collect_client import Sampling
from kllm.run.collect_filter import Rules
from kllm.run.context import StageContext
from kllm.run.rundir import read_json

FILE = "collected.jsonl"
MARKER = "collected.done"
"""Says that collecting came to its end, of which job and by which model."""


def collected(ctx: StageContext, stage: DistillStage, main: bool) -> DistillStage:
    """The stage with the answers of its endpoint as data; asks for those that are not there yet.

    Once collecting came to its end the file is taken as it is and nobody is asked again: questions that
    failed then might be answered now, and a training that goes on needs the data it began with.

    Data that the recipe names itself is mixed in: against forgetting.

    Raises:
        UserError, KllmError: as `collect`.
    """
    job = job_of(ctx, stage)
    if main:
        _collect_once(ctx, stage, job)
    data = [DataSource(path=str(job.out), weight=1.0)]
    if ctx.origins.get(f"{stage.name}.data", "default") != "default":
        data += stage.data
    return stage.model_copy(update={"data": data})


def _collect_once(ctx: StageContext, stage: DistillStage, job: CollectJob) -> None:
    given = [stage.from_endpoint, stage.prompts, stage.collect.model_dump(), ctx.seed]
    asked = hashlib.blake2b(json.dumps(given, sort_keys=True).encode(), digest_size=12).hexdigest()
    marker = ctx.stage_dir / MARKER
    known = read_json(marker)
    if known.get("job") == asked and job.out.exists():
        ctx.reporter.message(
            f"answers of {known.get('model', job.endpoint)}: {job.out}, nobody is asked again"
        )
        return
    with io_errors(ctx.stage_dir):
        ctx.stage_dir.mkdir(parents=True, exist_ok=True)
    report = collect(job, ctx.reporter)
    write_json(marker, {"job": asked, "model": report.model})
    ctx.reporter.table(f"answers of {job.endpoint}", ("", ""), report.rows())


def job_of(ctx: StageContext, stage: DistillStage) -> CollectJob:
    """What to ask, from the stage's options."""
    given: dict[str, Any] = stage.collect.model_dump()
    rules = ("min_chars", "max_chars", "language", "refusals", "max_repetition", "check_answer")
    return CollectJob(
        prompts=stage.prompts,
        endpoint=str(ctx.inputs.get("endpoint", stage.from_endpoint)),
        out=ctx.stage_dir / FILE,
        model=given["model"],
        api_key_env=given["api_key_env"],
        system=given["system_prompt"],
        seed=ctx.seed,
        sampling=Sampling(
            max_tokens=given["max_tokens"],
            temperature=given["temperature"],
            top_p=given["top_p"],
            enable_thinking=given["enable_thinking"],
        ),
        rules=Rules(require=tuple(given["require"]), **{name: given[name] for name in rules}),
        device=ctx.device,
        **{
            name: given[name]
            for name in (
                "keep_system",
                "parallel",
                "samples",
                "keep",
                "best",
                "duplicates",
                "plain_ratio",
                "limit",
            )
        },
    )
