"""`--dry-run`: what would happen, what it costs, and what the model would see. Touches no weights.

All static checks run first. Sizes come from arithmetic, time from the last measured speed on this
machine; what cannot be known yet is said to be unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kllm.config.load import Loaded
from kllm.config.recipe import stage_kind
from kllm.config.stages import Stage, TrainingStage
from kllm.data import hub
from kllm.data.sources import expand, is_builtin
from kllm.errors import UserError
from kllm.model.presets import ModelShape, count_parameters, flops_per_token
from kllm.observe import units
from kllm.observe.reporting import Reporter
from kllm.run import checks, speeds
from kllm.run.decide import Decision, decide
from kllm.run.inputs import producers
from kllm.run.rundir import RunDir
from kllm.run.shapes import AdapterSize, Memory, planned_shape, steps_and_tokens, training_memory

BYTES_PER_TOKEN = 3.5
"""Rough size of a token in UTF-8 bytes, for data that was never tokenised."""
COMPRESSION = 3.0


@dataclass(frozen=True)
class StagePlan:
    """What one stage would do. None = unknown, or nothing to tell."""

    decision: Decision
    kind: str
    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    guessed: bool = False
    """tokens are a guess from file sizes."""
    flops: float | None = None
    memory: Memory | None = None
    seconds: float | None = None


def make_plan(loaded: Loaded, run: RunDir, chosen: list[str], forced: list[str]) -> list[StagePlan]:
    """The plan of the stages `chosen`; nothing is written or downloaded.

    Raises:
        UserError: something is wrong that can be seen before the start.
    """
    checks.check_all(loaded, run, chosen)
    plans: list[StagePlan] = []
    busy: set[str] = set()
    for name in chosen:
        decision = decide(loaded.recipe, name, run, loaded.origins, force=name in forced, fetch=False)
        after = [p for p in producers(loaded.recipe, name) if p in busy]
        if after and decision.action in ("skip", "resume", "rerun"):
            reason = f"after {', '.join(after)}, if its result changes"
            decision = Decision(name, decision.dirname, "wait", reason, decision.state, decision.inputs)
        if decision.action != "skip":
            busy.add(name)
        plans.append(_stage_plan(loaded, run, decision))
    return plans


def _stage_plan(loaded: Loaded, run: RunDir, decision: Decision) -> StagePlan:
    recipe, stage = loaded.recipe, loaded.recipe.stage(decision.name)
    kind = stage_kind(stage)
    directories = {what: given.directory for what, given in decision.inputs.items()}
    shape = planned_shape(recipe, stage.name, directories.get("model"), directories.get("tokenizer"))
    if not isinstance(stage, TrainingStage):
        return StagePlan(decision, kind, parameters=count_parameters(shape) if shape else None)
    epoch, guessed = epoch_tokens(stage, run, decision)
    steps, tokens = steps_and_tokens(stage, epoch)
    guessed = guessed and stage.train.steps is None and stage.train.tokens is None
    if shape is None:
        return StagePlan(decision, kind, steps=steps, tokens=tokens, guessed=guessed)
    adapter = _adapter_size(stage, shape)
    each = flops_per_token(shape, stage.dataset.seq_len, adapter=adapter.active if adapter else None)
    flops = each * tokens if tokens else None
    speed = speeds.recall(run.path, recipe.device, recipe.nproc)
    return StagePlan(
        decision,
        kind,
        parameters=count_parameters(shape),
        steps=steps,
        tokens=tokens,
        guessed=guessed,
        flops=flops,
        memory=stage_memory(stage, shape, recipe.device, adapter),
        seconds=flops / speed["flops_s"] if flops and speed else None,
    )


def _adapter_size(stage: TrainingStage, shape: ModelShape) -> AdapterSize | None:
    if stage.adapter is None:
        return None
    from kllm.run.assemble import planned_adapter  # torch: only where an adapter is trained

    return planned_adapter(stage.adapter, shape)


def stage_memory(
    stage: TrainingStage, shape: ModelShape, device: str, adapter: AdapterSize | None = None
) -> Memory:
    """Memory of one process; half-size activations where the forward pass is in bfloat16."""
    half = stage.train.dtype == "bfloat16" or (stage.train.dtype == "auto" and device.startswith("cuda"))
    rows = max(1, stage.train.micro_batch_tokens // stage.row_tokens)
    return training_memory(
        shape,
        min(rows * stage.row_tokens, stage.train.batch_tokens),
        optimizer=stage.optim.name,
        activation_bytes=2 if half else 4,
        checkpointing=stage.train.activation_checkpointing,
        loss_chunk=stage.train.loss_chunk,
        adapter=adapter,
    )


def epoch_tokens(stage: TrainingStage, run: RunDir, decision: Decision) -> tuple[int | None, bool]:
    """Tokens of one epoch, as an earlier attempt counted them or, guessed (True), from file sizes."""
    counted = decision.status.get("data")
    if isinstance(counted, dict) and isinstance(counted.get("tokens"), int) and not decision.changes:
        return counted["tokens"], False
    sizes = [_text_bytes(source.path, stage.dataset.max_bytes) for source in stage.data]
    if any(size is None for size in sizes):
        return None, True
    return round(sum(size or 0 for size in sizes) / BYTES_PER_TOKEN), True


def _text_bytes(source: str, limit: int | None) -> float | None:
    if is_builtin(source) or (hub.is_hub_id(source) and not Path(source).exists()):
        return None
    size = 0.0
    for file in expand(source):
        plain = file.suffix in (".jsonl", ".json", ".txt", ".md")
        size += file.stat().st_size * (1.0 if plain else COMPRESSION)
    return min(size, limit) if limit else size


def show_plan(loaded: Loaded, run: RunDir, chosen: list[str], forced: list[str], reporter: Reporter) -> None:
    """Prints the plan: stages, memory by part, and one sample of each training stage's data."""
    recipe = loaded.recipe
    plans = make_plan(loaded, run, chosen, forced)
    processes = f", {recipe.nproc} processes" if recipe.nproc > 1 else ""
    columns = ("stage", "state", "parameters", "steps", "tokens", "compute", "memory", "time")
    title = f"{recipe.name} -> {run.path} (seed {recipe.seed}, device {recipe.device}{processes})"
    reporter.table(title, columns, [_row(plan) for plan in plans])
    parts = [_memory_row(plan) for plan in plans if plan.memory is not None]
    if parts:
        head = ("training memory", "weights", "gradients", "optimizer", "activations (est.)", "total")
        reporter.table("", head, parts)
    speed = speeds.recall(run.path, recipe.device, recipe.nproc)
    if speed:
        rate = f"{units.work(speed['flops_s'])}/s"
        reporter.message(f"time from {rate} measured in {speed.get('run')} on {speed.get('device')}")
    elif parts:
        reporter.message("time: unknown, nothing was trained on this device yet")
    for plan in plans:
        stage = recipe.stage(plan.decision.name)
        if plan.decision.action != "skip" and isinstance(stage, TrainingStage):
            _show_sample(stage, plan.decision, reporter)
    reporter.done("nothing was started; leave out --dry-run to run it")


