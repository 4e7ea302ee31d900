"""A recipe's stages in order: skip what is done, continue what is not, run again what changed.

`run_recipe` is `kllm run`; `run_stage` is a single command, and the process of one stage of a run.
"""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from kllm.config.load import Loaded, dump_yaml
from kllm.config.recipe import Recipe, stage_kind
from kllm.errors import EXIT_FAILURE, EXIT_OK, UserError
from kllm.observe.console import QuietReporter, make_reporter
from kllm.observe.reporting import Reporter
from kllm.run import checks, execute, launch, plan, report
from kllm.run.decide import Decision, decide
from kllm.run.inputs import producers
from kllm.run.rundir import RunDir, move_aside
from kllm.run.smoke import shrink

Names = str | Sequence[str] | None


def default_out(loaded: Loaded, smoke: bool = False) -> Path:
    """runs/NAME, or runs/NAME-smoke."""
    return Path("runs") / (loaded.recipe.name + ("-smoke" if smoke else ""))


def run_recipe(
    loaded: Loaded,
    *,
    out: Path | None = None,
    only: Names = None,
    from_: str | None = None,
    until: str | None = None,
    force: Names = (),
    dry_run: bool = False,
    smoke: bool = False,
    fresh: bool = False,
    in_process: bool = False,
    reporter_mode: str | None = None,
) -> int:
    """Runs all stages of a recipe, or those asked for, and returns the exit code.

    Args:
        out: run folder; default runs/NAME.
        only, from_, until: names of stages to keep to.
        force: stages to run again although nothing changed.
        dry_run: check everything and print the plan; write nothing.
        smoke: shrink every size (kllm.run.smoke), in a folder of its own.
        fresh: move an older run folder aside first.
        in_process: stages in this process instead of one each (tests, debugging).
        reporter_mode: rich, plain, json, quiet; None chooses by the terminal.

    Raises:
        KllmError: before any stage starts; with `in_process`, also from a stage.
    """
    out = out or default_out(loaded, smoke)
    loaded = shrink(loaded) if smoke else loaded
    recipe = loaded.recipe
    chosen = select(recipe, _names(only), from_, until)
    forced = check_names(recipe, _names(force))
    reporter = make_reporter(reporter_mode)
    run = RunDir(out)
    try:
        if dry_run:
            plan.show_plan(loaded, run, chosen, forced, reporter)
            return EXIT_OK
        checks.check_all(loaded, run, chosen)
        if fresh:
            _start_over(run, reporter)
        with run.lock() as lock_fd:
            return _run_all(
                _Job(loaded, run, reporter, lock_fd, smoke, in_process, reporter_mode), chosen, forced
            )
    finally:
        reporter.close()


class _Job:
    """What every stage of one command shares."""

    def __init__(
        self,
        loaded: Loaded,
        run: RunDir,
        reporter: Reporter,
        lock_fd: int | None,
        smoke: bool = False,
        in_process: bool = False,
        mode: str | None = None,
    ) -> None:
        self.loaded, self.run, self.reporter, self.lock_fd = loaded, run, reporter, lock_fd
        self.smoke, self.in_process, self.mode = smoke, in_process, mode

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def decide(self, name: str, force: bool = False) -> Decision:
        return decide(self.recipe, name, self.run, self.loaded.origins, force=force)

    def prepare(self) -> None:
        """The run's own files; stage folders under their present numbers."""
        self.run.adopt(self.recipe)
        self.run.write_recipe(self.recipe, self.loaded.text, dump_yaml(self.recipe, self.loaded.origins))


def _run_all(job: _Job, chosen: list[str], forced: list[str]) -> int:
    recipe, run, reporter = job.recipe, job.run, job.reporter
    run.adopt(recipe)
    decisions = [job.decide(name, name in forced) for name in chosen]
    if all(d.action == "skip" for d in decisions):
        reporter.done(f"{run.path} is finished already: {', '.join(chosen)} unchanged\nnext: {_talk(job)}")
        return EXIT_OK
    job.prepare()
    for position, name in enumerate(chosen):
        decision = job.decide(name, name in forced)
        reporter.message(_say(decision, position, len(chosen)))
        if decision.action == "skip":
            continue
        code = _run_one(job, decision)
        if code != EXIT_OK:
            return code
    report.write_report(run, recipe)
    reporter.done(f"{run.path} is finished; report: {run.path / 'report.md'}\nnext: {_talk(job)}")
    return EXIT_OK


