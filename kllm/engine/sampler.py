"""Picks the next token of every row at once, each row by its own parameters and its own noise.

Every filter becomes a probability threshold per row (top-k: the k-th value; top-p: the last value of the
nucleus; min-p: a share of the best), so the whole vocabulary is never sorted unless a flat distribution
needs it. What is left is drawn by the exponential form of Gumbel-max: the token with the largest
probability / E, where E is exponential noise made of (seed, token number, token id) alone. So a draw cannot
depend on neighbours, and a rounding error turns it only where two tokens all but tie (an inverse CDF has a
border to fall off at every token). Order as in transformers: temperature, top-k, top-p (of what top-k
kept), min-p; `kllm.engine.adjust` has been at the logits before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kllm.engine.params import SamplingParams

_SECOND = 1024  # values looked at before sorting all, the second time
_HEAD = 64  # values looked at before sorting all: mostly holds the nucleus of a trained model's row


def streams(seeds: Sequence[int], counters: Sequence[int]) -> Tensor:
    """The noise of one token number of each row: int64 [rows], a state to draw from per token id.

    SplitMix64 (Steele, Lea, Flood 2014) with a hashed seed as its starting state, so that neighbouring
    seeds and numbers give unrelated streams.
    """
    state = _mix(torch.tensor([_signed(s) for s in seeds]) + _GOLDEN)
    return _mix(state + (torch.tensor(counters) + 1) * _GOLDEN)


def exponentials(states: Tensor, ids: Tensor) -> Tensor:
    """Exponential noise float32 (mean 1) of token `ids` in streams `states` (int64, broadcast together).

    MurmurHash3's 32-bit finaliser over a Weyl sequence that begins at the stream's state: 32 bits, because
    processors multiply those eight at a time. E lies in 3e-8..17.4.
    """
    low, high = states.to(torch.int32), (states >> 32).to(torch.int32)
    x = ids.to(torch.int32) * _signed32(0x9E3779B1) + low
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed32(0x85EBCA6B)
    x = (x ^ ((x >> 13) & 0x7FFFF) ^ high) * _signed32(0xC2B2AE35)
    bits = ((x ^ ((x >> 16) & 0xFFFF)) >> 8) & (2**24 - 1)
    return bits.float().add_(0.5).mul_(2.0**-24).log_().neg_()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(n: int) -> int:
    """The int64 with the same 64 bits: arithmetic wraps around as the unsigned one does."""
    n &= 2**64 - 1
    return n - 2**64 if n >= 2**63 else n


def _signed32(n: int) -> int:
    return n - 2**32 if n >= 2**31 else n


_GOLDEN = _signed(0x9E3779B97F4A7C15)


@dataclass
class RowSettings:
    """The parameters of B rows as tensors; rebuilt only when the batch changes.

    `sampled` are the int64 numbers of the rows that are not greedy; the other tensors have one entry per
    sampled row, shaped [n, 1].
    """

    sampled: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    head: int
    filtered: bool

    @classmethod
    def build(cls, params: Sequence[SamplingParams], device: torch.device, vocab: int) -> RowSettings:
        """Settings of `params`, one per row, for logits of `vocab` columns on `device`."""
        sampled = [i for i, p in enumerate(params) if not p.greedy]
        rows = [params[i] for i in sampled]

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        return cls(
            sampled=torch.tensor(sampled, dtype=torch.int64, device=device),
            temperature=column([max(p.temperature, 1e-5) for p in rows]),
            top_k=column([min(p.top_k, vocab) for p in rows], torch.int64),
            top_p=column([p.top_p for p in rows]),
            min_p=column([p.min_p for p in rows]),
            head=min(vocab, max([_HEAD, *(p.top_k for p in rows)])),
            filtered=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in rows),
        )


def sample(logits: Tensor, settings: RowSettings, states: Tensor) -> Tensor:
    """Next token ids, int64 [B]; -1 for a row without a finite best logit (damaged weights).

    Args:
        logits: float32 [B, V], adjusted.
        settings: the parameters of the B rows.
        states: int64 [B] from `streams`.
    """
    best = logits.argmax(-1)
    broken = ~logits.gather(1, best[:, None]).squeeze(1).isfinite()
    if bool(broken.any()):
        logits = logits.masked_fill(broken[:, None], 0.0)
        return _sample(logits, settings, states, best).masked_fill_(broken, -1)
    return _sample(logits, settings, states, best)


def _sample(logits: Tensor, settings: RowSettings, states: Tensor, best: Tensor) -> Tensor:
    if len(settings.sampled) == 0:
        return best
    rows, states = settings.sampled, states.to(logits.device)
    if len(rows) == len(logits):
        return _draw(logits, settings, states)
    return best.index_copy(0, rows, _draw(logits[rows], settings, states[rows]))


def _draw(logits: Tensor, settings: RowSettings, states: Tensor) -> Tensor:
    probs = torch.softmax(logits / settings.temperature, dim=-1)
    if not settings.filtered:
        return (probs / exponentials(states[:, None], _ids(probs))).argmax(-1)
    threshold = torch.maximum(settings.min_p * probs.amax(-1, keepdim=True), _nucleus(probs, settings))
    row, token = ((probs >= threshold) & (probs > 0)).nonzero(as_tuple=True)
    scores = torch.zeros_like(probs)
    scores[row, token] = probs[row, token] / exponentials(states[row], token)
    return scores.argmax(-1)


def _ids(probs: Tensor) -> Tensor:
    return torch.arange(probs.shape[1], device=probs.device)


def _nucleus(probs: Tensor, settings: RowSettings) -> Tensor:
    """Smallest probability kept by top-k and top-p, [n, 1]."""
    top_k, top_p = settings.top_k, settings.top_p
    threshold, short = _threshold(probs.topk(settings.head).values, top_k, top_p)
    if settings.head < probs.shape[1] and bool(short.any()):
        rows = short.squeeze(1).nonzero().squeeze(1)
        for count in (_SECOND, probs.shape[1]):
            if not len(rows) or (count == _SECOND and 2 * count > probs.shape[1]):
                continue
            part = probs[rows]
            ordered = part.topk(count).values if count == _SECOND else _sorted(part)
            threshold[rows], short = _threshold(ordered, top_k[rows], top_p[rows])
            rows = rows[short.squeeze(1)]
    return threshold


def _sorted(probs: Tensor) -> Tensor:
    """Each row of [n, V] in falling order; on a CPU by numpy, whose vectorised sort is 5x torch's."""
    if probs.device.type == "cpu":
        return torch.from_numpy(-np.sort(-probs.numpy(), axis=-1))
    return probs.sort(dim=-1, descending=True).values


def _threshold(ordered: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Threshold [n, 1] from the largest probabilities, and whether these were too few to tell."""
    columns = torch.arange(ordered.shape[1], device=ordered.device)
    limited = top_k > 0
    within = ordered.masked_fill(limited & (columns >= top_k), 0.0)
    mass = within.cumsum(-1)
    wanted = torch.where(limited, top_p * mass[:, -1:], top_p)
    # A token stays while the mass before it is below top_p: the one that crosses the line is kept.
    kept = ((mass - within) < wanted).sum(-1, keepdim=True)
    limit = torch.where(limited, top_k, ordered.shape[1])
    kept = torch.where(top_p < 1, torch.minimum(kept, limit), limit).clamp_(min=1)
    threshold = ordered.gather(1, kept - 1)
    off = ~limited & (top_p >= 1)
    short = ~limited & ~off & (mass[:, -1:] < top_p)
    return threshold.masked_fill_(off, 0.0), short
