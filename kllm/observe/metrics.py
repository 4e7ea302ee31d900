"""The names and meaning of every number kllm reports, and how numbers are added up.

One table for every command: `train/loss` means the same in pretraining, fine-tuning and after (in
preference learning a loss is of a pair of answers, in nats).
A mean is always a sum over a weight (`Accumulator`), never a mean of means, so that a metric does
not change with the micro-batch size or the number of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """name (a trailing `*` stands for any ending), unit, and what it says."""

    name: str
    unit: str
    help: str


METRICS: tuple[Metric, ...] = (
    Metric("train/loss", "nats/token", "training loss over the trained tokens since the last line"),
    Metric("train/sft_loss", "nats/token", "plain loss of the chosen answers, a mean over answers"),
    Metric("train/aux_loss", "nats", "auxiliary losses (expert balance, router z), already weighted"),
    Metric("train/tokens", "tokens", "tokens seen since the start of the stage, all processes"),
    Metric("train/trained_tokens", "tokens", "tokens with a label since the start of the stage"),
    Metric("train/epoch", "epochs", "passes over the data so far, with a fraction"),
    Metric("train/*", "", "further terms of the objective, each a mean over its own weight"),
    Metric("val/loss", "nats/token", "loss on the held-out rows (always the same rows)"),
    Metric("val/bpb", "bits/byte", "held-out loss in bits per byte of text: comparable across tokenizers"),
    Metric("val/accuracy", "share", "held-out pairs whose chosen answer has the higher reward"),
    Metric("val/logp_accuracy", "share", "held-out pairs whose chosen answer is the likelier one"),
    Metric("val/margin", "nats", "reward of held-out chosen answers minus that of rejected ones"),
    Metric("val/chosen_logp", "nats/token", "log-probability of held-out chosen answers"),
    Metric("val/chosen_drift", "nats/token", "as logps/chosen_drift, on held-out answers"),
    Metric("val/kl", "nats/token", "as pref/kl, on held-out answers"),
    Metric("val/*", "", "further held-out figures"),
    Metric("rewards/chosen", "nats", "beta x log-ratio of the chosen answers to the reference"),
    Metric("rewards/rejected", "nats", "beta x log-ratio of the rejected answers to the reference"),
    Metric("rewards/margin", "nats", "reward of the chosen answer minus that of the rejected one"),
    Metric("rewards/accuracy", "share", "pairs whose chosen answer has the higher reward; a tie is a half"),
    Metric("logps/chosen", "nats/token", "log-probability of the chosen answers"),
    Metric("logps/rejected", "nats/token", "log-probability of the rejected answers"),
    Metric("logps/chosen_drift", "nats/token", "chosen answers' log-probability minus that at the start"),
    Metric("logps/accuracy", "share", "pairs whose chosen answer is the likelier one"),
    Metric("pref/kl", "nats/token", "KL to the reference (k3), on the data's answers: off-policy"),
    Metric("pref/z_ref", "nats", "KTO's reference point: log-ratio of answers to other questions"),
    Metric("opt/lr", "", "learning rate of the step"),
    Metric("opt/grad_norm", "", "gradient norm before clipping"),
    Metric("opt/clip_rate", "share", "share of steps since the last line whose gradient was clipped"),
    Metric("perf/tok_s", "tokens/s", "tokens per second, all processes, pauses for evaluation left out"),
    Metric("perf/step_s", "s", "seconds per optimiser step, pauses left out"),
    Metric("perf/mfu", "share", "model FLOPs used / measured peak of the device; absent when unknown"),
    Metric("perf/data_wait", "share", "share of the step spent waiting for data"),
    Metric("perf/padding", "share", "share of batch positions that carry no document token"),
    Metric("mem/peak", "bytes", "peak memory: of the device on a GPU, resident set on a CPU"),
    Metric("moe/load_max", "ratio", "load of the busiest expert / even load (1 = balanced)"),
    Metric("moe/*", "", "router figures"),
    Metric("distill/ce", "nats/token", "distillation: loss on the labels alone"),
    Metric("distill/kd", "nats/token", "distance to the teacher, without the temperature's factor"),
    Metric("distill/hidden", "", "distance of hidden states through the trained projection"),
    Metric("distill/agreement", "share", "labelled tokens for which both models prefer the same one"),
    Metric("distill/aligned", "share", "labelled tokens that a teacher of another tokenizer answers"),
    Metric("eval/*", "", "results of evaluation tasks: eval/TASK/GROUP"),
    Metric("collect/kept", "answers", "answers of a teacher that passed the rules so far"),
    Metric("collect/dropped", "answers", "answers of a teacher that did not"),
    Metric("collect/failed", "prompts", "prompts that got no answer"),
    Metric("collect/requests_s", "requests/s", "answers of a teacher per second"),
    Metric("probe/*", "", "probes on a fixed validation batch"),
)


def describe(name: str) -> Metric | None:
    """The table's row for `name`, or None if it is not in the vocabulary."""
    for metric in METRICS:
        if metric.name == name:
            return metric
    for metric in METRICS:
        if metric.name.endswith("*") and name.startswith(metric.name[:-1]):
            return metric
    return None


