"""Which kernel for this model on this machine: a short race between the candidates, once a process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kllm.model.kernels import Kernel, Make, Plain

ROWS = (1, 16)
"""Rows that are timed: one stream, and a busy server."""

_ROUNDS = 3
_STREAMED = (
    40 << 20
)  # bytes of weights to cycle through: in a real step they come from memory, not from a cache
_GAIN = 0.9  # a later candidate must be this much faster: close calls must not flip from run to run
_HOPELESS = 3.0  # a candidate this much slower than the best is not timed to the end


@dataclass(frozen=True)
class Choice:
    """A kernel and what it was measured at.

    Attributes:
        seconds: per matrix, for each of `ROWS`.
        plain: the same for the matrices as they were loaded, of type `native`.
    """

    name: str
    make: Make
    seconds: tuple[float, ...]
    plain: tuple[float, ...]
    native: torch.dtype

    def line(self, weights: str) -> str:
        """`int8: fbgemm row-wise (1 row 0.07 ms, 16 rows 0.18 ms; fp32 as loaded 0.55, 1.04)`."""
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

    The outcome is kept for the process, so that every engine over such a model computes alike.

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
    device = sample[0].device
    key = (tuple(options), dtype, device, torch.get_num_threads(), tuple(m.shape for m in sample))
    if key not in _choices:
        with torch.inference_mode():
            _choices[key] = _race(options, sample, dtype)
    return _choices[key]


def _sample(matrices: Sequence[Tensor]) -> list[Tensor]:
    taken, size = [], 0
    for matrix in matrices:
        taken.append(matrix)
        size += matrix.nbytes
        if size >= _STREAMED:
            break
    return taken


def _race(options: dict[str, Make], matrices: list[Tensor], dtype: torch.dtype) -> Choice:
    device = matrices[0].device
    inputs = [[torch.randn(n, m.shape[1], dtype=dtype, device=device) for m in matrices] for n in ROWS]
    best: Choice | None = None
    failure: Exception | None = None
    # the matrices as they came, in their own dtype: what the gain is measured against
    unlimited = (float("inf"),) * len(ROWS)
    own = [[x.to(matrices[0].dtype) for x in xs] for xs in inputs]
    plain = _time([Plain(m, None) for m in matrices], own, unlimited)
    for name, make in options.items():
        limit = tuple(s * _HOPELESS for s in best.seconds) if best else unlimited
        try:
            kernels = [make(m.to(dtype), None) for m in matrices]
            seconds = _time(kernels, inputs, limit)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            failure = error  # this build or device has no such kernel
            continue
        if best is None or _score(seconds) < _GAIN * _score(best.seconds):
            best = Choice(name, make, seconds, plain, matrices[0].dtype)
    if best is None:
        raise RuntimeError(f"no kernel of {', '.join(options)} runs on {device}") from failure
    return best


def _score(seconds: tuple[float, ...]) -> float:
    """Geometric mean: one stream and many count the same."""
    product = 1.0
    for s in seconds:
        product *= s
    return product ** (1 / len(seconds))


def _time(
    kernels: Sequence[Kernel], inputs: list[list[Tensor]], limit: tuple[float, ...]
) -> tuple[float, ...]:
    """Best seconds per matrix for each set of inputs; stops early where a limit is passed."""
    result = []
    for xs, most in zip(inputs, limit, strict=True):
        best = float("inf")
        for _ in range(_ROUNDS):
            _wait(xs[0])
            began = time.perf_counter()
            for kernel, x in zip(kernels, xs, strict=True):
                kernel(x)
            _wait(xs[0])
            best = min(best, (time.perf_counter() - began) / len(kernels))
            if best > most:
                break
        result.append(best)
    return tuple(result)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
