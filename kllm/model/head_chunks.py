"""Any loss of next-token logits, straight from hidden states and the head, a chunk of logits at a time.

What `head.linear_cross_entropy` does for cross-entropy, for a loss given as a function: the gradient
of each chunk's logits is made in the forward pass by autograd and folded into dH and dW at once, so
[T, V] never exists, nor anything that the function computes on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kllm.model.head import fold_gradient, scaled_gradients

ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(float32 logits [n, V], which of the rows they are) -> (scalar sum, float32 [figures] sums to report)."""


class _ChunkedLoss(torch.autograd.Function):
    """sum over chunks of fn(h W^T), with dH and dW computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, fn: ChunkLoss, chunk: int, figures: int
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        sums = hidden.new_zeros(figures, dtype=torch.float32)
        rows = hidden.shape[0]
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            h = hidden[part]
            logits = (h @ weight.t()).float()
            if not (need_hidden or need_weight):
                loss, seen = fn(logits, part)
                total += loss
                sums += seen
                continue
            with torch.enable_grad():
                loss, seen = fn(logits.requires_grad_(), part)
            total += loss.detach()
            sums += seen.detach()
            if not loss.requires_grad:  # nothing in this chunk depends on the logits
                continue
            grad = torch.autograd.grad(loss, logits)[0].to(hidden.dtype)
            fold_gradient(grad, h, weight, grad_hidden, grad_weight, part)
            del logits, loss, grad  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx.saved_tensors, grads[0]), None, None, None)


def chunked_loss(
    hidden: Tensor, weight: Tensor, rows: Tensor, fn: ChunkLoss, chunk: int = 1024, figures: int = 0
) -> tuple[Tensor, Tensor]:
    """Sum of `fn` over the logits of some rows, differentiable in `hidden` and `weight`.

    Args:
        hidden: [T, H].
        weight: the head, [V, H].
        rows: int64 [N], the rows of `hidden` that count, in the order in which `fn` sees them.
        fn: see `ChunkLoss`; its slice is into `rows`. Only its first result is differentiated, and only
            with respect to the logits.
        chunk: rows of logits alive at once.
        figures: length of fn's second result.

    Returns:
        (float32 scalar, float32 [figures]); backward works once (gradients are made in the forward pass).
    """
    if rows.shape[0] != hidden.shape[0]:
        hidden = hidden.index_select(0, rows)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _ChunkedLoss.apply(hidden, weight, fn, chunk, figures)  # type: ignore[no-untyped-call]