_VERBS = {
    "skip": "skipped",
    "run": "starts",
    "resume": "continues",
    "rerun": "runs again",
    "wait": "waits",
}


def _say(decision: Decision, position: int, total: int) -> str:
    reason = "" if decision.action == "run" else f": {decision.reason}"
    return f"[{position + 1}/{total}] {decision.name} {_VERBS[decision.action]}{reason}"


def _talk(job: _Job) -> str:
    kinds = {stage_kind(s) for s in job.recipe.stages}
    if kinds <= {"tokenizer"}:
        return f"kllm tokenizer inspect {job.run.path}"
    return f"kllm chat {job.run.path}"


def _run_one(job: _Job, decision: Decision) -> int:
    """One stage that has something to do, here or in a process of its own."""
    recipe, run = job.recipe, job.run
    if decision.action == "wait":
        raise UserError(
            f"stage {decision.name!r} {decision.reason}, which has no result yet",
            where=str(run.path),
            hint="run it first: leave out --only and --from",
        )
    if decision.action == "rerun":
        aside = run.retire(decision.dirname)
        run.event("retired", decision.name, reason=decision.reason, moved_to=str(aside))
        decision = decide(recipe, decision.name, run, job.loaded.origins)
    execute.begin(job.loaded, decision, run)
    nproc = recipe.nproc if stage_kind(recipe.stage(decision.name)) in checks.DISTRIBUTED else 1
    if job.in_process and nproc == 1:
        ctx = execute.make_context(job.loaded, decision.name, run, job.reporter, job.smoke)
        execute.execute(ctx, run)
        return EXIT_OK
    job.reporter.close()
    words = [*execute.stage_command(stage_kind(recipe.stage(decision.name)))]
    words += ["--recipe", str(run.path / "recipe.resolved.yaml"), "--stage", decision.name]
    words += ["--out", str(run.path)]
    words += [f"--{job.mode}"] if job.mode in ("json", "quiet") else []
    code = launch.run_child(words, lock_fd=job.lock_fd, smoke=job.smoke, nproc=nproc)
    return _settle(job, decision, code)


def _settle(job: _Job, decision: Decision, code: int) -> int:
    """Reads how a stage's process ended; records what it could not record itself."""
    run, reporter = job.run, job.reporter
    status = run.status(decision.dirname)
    if status.get("state") == "done" and code == EXIT_OK:
        return EXIT_OK
    again = f"the same command continues; log: {run.path / decision.dirname / 'log.txt'}"
    recorded = status.get("exit_code")
    if status.get("state") in ("failed", "interrupted") and isinstance(recorded, int):
        # the process has said what is wrong on its own
        reporter.warn(f"stage {decision.name} {status['state']}; {again}")
        return recorded
    stopped = -code in (signal.SIGINT, signal.SIGTERM) or code in (130, 143)
    what = launch.describe_exit(code)
    tail = execute.log_tail(run.path / decision.dirname / "log.txt")
    state = "interrupted" if stopped else "failed"
    final = 128 - code if code < 0 and stopped else code if code > 0 else EXIT_FAILURE
    run.write_status(
        decision.dirname,
        {**status, "state": state, "error": what, "exit_code": final, "log_tail": tail},
    )
    run.event(state, decision.name, error=what)
    if not stopped:
        _show_tail(reporter, tail)
    reporter.warn(f"stage {decision.name} {state}: {what}; {again}")
    return final


def _show_tail(reporter: Reporter, tail: Iterable[str]) -> None:
    for line in tail:
        reporter.message(f"  | {line}")


def run_stage(
    loaded: Loaded,
    stage_name: str,
    *,
    out: Path | None = None,
    dry_run: bool = False,
    smoke: bool = False,
    fresh: bool = False,
    reporter_mode: str | None = None,
) -> int:
    """Runs one stage: a single command, or the process of a stage of a run. Returns the exit code.

    Raises:
        UserError: the stage was run with other settings (`fresh` moves that aside), or what it needs is
            missing.
        KllmError: the stage failed.
    """
    out = out or default_out(loaded, smoke)
    if launch.is_child():
        return _run_as_child(loaded, stage_name, RunDir(out), reporter_mode)
    loaded = shrink(loaded) if smoke else loaded
    reporter = make_reporter(reporter_mode)
    run = RunDir(out)
    try:
        chosen = _with_tokenizer(loaded.recipe, stage_name)
        if dry_run:
            plan.show_plan(loaded, run, chosen, [], reporter)
            return EXIT_OK
        checks.check_all(loaded, run, chosen)
        with run.lock() as lock_fd:
            job = _Job(loaded, run, reporter, lock_fd, smoke, True, reporter_mode)
            return _single(job, stage_name, fresh)
    finally:
        reporter.close()