class Accumulator:
    """Adds up (sum, weight) pairs; values may be floats or device tensors.

    Tensors are kept as tensors until `read`, so adding costs no device synchronisation.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, list[Any]] = {}
        self._peaks: dict[str, Any] = {}

    def add(self, name: str, total: Any, weight: Any = 1.0) -> None:
        """Adds `total`, a sum over `weight` things (a mean must be multiplied by its weight first)."""
        total, weight = _detached(total), _detached(weight)
        pair = self._pairs.get(name)
        if pair is None:
            self._pairs[name] = [total, weight]
        else:
            pair[0], pair[1] = pair[0] + total, pair[1] + weight

    def update(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds every `name: (sum, weight)` of `metrics`."""
        for name, (total, weight) in metrics.items():
            self.add(name, total, weight)

    def peak(self, name: str, value: float) -> None:
        """Keeps the largest value of `name` on this process."""
        self._peaks[name] = max(value, self._peaks.get(name, -math.inf))

    def read(self, reduce: Callable[[list[Any]], Sequence[float]] | None = None) -> dict[str, float]:
        """Means since the last read, then starts afresh. Weight 0 gives no entry.

        Args:
            reduce: takes [sum, weight, sum, weight, ...] (names sorted) and gives the sums over all
                processes as floats; None reads this process alone.
        """
        names = sorted(self._pairs)
        flat = [value for name in names for value in self._pairs[name]]
        floats = reduce(flat) if reduce else [float(v) for v in flat]
        means = {n: floats[2 * i] / floats[2 * i + 1] for i, n in enumerate(names) if floats[2 * i + 1]}
        means.update(self._peaks)
        self._pairs, self._peaks = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; part of a checkpoint, so that a line after a resume is the same line."""
        pairs = {name: [float(v) for v in pair] for name, pair in self._pairs.items()}
        return {"pairs": pairs, "peaks": dict(self._peaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where `state_dict` left off."""
        self._pairs = {name: list(pair) for name, pair in state["pairs"].items()}
        self._peaks = dict(state["peaks"])


def _detached(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value


class Ema:
    """Exponential moving average without the start-up bias towards zero."""

    def __init__(self, beta: float = 0.9) -> None:
        self.beta = beta
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """Adds a finite value (others are ignored) and gives the average so far."""
        if math.isfinite(value):
            self._sum = self.beta * self._sum + (1 - self.beta) * value
            self._weight = self.beta * self._weight + (1 - self.beta)
        return self.value

    @property
    def value(self) -> float:
        """The average; NaN before the first value."""
        return self._sum / self._weight if self._weight else math.nan


class Throughput:
    """Tokens and steps per second of training alone, over the steps since the last `read`.

    `clock` is replaceable for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._paused = 0.0
        self._tokens = 0
        self._steps = 0

    def step(self, tokens: int) -> None:
        """One optimiser step of `tokens` tokens (all processes) has ended."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside (evaluation, saving, sampling) is not training time."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def read(self) -> dict[str, float]:
        """`perf/tok_s` and `perf/step_s` since the last read (empty if no step ended)."""
        now = self._clock()
        seconds = now - self._start - self._paused
        tokens, steps = self._tokens, self._steps
        self._start, self._paused, self._tokens, self._steps = now, 0.0, 0, 0
        if not steps or seconds <= 0:
            return {}
        return {"perf/tok_s": tokens / seconds, "perf/step_s": seconds / steps}


class Eta:
    """Remaining time from the wall clock of the steps after the warm-up (compilation, first touch)."""

    def __init__(self, warmup: int = 3, clock: Callable[[], float] = time.monotonic) -> None:
        self.warmup = warmup
        self._clock = clock
        self._first: int | None = None
        self._mark: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def observe(self, step: int) -> None:
        """`step` steps are done now; a step behind the last one starts the measure again."""
        now = self._clock()
        if self._first is None or (self._last is not None and step < self._last[0]):
            self._first, self._mark = step, None
        if self._mark is None and step >= self._first + self.warmup:
            self._mark = (step, now)
        self._last = (step, now)

    def remaining(self, total: int) -> float | None:
        """Seconds to step `total`, or None while unknown."""
        if self._mark is None or self._last is None or self._last[0] <= self._mark[0]:
            return None
        pace = (self._last[1] - self._mark[1]) / (self._last[0] - self._mark[0])
        left = (total - self._last[0]) * pace - (self._clock() - self._last[1])
        return max(left, 0.0)


def mfu(flops_per_token: float | None, tok_s: float | None, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation in 0..1, or None when any part is unknown (never a made-up 0).

    Args:
        flops_per_token: training FLOPs per token, forward and backward.
        tok_s: tokens per second of all processes.
        peak_flops: FLOP/s of all devices together, probed or from a table.
    """
    if not flops_per_token or not tok_s or not peak_flops:
        return None
    return flops_per_token * tok_s / peak_flops
