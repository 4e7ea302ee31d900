"""Muon: momentum whose update is orthogonalised by Newton-Schulz, for the hidden matrices.

Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon): Nesterov momentum, five quintic
iterations, rate scaled by sqrt(max(1, rows / cols)), decoupled weight decay. torch.optim.Muon runs
the iteration in bfloat16, which was measured 27x slower than this float32 one on a CPU without
bfloat16 units; on CUDA `build_optimizer` takes torch's own for plain matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# quintic coefficients that drive every singular value into [0.7, 1.2] in five steps
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of g [..., m, n], approximately, in g's dtype and shape."""
    a, b, c = NS_COEFFICIENTS
    x = g.to(torch.bfloat16) if g.is_cuda else g.float()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices [m, n] or stacks of them [E, m, n] (each expert by itself).

    Args:
        params: parameters of two or three dimensions.
        lr: learning rate.
        momentum: Nesterov momentum.
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; `closure` is evaluated first when given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(tuple(p.shape), []).append(p)
            for parameters in alike.values():
                self._step_alike(parameters, group)
        return loss

    def _step_alike(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape are orthogonalised as one stack: fewer, larger products."""
        momentum, rate = group["momentum"], group["lr"]
        updates = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"]
            grad = p.grad
            assert grad is not None
            buffer.lerp_(grad, 1 - momentum)
            updates.append(grad.lerp(buffer, momentum))
        rows, columns = parameters[0].shape[-2:]
        for p, update in zip(parameters, newton_schulz(torch.stack(updates)), strict=True):
            p.mul_(1 - rate * group["weight_decay"])
            p.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)
