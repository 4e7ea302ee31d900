"""The parts of a prepared model: projections, norms, rotation, one block. Rows are flat: [N, ...]."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kllm.model.decode_adapters import Chosen
from kllm.model.decode_moe import PreparedMoE
from kllm.model.kernels import Kernel
from kllm.model.rope import apply_rope


class StepCache(Protocol):
    """What a step needs of a cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k, v [N, kv_heads, D]; q [N, heads, D] attends to all it may see -> [N, heads * D]."""
        ...


class Projection:
    """One (fused) matrix of a layer: x [N, in] -> [N, out]. The one place where a layer multiplies.

    Args:
        site: its number among those that adapters may change; -1 for the others.
    """

    __slots__ = ("kernel", "site")

    def __init__(self, kernel: Kernel, site: int = -1) -> None:
        self.kernel, self.site = kernel, site

    def __call__(self, x: Tensor, chosen: Chosen | None = None) -> Tensor:
        """`chosen`: the adapters of the tokens, if any has one."""
        y = self.kernel(x)
        return y if chosen is None else chosen.add(self.site, x, y)


class Norm:
    """RMS norm over the last dimension in few steps: a fused kernel exists on GPUs only."""

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        size = weight.shape[-1]
        self.eps, self.few_steps = eps, weight.device.type == "cpu" and dtype == torch.float32
        # x / sqrt(|x|^2 / n + eps) * w  =  x / hypot(|x|, sqrt(n eps)) * (sqrt(n) w)
        self.weight = weight.float() * size**0.5 if self.few_steps else weight.float()
        self.floor = torch.tensor((size * eps) ** 0.5, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        if self.few_steps:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return (x / torch.hypot(length, self.floor)).mul_(self.weight)
        y = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return (y * self.weight).to(x.dtype)


class GatedMLP:
    """down(silu(gate x) * up x) with gate and up in one product."""

    def __init__(self, gate_up: Projection, down: Projection) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: Tensor, chosen: Chosen | None = None) -> Tensor:
        gate, up = self.gate_up(x, chosen).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up), chosen)


class Rotation:
    """cos and sin of this step's positions; turns q and k together."""

    def __init__(self, table: Tensor, positions: Tensor, pairs: bool) -> None:
        """`table` complex [L, D/2] if `pairs` lie side by side, else float [2, L, D/2] (cos, sin)."""
        self.pairs = pairs
        if pairs:
            self.turn = table.index_select(0, positions)[:, None]
        else:
            self.cos, self.sin = table[:, positions][:, :, None].unbind(0)

    def __call__(self, qk: Tensor) -> Tensor:
        """[N, heads, D], turned; in place where it can."""
        if self.pairs:
            qk.view(torch.complex64).mul_(self.turn)
            return qk
        return apply_rope(qk, self.cos, self.sin)


class PreparedBlock:
    """x += attention(norm(x)); x += mlp(norm(x)), on a flat row of tokens."""

    def __init__(
        self,
        layer: int,
        heads: tuple[int, int, int],
        parts: tuple[Norm, Projection, Norm | None, Projection, Norm, GatedMLP | PreparedMoE],
        rope: bool,
    ) -> None:
        self.layer, self.rope = layer, rope
        self.heads, self.kv_heads, self.head_dim = heads
        self.norm, self.qkv, self.qk_norm, self.out, self.post_norm, self.feed = parts

    def __call__(
        self, x: Tensor, rotation: Rotation, cache: StepCache, chosen: Chosen | None = None
    ) -> Tensor:
        heads, kv = self.heads, self.kv_heads
        qkv = self.qkv(self.norm(x), chosen).view(-1, heads + 2 * kv, self.head_dim)
        qk, v = qkv.split((heads + kv, kv), dim=1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if self.rope:
            qk = rotation(qk)
        q, k = qk.split((heads, kv), dim=1)
        x = x.add_(self.out(cache.attend(self.layer, q, k, v), chosen))
        return x.add_(self.feed(self.post_norm(x), chosen))