def _run_as_child(loaded: Loaded, stage_name: str, run: RunDir, mode: str | None) -> int:
    launch.die_with_parent()
    main = int(os.environ.get("RANK", "0")) == 0
    reporter = make_reporter(mode) if main else QuietReporter()
    try:
        smoke = bool(os.environ.get(launch.SMOKE))
        execute.execute(execute.make_context(loaded, stage_name, run, reporter, smoke), run)
    finally:
        reporter.close()
    return EXIT_OK


def _with_tokenizer(recipe: Recipe, name: str) -> list[str]:
    """The stage, after the tokenizer stage that it takes its tokenizer from."""
    before = [p for p in producers(recipe, name) if stage_kind(recipe.stage(p)) == "tokenizer"]
    return [*before, name]


def _single(job: _Job, stage_name: str, fresh: bool) -> int:
    run, recipe = job.run, job.recipe
    run.adopt(recipe)
    prepared = False
    for name in _with_tokenizer(recipe, stage_name):
        decision = job.decide(name)
        if decision.action == "rerun" or (fresh and name == stage_name and decision.state != "pending"):
            if not fresh and not _kept_nothing(decision, run):
                raise _changed(decision, run)
            aside = run.retire(decision.dirname)
            job.reporter.message(f"the older {name} is now {aside}")
            decision = job.decide(name)
        if decision.action == "skip":
            if name == stage_name:
                where = run.path / decision.dirname
                job.reporter.done(f"{name} is finished already: {where}\nnext: {_talk(job)}")
            continue
        if not prepared:
            job.prepare()
            prepared = True
        if decision.action == "resume":
            job.reporter.message(f"{name} continues: {decision.reason}")
        code = _run_one(job, decision)
        if code != EXIT_OK:
            return code
    if prepared:
        report.write_report(run, recipe)
    return EXIT_OK


def _kept_nothing(decision: Decision, run: RunDir) -> bool:
    """The stage was stopped before there was anything to continue, so other settings lose nothing."""
    kept = {p.name for p in (run.path / decision.dirname).iterdir()}
    return decision.state != "done" and kept <= {"status.json", "log.txt", "metrics.jsonl"}


def _changed(decision: Decision, run: RunDir) -> UserError:
    what = "it was finished" if decision.state == "done" else "an unfinished run exists"
    lines = "; ".join(str(change) for change in decision.changes) or decision.reason
    return UserError(
        f"{what} with other settings: {lines}",
        where=str(run.path / decision.dirname),
        hint="undo the change, give another --out, or --fresh to start again (the old folder is kept)",
    )


def _start_over(run: RunDir, reporter: Reporter) -> None:
    if not run.path.exists():
        return
    with run.lock():  # nobody may be using it
        aside = move_aside(run.path)
    reporter.message(f"the older run is now {aside}")


def _names(given: Names) -> list[str]:
    return [given] if isinstance(given, str) else list(given or [])


def check_names(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """The names, if the recipe has such stages; otherwise a UserError with the nearest."""
    known = [s.name for s in recipe.stages]
    for name in (given := list(names)):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its stages: {', '.join(known)}"
            raise UserError(f"the recipe has no stage {name!r}", hint=hint)
    return given


def select(recipe: Recipe, only: list[str], from_: str | None, until: str | None) -> list[str]:
    """Names of the stages to consider, in order."""
    check_names(recipe, [*only, *(n for n in (from_, until) if n)])
    names = [s.name for s in recipe.stages]
    start = names.index(from_) if from_ else 0
    end = names.index(until) + 1 if until else len(names)
    chosen = [n for n in names[start:end] if not only or n in only]
    if not chosen:
        raise UserError("no stage is left to run", where="--only, --from, --until")
    return chosen
