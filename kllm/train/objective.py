"""The contracts between the one loop and what it trains: Source, Objective, Hook.

A loss is a SUM with a weight, and so is every metric: means are never averaged, so the gradient
does not depend on how a step is cut into micro-batches or spread over processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kllm.data.batch import Batch


@dataclass
class Loss:
    """total: the sum to differentiate; metrics: name -> (sum, weight), tensors or numbers."""

    total: Tensor
    metrics: dict[str, tuple[Any, Any]] = field(default_factory=dict)


class Source(Protocol):
    """Decides what an optimiser step sees."""

    def take(self, n: int = 1, policy: Any = None) -> list[Batch]:
        """This process's micro-batches of the next optimiser step, at least one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able cursor; loading it gives the same batches from here on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Objective(Protocol):
    """What is learned."""

    def weight(self, batch: Batch) -> float:
        """What the batch counts for (tokens, pairs, sequences), from the batch alone."""
        ...

    def __call__(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The loss of `batch`, summed over its weight. `model` may be wrapped (`unwrap`)."""
        ...


class Hook(Protocol):
    """Called with `state.step` completed steps: before the first, after each, after the last."""

    def __call__(self, state: TrainState) -> None: ...


@dataclass
class TrainState:
    """Where a run stands; with the weights, the optimiser and the source this is all of it."""

    step: int = 0
    steps: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    last: bool = False
    """No further step follows: the run is complete or was told to stop."""

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("last", "steps")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def due(state: TrainState, every: int) -> bool:
    """True every `every` steps and at the very last; 0 means only at the last."""
    return state.last or (every > 0 and state.step > 0 and state.step % every == 0)


def unwrap(model: torch.nn.Module) -> Any:
    """The module inside a distributed wrapper."""
    return getattr(model, "module", model)
