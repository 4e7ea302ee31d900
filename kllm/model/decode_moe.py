"""The mixture of experts of one layer at generation time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kllm.model.moe import Experts
from kllm.model.presets import ModelShape

if TYPE_CHECKING:
    from kllm.model.decode_adapters import Chosen
    from kllm.model.decode_layers import GatedMLP

Feed = Callable[[Tensor], Tensor]
"""A gated MLP, x [M, H] -> [M, H]."""


class Router:
    """Softmax over the experts and the chosen k of them; never quantised, a slip here changes everything."""

    def __init__(self, weight: Tensor, shape: ModelShape) -> None:
        self.weight, self.k = weight, shape.num_experts_per_tok
        self.normalise = shape.norm_topk_prob

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, H] -> weights float32 [M, k] and experts int64 [M, k]."""
        weights, chosen = F.linear(x, self.weight).float().softmax(dim=-1).topk(self.k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen


class LoopExperts:
    """One expert after another, each a pair of kernels like any other matrix (CPUs; 8 and 4 bits)."""

    def __init__(self, experts: list[Feed]) -> None:
        self.experts = experts

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [M, H], weights [M, k], chosen [M, k] -> [M, H]."""
        if x.shape[0] == 1:
            out = torch.cat([self.experts[e](x) for e in chosen[0].tolist()])
            return weights.to(out.dtype) @ out
        return _sorted(x, weights, chosen, self._run)

    def _run(self, rows: Tensor, flat: Tensor) -> Tensor:
        parts = rows.split(torch.bincount(flat, minlength=len(self.experts)).tolist())
        return torch.cat([feed(part) for feed, part in zip(self.experts, parts, strict=True) if len(part)])


class GroupedExperts:
    """The model's own grouped products: no word between host and device (GPUs, float weights).

    Holds the model's stacked tensors themselves, no copy of them unless `dtype` differs.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        self.gate, self.up, self.down = (
            p.detach().to(dtype).transpose(1, 2)
            for p in (experts.gate_proj, experts.up_proj, experts.down_proj)
        )

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [M, H], weights [M, k], chosen [M, k] -> [M, H]."""
        return _sorted(x, weights, chosen, self._run)

    def _run(self, rows: Tensor, flat: Tensor) -> Tensor:
        offsets = F.one_hot(flat, self.gate.shape[0]).sum(dim=0).cumsum(dim=0).to(torch.int32)
        gate = F.grouped_mm(rows, self.gate, offs=offsets)
        up = F.grouped_mm(rows, self.up, offs=offsets)
        return F.grouped_mm(F.silu(gate) * up, self.down, offs=offsets)


def _sorted(x: Tensor, weights: Tensor, chosen: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum of each row's k results, weighted; `run` gets the row copies sorted by expert, and the experts."""
    k, flat = chosen.shape[1], chosen.flatten()
    order = flat.argsort(stable=True)
    out = run(x.index_select(0, order // k), flat)
    # back to token order: each token's k results side by side
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    out = out.index_select(0, inverse).view(-1, k, x.shape[1])
    return (out * weights.to(out.dtype)[..., None]).sum(dim=1)


class PreparedMoE:
    """Routed experts plus the shared one, x [M, H] -> [M, H]."""

    def __init__(
        self,
        router: Router,
        experts: LoopExperts | GroupedExperts,
        shared: GatedMLP | None,
        shared_gate: Tensor | None,
    ) -> None:
        self.router, self.experts = router, experts
        self.shared, self.shared_gate = shared, shared_gate

    def __call__(self, x: Tensor, chosen: Chosen | None = None) -> Tensor:
        """`chosen`: adapters of the shared expert; the routed ones and the router have none."""
        y = self.experts(x, *self.router(x))
        if self.shared is None:
            return y
        shared = self.shared(x, chosen)
        if self.shared_gate is not None:
            shared = torch.sigmoid(F.linear(x, self.shared_gate)) * shared
        return y + shared
