"""What changes a row's logits before a token is drawn: penalties, bias, forbidden tokens, grammars.

Tensors over the batch; the only Python work is per request, never per token of the vocabulary. Order as
in transformers and OpenAI's API: repetition penalty (prompt and answer), presence and frequency penalties
(answer), bias, end tokens before `min_tokens`, grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kllm.engine.params import TokenLogprob

if TYPE_CHECKING:
    from kllm.engine.request import Request

_FORBIDDEN = float("-inf")
_LARGEST = 1e30  # absurd penalties and biases stay finite
_LOGITS = 2**24  # numbers of prompt logits at a time: 64 MiB


def adjust(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Logits float32 [B, V] of `requests`, adjusted; the given tensor is not changed if anything is."""
    if not any(_needs(r) for r in requests):
        return logits
    raw, logits = logits, logits.clone()
    _repetition(logits, requests)
    _presence_frequency(logits, requests)
    for row, request in enumerate(requests):
        params = request.params
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            logits[row, torch.tensor(ids, device=logits.device)] += torch.tensor(values, device=logits.device)
    logits.clamp_(-_LARGEST, _LARGEST)
    for row, request in enumerate(requests):
        if request.drawn < request.params.min_tokens and request.stop_ids:
            logits[row, torch.tensor(sorted(request.stop_ids), device=logits.device)] = _FORBIDDEN
    _grammars(logits, raw, requests)
    return logits


def _needs(request: Request) -> bool:
    p = request.params
    return (
        request.seen is not None
        or request.counts is not None
        or bool(p.logit_bias)
        or request.drawn < p.min_tokens
        or request.matcher is not None
    )


def _those(
    tensors: Sequence[Tensor | None],
) -> tuple[list[int], list[Tensor]]:
    """Rows that have a tensor, and the tensors."""
    return [i for i, t in enumerate(tensors) if t is not None], [t for t in tensors if t is not None]


def _repetition(logits: Tensor, requests: Sequence[Request]) -> None:
    rows, tensors = _those([r.seen for r in requests])
    if not rows:
        return
    seen = torch.stack(tensors).to(logits.device)
    wanted = [[min(max(requests[i].params.repetition_penalty, 1e-6), 1e6)] for i in rows]
    penalty = torch.tensor(wanted, device=logits.device)
    index = torch.tensor(rows, device=logits.device)
    chosen = logits[index]
    scaled = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    logits[index] = torch.where(seen, scaled, chosen)


def _presence_frequency(logits: Tensor, requests: Sequence[Request]) -> None:
    rows, tensors = _those([r.counts for r in requests])
    if not rows:
        return
    counts = torch.stack(tensors).to(logits.device)
    wanted = [(requests[i].params.presence_penalty, requests[i].params.frequency_penalty) for i in rows]
    presence, frequency = torch.tensor(wanted, device=logits.device).unsqueeze(-1).unbind(1)
    logits[torch.tensor(rows, device=logits.device)] -= presence * (counts > 0) + frequency * counts


def _grammars(logits: Tensor, raw: Tensor, requests: Sequence[Request]) -> None:
    rows = [i for i, r in enumerate(requests) if r.matcher is not None]
    if not rows:
        return
    from kllm.engine.grammar import fill_masks

    allowed = fill_masks([requests[i].matcher for i in rows], logits.shape[1])  # type: ignore[misc]
    index = torch.tensor(rows, device=logits.device)
    mask = torch.from_numpy(allowed).to(logits.device)
    chosen = logits[index].masked_fill_(~mask, _FORBIDDEN)
    # where the grammar can only end and `min_tokens` forbids the end, the grammar wins
    stuck = (chosen == _FORBIDDEN).all(-1, keepdim=True)
    logits[index] = torch.where(stuck, raw[index].masked_fill(~mask, _FORBIDDEN), chosen)


def logprobs_of(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` and of the `counts` best at each place.

    Args:
        logits: float32 [n, V], the model's own.
        tokens: n token ids.
        counts: how many best ones each wants.
    """
    logs = logits.log_softmax(-1)
    own = logs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(counts), logits.shape[1])
    if not most:
        return [TokenLogprob(t, lp) for t, lp in zip(tokens, own, strict=True)]
    best = logs.topk(most, dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprob(token, lp, tuple(zip(ids[i][:k], values[i][:k], strict=True)))
        for i, (token, lp, k) in enumerate(zip(tokens, own, counts, strict=True))
    ]


def blocks(rows: int, vocab: int) -> list[slice]:
    """Slices of `rows` positions whose logits fit into memory together."""
    size = max(1, _LOGITS // vocab)
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]
