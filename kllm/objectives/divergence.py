"""How far a student's next-token distribution q is from a teacher's p: one function per published loss.

All take log-probabilities [n, outcomes], already at the temperature, and give nats [n] (ULD: a
distance in [0, 2]). Gradients flow into q only.

forward   KL(p || q)                                            Hinton et al. 2015 (arXiv 1503.02531)
reverse   KL(q || p)                                            Gu et al. 2023, MiniLLM (arXiv 2306.08543)
jsd       b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q
          Agarwal et al. 2024, GKD, eq. 1 (arXiv 2306.13649); b = 0 and 1 stand for its limits after
          division by b and 1 - b: forward and reverse
skew_forward  KL(p || l p + (1 - l) q)                          Ko et al. 2024, DistiLLM (arXiv 2402.03898)
skew_reverse  KL(q || (1 - l) p + l q)                          the same
uld       sum_i |p_(i) - q_(i)|, both sorted by size            Boizard et al. 2024 (arXiv 2402.12030)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = 1e-8  # probability mass that float32 cannot tell from none


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [n] from log-probabilities [n, outcomes]."""
    return (p.exp() * (p - q)).sum(dim=-1)


def mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q) from log-probabilities; 0 < share < 1."""
    return torch.logaddexp(p + math.log(share), q + math.log1p(-share))


def _jsd(p: Tensor, q: Tensor, beta: float, skew: float) -> Tensor:
    if beta in (0.0, 1.0):
        return kl(q, p) if beta else kl(p, q)
    m = mixture(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def _skew_forward(p: Tensor, q: Tensor, beta: float, skew: float) -> Tensor:
    return kl(p, mixture(p, q, skew) if skew else q)


def _skew_reverse(p: Tensor, q: Tensor, beta: float, skew: float) -> Tensor:
    return kl(q, mixture(q, p, skew) if skew else p)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "forward": lambda p, q, beta, skew: kl(p, q),
    "reverse": lambda p, q, beta, skew: kl(q, p),
    "jsd": _jsd,
    "skew_forward": _skew_forward,
    "skew_reverse": _skew_reverse,
}


def uld(p: Tensor, q: Tensor, top_k: int = 0) -> Tensor:
    """Universal logit distillation [n]: L1 of sorted probabilities, the shorter padded with zeros.

    Args:
        p: the teacher's log-probabilities [n, its vocabulary].
        q: the student's [n, its vocabulary].
        top_k: compare the k largest and the mass of all others (a full sort costs as much as the
            head); 0 = all.
    """
    if top_k:
        a, b = _largest(p, top_k), _largest(q, top_k)
    else:
        a, b = (x.exp().sort(dim=-1, descending=True).values for x in (p, q))
    width = max(a.shape[-1], b.shape[-1])
    a, b = (F.pad(x, (0, width - x.shape[-1])) for x in (a, b))
    return (a - b).abs().sum(dim=-1)


def _largest(logprobs: Tensor, k: int) -> Tensor:
    """Probabilities [n, k + 1]: the k largest, then the rest together."""
    top = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1).values.exp()
    top = F.pad(top, (0, k - top.shape[-1]))
    return torch.cat((top, 1 - top.sum(dim=-1, keepdim=True)), dim=-1)


def teacher_with_tail(logprobs: Tensor) -> Tensor:
    """Log-probabilities [n, k + 1] from a teacher's top-k [n, k]: the rest is one more outcome.

    Dropping the rest (renormalising the top-k) is biased: the student learns to put no mass there
    (Anshumann et al. 2025, arXiv 2503.16870). As one outcome it keeps its mass, and every divergence
    here is then a lower bound of the whole one (data processing), exact as k grows.
    """
    rest = 1 - logprobs.exp().sum(dim=-1, keepdim=True)
    return torch.cat((logprobs, rest.clamp_min(_FLOOR).log()), dim=-1)


def student_with_tail(logits: Tensor, ids: Tensor) -> Tensor:
    """The student's side of `teacher_with_tail`: log-probabilities [n, k + 1], the rest last.

    Args:
        logits: float32 [n, V] over the temperature.
        ids: int64 [n, k], k < V, the teacher's outcomes.
    """
    chosen = logits.gather(1, ids)
    rest = logits.scatter(1, ids, -math.inf).logsumexp(dim=-1)  # no 1 - sum: exact where little is left
    return torch.cat((chosen, rest[:, None]), dim=-1).log_softmax(dim=-1)
