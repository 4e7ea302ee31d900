"""The only optimiser loop in kllm. It knows no objective, no data format and no file."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from kllm.data.batch import Batch
from kllm.errors import KllmError
from kllm.observe.metrics import Accumulator, Throughput
from kllm.optim.build import Optimizers
from kllm.train.device import Runtime, peak_memory, sync_context
from kllm.train.objective import Hook, Objective, Source, TrainState


class StopSignal:
    """SIGINT and SIGTERM ask the loop to finish its step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._old[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


@dataclass
class Meters:
    """What is added up between two lines of the log."""

    sums: Accumulator = field(default_factory=Accumulator)
    speed: Throughput = field(default_factory=Throughput)


@dataclass
class Fit:
    """Everything one run of the loop needs; assembled in one place, `kllm.run.assemble`."""

    model: nn.Module
    source: Source
    objective: Objective
    optimizers: Optimizers
    schedule: Callable[[int], float]
    """Learning-rate multiplier of a 0-based step."""
    runtime: Runtime
    state: TrainState
    meters: Meters
    on_log: Callable[[TrainState, dict[str, float]], None]
    hooks: Sequence[Hook] = ()
    stop: StopSignal = field(default_factory=StopSignal)
    extra: Sequence[nn.Parameter] = ()
    """Parameters of the objective, trained with the model's."""
    max_grad_norm: float = 1.0
    log_every: int = 10
    seed: int = 0


def fit(run: Fit, resumed: bool = False) -> TrainState:
    """Trains until `state.steps` or a stop signal, and returns the state.

    Hooks see every step count once: before the first step, between steps, and after the last, so
    the final evaluation and save are no special case. After a resume they have already seen the
    first one.

    Raises:
        KllmError: a loss or gradient is not finite; the weights are still those of the last step.
    """
    state = run.state
    stopping = False
    run.model.train()
    while True:
        state.last = stopping or state.step >= state.steps
        if not resumed or state.last:
            with run.meters.speed.pause():
                for hook in run.hooks:
                    hook(state)
                run.model.train()
        resumed = False
        if state.last:
            return state
        stopping = _step(run)


def _step(run: Fit) -> bool:
    """One optimiser step; True when any process was told to stop."""
    state, runtime = run.state, run.runtime
    rate = run.optimizers.set_scale(run.schedule(state.step))
    runtime.seed(run.seed, state.step)
    batches = run.source.take()
    weight = sum(run.objective.weight(b) for b in batches)
    tokens = sum(int(b.tokens.shape[0]) for b in batches)
    trained = sum(b.trained_tokens for b in batches)
    # one exchange a step carries all that the processes must agree on
    total, all_tokens, all_trained, stops = runtime.sums([weight, tokens, trained, bool(run.stop.signum)])
    run.optimizers.zero_grad()
    losses: list[Tensor] = []
    for i, batch in enumerate(batches):
        with sync_context(run.model, last=i + 1 == len(batches)):
            with runtime.autocast():
                loss = run.objective(run.model, batch.to(runtime.device))
            # gradients are averaged over processes, hence the factor
            (loss.total * (runtime.world / max(total, 1e-9))).backward()
        losses.append(loss.total.detach())
        run.meters.sums.update(loss.metrics)
    runtime.average_gradients(run.extra)
    parameters = [p for p in (*run.model.parameters(), *run.extra) if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm or math.inf)
    if not math.isfinite(float(norm)):
        raise _not_finite(run, batches, losses)
    run.optimizers.step()
    state.step += 1
    state.tokens += int(all_tokens)
    state.trained_tokens += int(all_trained)
    run.meters.speed.step(int(all_tokens))
    _measure(run, rate, float(norm))
    return stops > 0


def _measure(run: Fit, rate: float, norm: float) -> None:
    state, sums = run.state, run.meters.sums
    # the same number on every process: a mean over processes changes nothing
    sums.add("opt/grad_norm", norm, 1.0)
    clipped = bool(run.max_grad_norm) and norm > run.max_grad_norm
    sums.add("opt/clip_rate", float(clipped), 1.0)
    if state.step != 1 and state.step % run.log_every and state.step < state.steps:
        return
    means = sums.read(run.runtime.sums if run.runtime.world > 1 else None)
    means["opt/lr"] = rate
    means["train/tokens"] = float(state.tokens)
    means["train/trained_tokens"] = float(state.trained_tokens)
    means["mem/peak"] = peak_memory(run.runtime.device)
    means.update(run.meters.speed.read())
    run.on_log(state, means)


def _not_finite(run: Fit, batches: list[Batch], losses: list[Tensor]) -> KllmError:
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(float(loss))]
    kind = "loss" if bad else "gradient"
    rows = [row for i in (bad or range(len(batches))) for row in batches[i].rows]
    shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    return KllmError(
        f"the {kind} is not finite at step {run.state.step + 1} (batch: {shown or 'unknown rows'})",
        hint="nothing of this step was applied; lower optim.lr, raise optim.warmup or look at these rows",
    )