def _row(plan: StagePlan) -> tuple[str, ...]:
    decision = plan.decision
    about = "" if plan.tokens is None else f"{'~' if plan.guessed else ''}{units.count(plan.tokens)}"
    steps = "" if plan.steps is None else f"{'~' if plan.guessed else ''}{plan.steps:,}"
    trains = plan.kind in checks.DISTRIBUTED
    unknown = "unknown" if trains else ""
    return (
        decision.name,
        _state(decision),
        f"{plan.parameters:,}" if plan.parameters is not None else unknown,
        steps or unknown,
        about or unknown,
        units.work(plan.flops) if plan.flops else unknown,
        units.size(plan.memory.total) if plan.memory else unknown,
        units.duration(plan.seconds) if plan.seconds else unknown,
    )


def _state(decision: Decision) -> str:
    words = {
        "skip": "done",
        "run": "to run",
        "resume": "to continue",
        "rerun": "to run again",
        "wait": "to run",
    }
    return f"{words[decision.action]}: {decision.reason}"


def _memory_row(plan: StagePlan) -> tuple[str, ...]:
    memory = plan.memory
    assert memory is not None
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
    return (plan.decision.name, *map(units.size, parts))


def _show_sample(stage: Stage, decision: Decision, reporter: Reporter) -> None:
    from kllm.run.sample import first_sample

    assert isinstance(stage, TrainingStage)
    source = stage.data[0].path
    if hub.is_hub_id(source) and not Path(source).exists():
        reporter.message(f"{stage.name}: no sample, {source} is fetched from the hub when the stage runs")
        return
    given = decision.inputs.get("tokenizer")
    if given is not None and given.directory is None and given.stage is None:
        reporter.message(
            f"{stage.name}: no sample, the tokenizer is fetched from the hub when the stage runs"
        )
        return
    sample = first_sample(stage, given.directory if given else None)
    if sample is None:
        raise UserError("its first records are all bad", where=source, hint=f"kllm data inspect {source}")
    note = " (tokenizer not trained yet: counted with a stand-in)" if sample.stand_in else ""
    title = f"{stage.name}: {sample.where}, {sample.trained} of {sample.tokens} tokens trained{note}"
    reporter.spans(title, sample.spans)
