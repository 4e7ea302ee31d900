"""Running one stage in this process: its status, its log, its card and plots around the work itself."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kllm.config.load import Loaded
from kllm.config.recipe import REFERENCE, stage_kind
from kllm.config.stages import EvalStage, ExportStage
from kllm.errors import EXIT_FAILURE, Interrupted, KllmError
from kllm.files import io_errors
from kllm.observe import plots, units
from kllm.observe.console import LoggedReporter
from kllm.observe.reporting import Reporter
from kllm.run import card, speeds
from kllm.run.context import StageContext
from kllm.run.decide import Decision, present_identity
from kllm.run.fingerprint import digest, hash_directory
from kllm.run.inputs import find_inputs
from kllm.run.results import tables
from kllm.run.rundir import RunDir, machine, now

RESUME_HINT = "the same command continues from the last checkpoint"
LOG_TAIL = 12


def make_context(
    loaded: Loaded, name: str, run: RunDir, reporter: Reporter, smoke: bool = False
) -> StageContext:
    """The context of stage `name`; its inputs must exist."""
    recipe = loaded.recipe
    inputs = find_inputs(recipe, name, run.path)
    return StageContext(
        recipe=recipe,
        stage=recipe.stage(name),
        stage_dir=run.path / recipe.dirname(name),
        run_dir=run.path,
        inputs={what: i.directory for what, i in inputs.items() if i.directory},
        reporter=reporter,
        seed=recipe.seed,
        device=recipe.device,
        nproc=recipe.nproc,
        smoke=smoke,
        origins=loaded.origins,
    )


def begin(loaded: Loaded, decision: Decision, run: RunDir) -> None:
    """Writes that the stage runs, and what its result depends on."""
    recipe, name = loaded.recipe, decision.name
    with io_errors(run.path):
        (run.path / decision.dirname).mkdir(parents=True, exist_ok=True)
    what, input_hashes = present_identity(recipe, name, run, decision.inputs)
    before = decision.status if decision.action == "resume" else {}
    status = {
        "state": "running",
        "name": name,
        "kind": stage_kind(recipe.stage(name)),
        "fingerprint": digest(what),
        "identity": what,
        "inputs": {
            w: {"from": i.source, "directory": str(i.directory), "hash": input_hashes.get(w)}
            for w, i in decision.inputs.items()
        },
        "started": before.get("started") or now(),
        "attempts": before.get("attempts", 0) + 1,
        "seconds": before.get("seconds", 0.0),
        "pid": os.getpid(),
        "host": platform.node(),
        "versions": machine()["versions"],
    }
    run.write_status(decision.dirname, status)
    run.event("started" if decision.action != "resume" else "resumed", name, reason=decision.reason)


def execute(ctx: StageContext, run: RunDir) -> dict[str, Any]:
    """Runs the stage and records how it ended; returns its final status.

    Raises:
        KllmError: as the stage raised it, or for a full disk, no memory or a signal, in one line.
    """
    if not ctx.is_main:
        return _follow(ctx)
    dirname = ctx.stage_dir.name
    status = {**run.status(dirname), "state": "running", "pid": os.getpid()}
    for stale in ("error", "exit_code", "log_tail", "crash", "ended"):
        status.pop(stale, None)
    run.write_status(dirname, status)
    log = LoggedReporter(ctx.reporter, ctx.stage_dir / "log.txt")
    log.log_only(f"== {ctx.name} {now()} process {os.getpid()} attempt {status.get('attempts', 1)}")
    began = time.monotonic()
    try:
        facts = _work(replace(ctx, reporter=log))
    except BaseException as e:
        _failed(
            run, ctx, {**status, "seconds": status.get("seconds", 0.0) + time.monotonic() - began}, e, log
        )
        raise
    status.update(facts)
    status.update(state="done", exit_code=0, ended=now(), wall_seconds=time.monotonic() - began)
    status["seconds"] = read_seconds(run, dirname) + time.monotonic() - began
    if ctx.final_dir.is_dir():
        status["outputs"] = {"final": hash_directory(ctx.final_dir, run.memo)}
    _afterwards(ctx, status, log)
    run.write_status(dirname, status)
    run.event("finished", ctx.name, seconds=round(status["seconds"], 1))
    if ctx.kind in ("eval", "export"):
        for table in tables(status.get("result")):
            log.table(table.title, table.columns, table.rows)
    log.done(ending(ctx, status))
    log.close()
    return status


def read_seconds(run: RunDir, dirname: str) -> float:
    """Seconds that earlier attempts of the stage took."""
    return float(run.status(dirname).get("seconds", 0.0))


def _work(ctx: StageContext) -> dict[str, Any]:
    """The stage itself, with what the world does to it in one line each."""
    try:
        with _termination():
            from kllm.run.work import do_work  # imports torch where the stage needs it

            return do_work(ctx)
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, f"{ctx.name} was interrupted", RESUME_HINT) from None
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and type(e).__name__ != "OutOfMemoryError":
            raise
        hint = (
            "lower train.micro_batch_tokens (the result stays the same) or set train.activation_checkpointing"
        )
        raise KllmError("out of memory", where=ctx.name, hint=hint) from e
    except OSError as e:
        where = str(e.filename or ctx.stage_dir)
        if e.filename and isinstance(e, PermissionError):
            raise KllmError("permission denied", where=where) from e
        try:
            with io_errors(where):
                raise
        except OSError:
            raise KllmError(e.strerror or str(e), where=where) from e


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM outside the training loop (which finishes its step first) ends the stage in order."""

    def stop(signum: int, frame: Any) -> None:
        raise Interrupted(signum, "terminated", RESUME_HINT)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _failed(
    run: RunDir, ctx: StageContext, status: dict[str, Any], error: BaseException, log: LoggedReporter
) -> None:
    expected = isinstance(error, KllmError)
    state = "interrupted" if isinstance(error, Interrupted) else "failed"
    code = error.exit_code if isinstance(error, KllmError) else EXIT_FAILURE
    text = str(error) if expected else f"{type(error).__name__}: {error}".splitlines()[0][:300]
    plain = expected and error.__cause__ is None
    log.log_only(text if plain else "".join(traceback.format_exception(error)).rstrip())
    log.close()
    status.update(state=state, error=text, exit_code=code, ended=now(), crash=not expected)
    status["log_tail"] = log_tail(ctx.stage_dir / "log.txt")
    # a full disk may refuse this too; the error on its way up matters more
    with contextlib.suppress(KllmError, OSError):
        run.write_status(ctx.stage_dir.name, status)
        run.event(state, ctx.name, error=text)


