"""Which kernel for this model on this machine: a short race between the candidates, once a process."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kllm.model.kernels import Kernel, Make, Plain

ROWS = (1, 16, 64)
"""Rows that are timed: one stream, a busy server, a piece of a prompt."""

_ROUNDS = 3
_STREAMED = (
    40 << 20
)  # bytes of weights to cycle through: in a real step they come from memory, not from a cache
_BUSY = 64  # rows from which arithmetic bounds, not memory: one matrix tells as much as all
_SMALL = (
    1 << 20
)  # bytes of weights below which no kernel can win anything: the default, the same in every run
_GAIN = 0.95  # clearly faster: close calls must not flip from run to run
_HOPELESS = 3.0  # a candidate this much slower than the best is not timed any further
_LACKING = (
    RuntimeError,
    NotImplementedError,
    AttributeError,
)  # raised where a build or device lacks a kernel


@dataclass(frozen=True)
class Choice:
    """A kernel and what it was measured at.

    Attributes:
        seconds: per matrix, for each of `ROWS`; empty if there was no race.
        plain: the same for `F.linear` on the matrices as they were loaded, of type `native`.
    """

    name: str
    make: Make
    seconds: tuple[float, ...]
    plain: tuple[float, ...]
    native: torch.dtype

    def line(self, weights: str) -> str:
        """`int8: fbgemm row-wise (1 row 0.1 ms, 16 rows 0.2 ms, ...; fp32 as loaded 0.27, 0.5, ...)`."""
        if not self.seconds:
            return f"{weights}: {self.name} (not raced)"
        times = ", ".join(
            f"{n} row{'s' * (n > 1)} {s * 1e3:.3g} ms" for n, s in zip(ROWS, self.seconds, strict=True)
        )
        native = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
            self.native, "plain"
        )
        plain = ", ".join(f"{s * 1e3:.3g}" for s in self.plain)
        return f"{weights}: {self.name} ({times}; {native} as loaded {plain})"


_choices: dict[tuple[object, ...], Choice] = {}


def choose(
    options: dict[str, Make], matrices: Sequence[Tensor], dtype: torch.dtype, pinned: str | None = None
) -> Choice:
    """The fastest of `options` on the model's own `matrices`, for activations of `dtype`.

    The outcome is kept for the process, so that every engine over such a model computes alike. Kernels agree
    to float rounding only: small models, and all under `torch.use_deterministic_algorithms`, get the default
    unraced, so that the next run computes the same bits.

    Args:
        options: name -> kernel; the first is the default, later ones must be clearly faster.
        matrices: [N, K] each, in the order in which a step reads them; as many as fill the caches are used.
        pinned: takes this one, whatever the others measure.

    Raises:
        ValueError: `pinned` is not among the options.
        RuntimeError: none of the options runs here.
    """
    if pinned is not None:
        if pinned not in options:
            raise ValueError(f"unknown kernel {pinned!r}; known: {', '.join(options)}")
        options = {pinned: options[pinned]}
    sample = _sample(matrices)
    race = sum(m.nbytes for m in sample) > _SMALL and not torch.are_deterministic_algorithms_enabled()
    shapes = tuple(m.shape for m in sample)
    native, threads = sample[0].dtype, torch.get_num_threads()
    key = (tuple(options), dtype, native, sample[0].device, threads, shapes, race)
    if key not in _choices:
        with torch.inference_mode():
            _choices[key] = _race(options, sample, dtype) if race else _first(options, sample[0], dtype)
    return _choices[key]


def _sample(matrices: Sequence[Tensor]) -> list[Tensor]:
    taken, size = [], 0
    for matrix in matrices:
        taken.append(matrix)
        size += matrix.nbytes
        if size >= _STREAMED:
            break
    return taken


def _first(options: dict[str, Make], matrix: Tensor, dtype: torch.dtype) -> Choice:
    """The first option that runs at all."""
    failure: Exception | None = None
    for name, make in options.items():
        try:
            make(matrix.to(dtype), None)(matrix.new_zeros(2, matrix.shape[1], dtype=dtype))
        except _LACKING as error:
            failure = error
            continue
        return Choice(name, make, (), (), matrix.dtype)
    raise _none(options) from failure


def _race(options: dict[str, Make], matrices: list[Tensor], dtype: torch.dtype) -> Choice:
    native = matrices[0].dtype
    plain = _Entry([Plain(m, None) for m in matrices], _inputs(matrices, native))
    inputs = _inputs(matrices, dtype)
    trial = _Trial(options, matrices[0].to(dtype), inputs[-1][0])
    entries: dict[str, _Entry] = {}
    failure: Exception | None = None
    for name, make in options.items():
        try:
            entry = _Entry([make(m.to(dtype), None) for m in matrices], inputs)
            trial.check(entry.kernels[0])
        except _LACKING as error:
            failure = error
            continue
        entries[name] = entry
    if not entries:
        raise _none(options) from failure
    # in turns, so that whatever else the machine does meets all of them
    for _ in range(_ROUNDS):
        plain.measure()
        fastest = min(e.score for e in entries.values())
        for entry in entries.values():
            if entry.score <= _HOPELESS * fastest:
                entry.measure()
    best = next(iter(entries))
    for name, entry in entries.items():
        if entry.beats(entries[best]):
            best = name
    return Choice(best, options[best], tuple(entries[best].seconds), tuple(plain.seconds), native)


def _inputs(matrices: list[Tensor], dtype: torch.dtype) -> list[list[Tensor]]:
    """Random rows for each of `ROWS`, without a touch on the global generator."""
    generator = torch.Generator().manual_seed(0)
    used = [matrices[:1] if n >= _BUSY else matrices for n in ROWS]
    return [
        [torch.randn(n, m.shape[1], generator=generator).to(m.device, dtype) for m in some]
        for n, some in zip(ROWS, used, strict=True)
    ]


def _none(options: dict[str, Make]) -> RuntimeError:
    return RuntimeError(f"no kernel of {', '.join(options)} runs on this device")


class _Trial:
    """Sorts out kernels whose packing means something else on this build: they run, and are wrong.

    The last option that runs is the reference: lists end with the plainest code for their format.
    """

    def __init__(self, options: dict[str, Make], matrix: Tensor, x: Tensor) -> None:
        self.x = x
        plain = Plain(matrix, None)(x).float()
        self.expected = plain
        for make in reversed(options.values()):
            try:
                self.expected = make(matrix, None)(x).float()
            except _LACKING:
                continue
            break
        rounding = float((self.expected - plain).norm() / plain.norm())
        self.tolerance = 0.02 + 0.5 * rounding

    def check(self, kernel: Kernel) -> None:
        error = float((kernel(self.x).float() - self.expected).norm() / self.expected.norm())
        if not error <= self.tolerance:
            raise RuntimeError(f"a kernel is {error:.0%} off")


class _Entry:
    """A candidate: one kernel per matrix, inputs per number of rows, best seconds per matrix so far."""

    def __init__(self, kernels: Sequence[Kernel], inputs: list[list[Tensor]]) -> None:
        self.kernels, self.inputs = kernels, inputs
        for kernel, x in zip(kernels, inputs[0], strict=True):
            kernel(x)  # the first call sets things up
        # a first guess, from one matrix
        self.seconds, self.guess = [_timed(kernels[:1], xs[:1]) for xs in inputs], True

    def measure(self) -> None:
        for i, xs in enumerate(self.inputs):
            seconds = _timed(self.kernels[: len(xs)], xs)
            self.seconds[i] = seconds if self.guess else min(self.seconds[i], seconds)
        self.guess = False

    @property
    def score(self) -> float:
        """Geometric mean: one stream, many and prompts count the same."""
        return math.prod(self.seconds) ** (1 / len(self.seconds))

    def beats(self, other: _Entry) -> bool:
        """Clearly faster in the mean, or at some number of rows and clearly slower at none."""
        ratios = [mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)]
        faster_once = min(ratios) < _GAIN and max(ratios) * _GAIN <= 1
        return faster_once or self.score < _GAIN * other.score


def _timed(kernels: Sequence[Kernel], xs: Sequence[Tensor]) -> float:
    """Seconds per matrix. On a CPU time of this thread, so that other processes count less."""
    cuda = xs[0].is_cuda
    clock = time.perf_counter if cuda else time.thread_time
    if cuda:
        torch.cuda.synchronize(xs[0].device)
    began = clock()
    for kernel, x in zip(kernels, xs, strict=True):
        kernel(x)
    if cuda:
        torch.cuda.synchronize(xs[0].device)
    return max(clock() - began, 1e-9) / len(kernels)
