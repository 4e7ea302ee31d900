"""Cross-entropy straight from hidden states and the head: the full [T, V] logits never exist.

The gradient is made in the forward pass, chunk by chunk (softmax minus one-hot), so nothing is
recomputed and the peak is one chunk of logits. Rows without a label are left out before the head.
Where a loss is a function of whole answers (preferences), `token_logprobs` gives each label's
log-probability instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_i w_i * -log softmax(h_i W^T)[y_i] with dH and dW computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, chunk: int
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk]
            w = None if weights is None else weights[start : start + chunk]
            logits = (h @ weight.t()).float()
            top = logits.max(dim=-1, keepdim=True).values
            true = logits.gather(1, y[:, None])
            exps = logits.sub_(top).exp_()  # in place: one chunk of logits is the peak
            norm = exps.sum(dim=-1, keepdim=True)
            losses = (norm.log() + top - true).squeeze(1)
            total += (losses if w is None else losses * w).sum()
            if not (need_hidden or need_weight):
                continue
            grad = exps.div_(norm)
            grad.scatter_add_(1, y[:, None], torch.full_like(true, -1.0))
            if w is not None:
                grad.mul_(w[:, None])
            grad = grad.to(hidden.dtype)
            fold_gradient(grad, h, weight, grad_hidden, grad_weight, slice(start, start + chunk))
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx.saved_tensors, grads[0]), None, None, None)


def fold_gradient(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    part: slice,
) -> None:
    """Adds what the gradient of logits [n, V] means for dH [T, H], its rows `part`, and dW [V, H]."""
    if grad_hidden is not None:
        torch.mm(grad, weight.to(h.dtype), out=grad_hidden[part])
    if grad_weight is not None:
        if h.dtype == torch.float32:
            grad_weight.addmm_(grad.t(), h)
        else:
            grad_weight += grad.t() @ h


def scaled_gradients(saved: tuple[Tensor | None, ...], scale: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass of gradients that the forward pass made, in place: it works once."""
    return tuple(None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in saved)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """Summed (not averaged) cross-entropy of next-token labels, in nats.

    Args:
        hidden: [T, H].
        weight: the head, [V, H].
        labels: int64 [T], `IGNORE` where nothing is to be predicted.
        weights: float32 [T] loss weights, or None for ones.
        chunk: rows of logits alive at once.

    Returns:
        float32 scalar; backward works once (gradients are made in the forward pass).
    """
    keep = (labels != IGNORE).nonzero().squeeze(1)
    if keep.shape[0] != labels.shape[0]:
        hidden, labels = hidden.index_select(0, keep), labels.index_select(0, keep)
        weights = None if weights is None else weights.index_select(0, keep)
    hidden, weight = _autocast(hidden, weight)
    return _LinearCrossEntropy.apply(hidden, weight, labels, weights, chunk)  # type: ignore[no-untyped-call]


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
    """float32 [T] losses in nats, 0 where the label is IGNORE (evaluation, tests)."""
    out = torch.zeros(labels.shape[0], dtype=torch.float32, device=hidden.device)
    keep = (labels != IGNORE).nonzero().squeeze(1)
    for rows in keep.split(chunk):
        logits = (hidden[rows] @ weight.t().to(hidden.dtype)).float()
        out[rows] = torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")
    return out


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the precision of the surrounding autocast, as a matrix product would take them."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h_i W^T)[y_i] for each i.

    d/dh_i is W[y_i] - sum_v p_iv W[v] whatever comes from above, so it is made in the forward pass
    when the head is frozen, and the backward is one product by row. A head that learns needs the
    softmax times what comes from above: its backward makes each chunk of logits once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        frozen_head = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        slope = torch.empty_like(hidden) if frozen_head else None
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        norms = torch.empty_like(out)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).float()
            norm = logits.logsumexp(dim=-1)
            norms[part] = norm
            out[part] = logits.gather(1, labels[part, None]).squeeze(1) - norm
            if slope is not None:
                grad = _one_hot_minus_softmax(logits, norm, labels[part]).to(hidden.dtype)
                torch.mm(grad, weight, out=slope[part])
        ctx.chunk = chunk
        if frozen_head:
            ctx.save_for_backward(slope)
        elif ctx.needs_input_grad[1]:
            ctx.save_for_backward(hidden, weight, labels, norms)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        above = grads[0][:, None]
        if not ctx.needs_input_grad[1]:
            (slope,) = ctx.saved_tensors
            return slope * above.to(slope.dtype), None, None, None
        hidden, weight, labels, norms = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = (hidden[part] @ weight.t()).float()
            grad = _one_hot_minus_softmax(logits, norms[part], labels[part]).mul_(above[part])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), hidden[part])
            else:
                grad_weight += grad.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _one_hot_minus_softmax(logits: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
    """d log softmax(logits)[label] / d logits, in the memory of `logits`."""
    grad = logits.sub_(norm[:, None]).exp_().neg_()
    return grad.scatter_add_(1, labels[:, None], torch.ones_like(norm)[:, None])


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
    """Log-probability of each label in nats, differentiable; logits exist a chunk at a time.

    Args:
        hidden: [T, H].
        weight: the head, [V, H]; its gradient is made only if it is asked for.
        labels: int64 [T], `IGNORE` where there is none.
        chunk: rows of logits alive at once.

    Returns:
        float32 [T], 0 where the label is IGNORE.
    """
    keep = (labels != IGNORE).nonzero().squeeze(1)
    rows, weight = _autocast(hidden.index_select(0, keep), weight)
    values = _TokenLogprobs.apply(rows, weight, labels.index_select(0, keep), chunk)  # type: ignore[no-untyped-call]
    return values.new_zeros(labels.shape[0]).index_copy(0, keep, values)  # type: ignore[no-any-return]
