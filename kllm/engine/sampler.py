"""Picks the next token of every row at once, each row by its own parameters and its own noise.

Every filter becomes a probability threshold per row (top-k: the k-th value; top-p: the last value of the
nucleus; min-p: a share of the best), so the whole vocabulary is never sorted unless a flat distribution
needs it. One uniform number per token then picks by inverse CDF; it is a hash of (seed, token number),
so a row's draw cannot depend on its neighbours. Order as in transformers: temperature, top-k, top-p (of
what top-k kept), min-p; `kllm.engine.adjust` has been at the logits before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kllm.engine.params import SamplingParams

_HEAD = 64  # values looked at before sorting all: mostly holds the nucleus of a trained model's row
_MASK = 2**64 - 1


def uniforms(seeds: Sequence[int], counters: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) per row, float32 [rows], from a request's seed and its token number.

    SplitMix64 (Steele, Lea, Flood 2014) with a hashed seed as its starting state, so that neighbouring
    seeds give unrelated streams. 24 bits: what a float32 below 1 holds exactly.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = _mix(np.array([s & _MASK for s in seeds], dtype=np.uint64) + golden)
    bits = _mix(state + (np.array(counters, dtype=np.uint64) + np.uint64(1)) * golden)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
            filtered=any(p.top_k > 0 or p.top_p < 1 for p in rows),
        )


def sample(logits: Tensor, settings: RowSettings, noise: np.ndarray) -> Tensor:
    """Next token ids, int64 [B]; -1 for a row without a finite best logit (damaged weights).

    Args:
        logits: float32 [B, V], adjusted.
        settings: the parameters of the B rows.
        noise: float32 [B] from `uniforms`.
    """
    best = logits.argmax(-1)
    broken = ~logits.gather(1, best[:, None]).squeeze(1).isfinite()
    if bool(broken.any()):
        logits = logits.masked_fill(broken[:, None], 0.0)
        return _sample(logits, settings, noise, best).masked_fill_(broken, -1)
    return _sample(logits, settings, noise, best)


def _sample(logits: Tensor, settings: RowSettings, noise: np.ndarray, best: Tensor) -> Tensor:
    if len(settings.sampled) == 0:
        return best
    uniform = torch.from_numpy(noise).to(logits.device)
    if len(settings.sampled) == len(logits):
        return _draw(logits, settings, uniform, best)
    rows = settings.sampled
    return best.index_copy(0, rows, _draw(logits[rows], settings, uniform[rows], best[rows]))


def _draw(logits: Tensor, settings: RowSettings, uniform: Tensor, best: Tensor) -> Tensor:
    probs = torch.softmax(logits / settings.temperature, dim=-1)
    threshold = settings.min_p * probs.amax(-1, keepdim=True)
    if settings.filtered:
        threshold = torch.maximum(threshold, _nucleus(probs, settings))
    cdf = probs.masked_fill_(probs < threshold, 0.0).cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)
    # A parallel prefix sum may dip by a rounding error and point at a token that was filtered out.
    return torch.where(probs.gather(1, drawn) > 0, drawn, best[:, None]).squeeze(1)


def _nucleus(probs: Tensor, settings: RowSettings) -> Tensor:
    """Smallest probability kept by top-k and top-p, [n, 1]."""
    top_k, top_p = settings.top_k, settings.top_p
    threshold, short = _threshold(probs.topk(settings.head).values, top_k, top_p)
    if settings.head < probs.shape[1] and bool(short.any()):
        rows = short.squeeze(1).nonzero().squeeze(1)
        ordered = _sorted(probs[rows])
        threshold[rows] = _threshold(ordered, top_k[rows], top_p[rows])[0]
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
