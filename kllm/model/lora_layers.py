"""Frozen layers with what is trained beside them: LoRA, rsLoRA, DoRA, PiSSA.

A layer computes x W^T + s (x A^T) B^T (LoRA, Hu et al. 2021, eq. 3), its outputs scaled by m / |W + s B A|
with DoRA (Liu et al. 2024, eq. 5; the norm is a constant for the gradient, section 4.3). Dropout is on the
adapter's inputs only. The backward makes the gradients of x, A and B, never one of W.

Shapes: T tokens, K inputs, N outputs, r rank; stacks of E experts have it all E times, [E, N, K].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kllm.errors import UserError
from kllm.model.frozen import BASES, FrozenLinear, FrozenMatrix, FrozenStack, thaw

INITS = ("default", "pissa")
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *EXPERT_PARTS)
"""Last parts of the names of all matrices of attention and MLPs: what is adapted, and rounded with `base`."""


@dataclass(frozen=True)
class LoraConfig:
    """How an adapter is made; names are PEFT's where it has them.

    Attributes:
        rank, alpha: the change of a weight is scale * B A, B [N, rank], A [rank, K].
        dropout: share of the inputs of A set to zero in training.
        targets: what gets adapters; see `kllm.model.lora.find_targets`.
        use_rslora: scale = alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, theorem 3.2).
        use_dora: lengths of rows are trained apart from their directions.
        init: "default" (A as a linear layer's, B zero) or "pissa" (the largest singular vectors of W, which
            leave the base for the adapter; Meng et al. 2024, eq. 2-4).
        base: frozen weights in full ("none"), "int8" or "int4".

    Raises:
        UserError: a value out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"
    base: str = "none"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"must be at least 1, got {self.rank}", where="lora.rank")
        if not 0 <= self.dropout < 1:
            raise UserError(f"must be from 0 to below 1, got {self.dropout:g}", where="lora.dropout")
        for name, known in (("init", INITS), ("base", BASES)):
            if getattr(self, name) not in known:
                raise UserError(f"{getattr(self, name)!r} is not one of {', '.join(known)}", f"lora.{name}")

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank, self.use_rslora)


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) (rank-stabilised, Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class _LoraProduct(torch.autograd.Function):
    """x W^T + scale * (x A^T) B^T for x [T, K].

    The small products read T rows for little arithmetic. For many rows they are therefore folded into the
    large ones: x times [W + scale B A; A] gives y and x A^T, dy times [W + scale B A | B] dx and dy B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, *parts: Tensor) -> Tensor:
        ctx.scale, ctx.folded = scale, _worth_folding(x, a, b)
        weight = thaw(parts, x.shape[1], x.dtype)
        if ctx.folded:
            outputs = b.shape[0]
            rows = weight.new_empty(outputs + a.shape[0], x.shape[1])
            torch.addmm(weight, b, a, alpha=scale, out=rows[:outputs])
            rows[outputs:] = a
            y, inner = (x @ rows.t()).split((outputs, a.shape[0]), dim=1)
            inner = inner.contiguous()  # else all of y would be kept for it
        else:
            inner = x @ a.t()
            y = x @ weight.t()
            y.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(x, inner, a, b, *parts)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        x, inner, a, b, *parts = ctx.saved_tensors
        inputs, grad_x = a.shape[1], None
        if not ctx.needs_input_grad[0]:
            grad_inner = grad @ b
        elif ctx.folded:
            weight = thaw(tuple(parts), inputs, grad.dtype)
            columns = weight.new_empty(b.shape[0], inputs + a.shape[0])
            torch.addmm(weight, b, a, alpha=ctx.scale, out=columns[:, :inputs])
            columns[:, inputs:] = b
            grad_x, grad_inner = (grad @ columns).split((inputs, a.shape[0]), dim=1)
        else:
            grad_inner = grad @ b
            grad_x = grad @ thaw(tuple(parts), inputs, grad.dtype)
            grad_x.addmm_(grad_inner, a, alpha=ctx.scale)
        grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_a = (grad_inner * ctx.scale).t() @ x
            grad_b = (inner.t() @ grad).mul_(ctx.scale).t()
        return grad_x, grad_a, grad_b, None, *[None] * len(parts)


def _worth_folding(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Rows enough to pay for W + scale B A; not in 16 bits, which would lose small changes of W in it."""
    rows, inputs, outputs = x.shape[0], a.shape[1], b.shape[0]
    if x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return rows * (inputs + outputs) > 4 * inputs * outputs


class LoraLayer(nn.Module):
    """What an adapted linear layer and an adapted stack share; `base` is the frozen weight."""

    base: FrozenMatrix
    config: LoraConfig
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_magnitude: nn.Parameter | None
    initial_A: nn.Parameter | None  # noqa: N815
    initial_B: nn.Parameter | None  # noqa: N815

    @torch.no_grad()
    def attach(self, weight: Tensor, config: LoraConfig, generator: torch.Generator) -> None:
        """Adds A, B and what the kind of adapter needs besides; the layer computes what it did.

        Args:
            weight: [..., N, K], what the base was made of, not rounded.
        """
        self.config, self.scale, self.enabled = config, config.scale, True
        rank = config.rank
        *stack, outputs, inputs = self.base.shape
        device = self.base.parts()[0].device
        self.initial_A = self.initial_B = self.lora_magnitude = None
        if config.init == "pissa":
            a, b = self._leave_to_adapter(weight.detach(), rank, generator)
            self.initial_A, self.initial_B = (nn.Parameter(t.clone(), requires_grad=False) for t in (a, b))
        else:
            # as a linear layer's own weight: uniform within 1 / sqrt(K), drawn on the CPU
            bound = 1 / math.sqrt(inputs)
            a = torch.empty(*stack, rank, inputs).uniform_(-bound, bound, generator=generator).to(device)
            b = torch.zeros(*stack, outputs, rank, device=device)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        if config.use_dora:
            self.lora_magnitude = nn.Parameter(self._row_norms(a, b, torch.float32))

    def _leave_to_adapter(
        self, weight: Tensor, rank: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """PiSSA: A and B with s B A = the best approximation of W of this rank; the base keeps the rest."""
        root = principal_roots(weight.to("cpu", torch.float32), rank, generator)
        a, b = (t.div(math.sqrt(self.scale)).to(weight.device).contiguous() for t in root)
        rest = weight.double() - self.scale * (b.double() @ a.double())
        self.base.replace(rest.to(weight.dtype))
        return a, b

    def moved(self, a: Tensor, b: Tensor) -> Tensor:
        """float64 [..., N, K]: the frozen weight with scale * B A added."""
        change = b.detach().double() @ a.detach().double()
        return self.base.full(torch.float64) + self.scale * change

    def merged(self) -> Tensor:
        """[..., N, K]: the weight that computes what this layer does, in the base's dtype."""
        weight = self.moved(self.lora_A, self.lora_B)
        if self.lora_magnitude is not None:
            weight *= (self.lora_magnitude.detach().double() / weight.norm(dim=-1))[..., None]
        return weight.to(self.base.dtype)

    def change(self) -> tuple[Tensor, Tensor]:
        """A [..., r, K] and B [..., N, r] of what was changed in the weight as it was before `attach`.

        PiSSA moved the base: its change is s (B A - B0 A0), a plain LoRA of twice the rank with the same
        scale, [A; A0] and [B, -B0] (PEFT's conversion).
        """
        a, b = self.lora_A.detach(), self.lora_B.detach()
        if self.initial_A is None or self.initial_B is None:
            return a, b
        return torch.cat((a, self.initial_A), dim=-2), torch.cat((b, -self.initial_B), dim=-1)

    @torch.no_grad()
    def restore_initial(self, a: Tensor, b: Tensor) -> None:
        """PiSSA: what a saved run took out of the base becomes what is out of it."""
        if self.initial_A is None or self.initial_B is None:
            return
        if not (torch.equal(self.initial_A, a) and torch.equal(self.initial_B, b)):
            whole = self.moved(self.initial_A, self.initial_B)
            whole -= self.scale * (b.double() @ a.double())
            self.base.replace(whole.to(self.base.dtype))

    def active(self) -> tuple[Tensor, Tensor] | None:
        """The A and B in use; None: only the base (PiSSA's first ones are a part of it and stay)."""
        if self.enabled:
            return self.lora_A, self.lora_B
        if self.initial_A is not None and self.initial_B is not None:
            return self.initial_A, self.initial_B
        return None

    def gains(self, dtype: torch.dtype) -> Tensor | None:
        """DoRA: m / |W + s B A| [..., N]; None for other adapters."""
        if self.lora_magnitude is None or not self.enabled:
            return None
        return self.lora_magnitude.to(dtype) / self._row_norms(self.lora_A, self.lora_B, dtype)

    @torch.no_grad()
    def _row_norms(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        add = torch.baddbmm if a.dim() == 3 else torch.addmm
        weight = add(self.base.full(dtype), b.to(dtype), a.to(dtype), alpha=self.scale)
        return torch.linalg.vector_norm(weight, dim=-1)

    def dropped(self, x: Tensor) -> Tensor | None:
        """x after dropout; None where nothing is dropped."""
        share = self.config.dropout
        return F.dropout(x, share) if share and self.training and self.enabled else None


class LoraLinear(LoraLayer, FrozenLinear):
    """x W^T + s (x A^T) B^T + bias, everything but A and B (and DoRA's m [N]) frozen."""

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator, base: str) -> None:
        FrozenLinear.__init__(self, linear, base)
        self.attach(linear.weight, config, generator)

    def product(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], without the bias."""
        active = self.active()
        if active is None:
            return FrozenLinear.product(self, x)
        a, b = (t.to(x.dtype) for t in active)
        low = self.dropped(x)
        if low is None:
            y: Tensor = _LoraProduct.apply(x, a, b, self.scale, *self.base.parts())  # type: ignore[no-untyped-call]
        else:
            y = torch.addmm(FrozenLinear.product(self, x), low @ a.t(), b.t(), alpha=self.scale)
        gains = self.gains(torch.float32)
        return y if gains is None else y * gains.to(y.dtype)


class LoraStack(LoraLayer, FrozenStack):
    """The same for one matrix of each of E experts: A [E, r, K], B [E, N, r], m [E, N]."""

    def __init__(self, weight: Tensor, config: LoraConfig, generator: torch.Generator) -> None:
        FrozenStack.__init__(self, weight, config.base)
        self.attach(weight, config, generator)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, K] sorted by expert -> [T, N]; offsets int32 [E] are the ends of each expert's rows."""
        y = FrozenStack.forward(self, x, offsets)
        active = self.active()
        if active is None:
            return y
        # grouped_mm takes rows of whole 16 bytes only: the rank is filled up with zeros
        more = -active[0].shape[1] % 8
        a, b = F.pad(active[0], (0, 0, 0, more)), F.pad(active[1], (0, more))
        a, b = (t.to(x.dtype).transpose(1, 2) for t in (a, b))
        low = self.dropped(x)
        inner = F.grouped_mm(x if low is None else low, a, offs=offsets)
        y = y + F.grouped_mm(inner * self.scale, b, offs=offsets)
        gains = self.gains(torch.float32)
        if gains is None:
            return y
        owner = torch.searchsorted(offsets, torch.arange(len(x), device=x.device), right=True)
        return y * gains.to(y.dtype).index_select(0, owner)


class LoraExperts(nn.Module):
    """`moe.Experts` whose three stacks are layers, with adapters where they were asked for."""

    def __init__(self, stacks: dict[str, FrozenStack]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (stacks[n] for n in EXPERT_PARTS)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """As `Experts.forward`."""
        hidden = F.silu(self.gate_proj(x, offsets)) * self.up_proj(x, offsets)
        return self.down_proj(hidden, offsets)  # type: ignore[no-any-return]


EXACT_SIZE = 2048


def principal_roots(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [..., r, K] and B [..., N, r] with B A the best approximation of W [..., N, K] of rank r.

    A = sqrt(S) V^T, B = U sqrt(S) of the r largest singular values. Exact up to `EXACT_SIZE`; beyond, by
    subspace iteration from seeded noise (Halko et al. 2011, algorithm 4.4), as the paper's fast SVD does.
    """
    if min(weight.shape[-2:]) <= EXACT_SIZE:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        noise = torch.randn(*weight.shape[:-2], weight.shape[-1], rank + 8, generator=generator)
        basis = torch.linalg.qr(weight @ noise).Q
        for _ in range(8):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ basis).Q).Q
        u, s, vh = torch.linalg.svd(basis.mT @ weight, full_matrices=False)
        u = basis @ u
    root = s[..., :rank].sqrt()
    return root[..., None] * vh[..., :rank, :], u[..., :rank] * root[..., None, :]