def log_tail(path: Path, lines: int = LOG_TAIL) -> list[str]:
    """The last lines of a log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return [line[:300] for line in text.splitlines()[-lines:]]
    except OSError:
        return []


def _follow(ctx: StageContext) -> dict[str, Any]:
    """A further process of a distributed stage: works along and leaves writing to the first."""
    try:
        return _work(ctx)
    except Interrupted as e:
        raise SystemExit(e.exit_code) from None  # the first process says it
    except KllmError:
        time.sleep(3.0)  # time for the first process to report the same error, once
        raise


def _afterwards(ctx: StageContext, status: dict[str, Any], log: LoggedReporter) -> None:
    """Card, plots and the measured speed; none of them can fail a stage that is done."""
    try:
        card.write_card(ctx, status)
        if ctx.metrics_path.exists():
            speeds.remember(ctx, status)
            if plots.available():
                plots.plot_run(ctx.metrics_path, ctx.plots_dir)
            else:
                log.message("no plots: pip install 'kllm[plots]'")
    except Exception as e:  # any plotting library's mood
        log.warn(f"the stage is done, but its card or plots are not: {type(e).__name__}: {e}")


def ending(ctx: StageContext, status: dict[str, Any]) -> str:
    """One line at the end of a stage, and the next command."""
    took = units.duration(status.get("seconds"))
    result = status.get("result") or {}
    shown = [
        f"{n.split('/')[-1]} {result[n]:.4f}" for n in ("val/loss", "val/bpb") if _is_number(result.get(n))
    ]
    figures = f", held-out {', '.join(shown)}" if shown else ""
    where = ctx.final_dir if ctx.final_dir.is_dir() else ctx.stage_dir
    return f"{ctx.name} done in {took}{figures}: {where}\nnext: {next_command(ctx)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def next_command(ctx: StageContext) -> str:
    """What a person would most likely do after this stage."""
    following = ctx.recipe.stages[ctx.recipe.index(ctx.name) + 1 :]
    if following:
        words = [
            *stage_command(stage_kind(following[0])),
            "--recipe",
            str(ctx.run_dir / "recipe.resolved.yaml"),
        ]
        return shlex.join(["kllm", *words, "--stage", following[0].name, "--out", str(ctx.run_dir)])
    named = ctx.stage.model.path if isinstance(ctx.stage, EvalStage | ExportStage) else None
    if named is not None and not named.startswith(REFERENCE):
        return f"kllm chat {named}"  # this run measured a model that lives elsewhere
    return {
        "tokenizer": f"kllm pretrain --tokenizer {ctx.final_dir} --data texts.jsonl",
        "pretrain": f"kllm sft --model {ctx.stage_dir} --data chats.jsonl",
    }.get(ctx.kind, f"kllm chat {ctx.run_dir}")


def stage_command(kind: str) -> list[str]:
    """The words after `kllm` that run a stage of this kind."""
    return ["tokenizer", "train"] if kind == "tokenizer" else [kind]
