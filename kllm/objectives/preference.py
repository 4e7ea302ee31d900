"""Learning from preferences: a better and a worse answer to one question, or single answers with a rating.

With l(y) = log p(y | x) summed over the tokens of an answer, r(y) = l(y) - l_ref(y) its log-ratio to a
frozen reference model, and a bar for "divided by the number of tokens", the losses of a pair are

    dpo     -log s(b (r_c - r_r))                          simpo   -log s(b (mean l_c - mean l_r - gamma))
    cdpo    dpo with a share e of the labels flipped       orpo    -mean l_c - b log s(log odds ratio)
    robust  dpo, unbiased when a share e is flipped        hinge   max(0, 1 - b (r_c - r_r))
    ipo     (mean r_c - mean r_r - 1 / 2b)^2               kto     of single answers, see `kto`

where s is the sigmoid, c the chosen answer and r the rejected one. Each is a function below. Both
answers run in one packed forward, behind one copy of the prompt that they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kllm.data.batch import Batch, Sequences
from kllm.errors import UserError
from kllm.model.attention import PackedLayout
from kllm.model.head import token_logprobs
from kllm.model.moe import RouterLog
from kllm.objectives.lm import router_terms
from kllm.objectives.mismatch import mismatched
from kllm.objectives.reference import logprobs_without_adapters, reference_logprobs
from kllm.train.objective import Loss, unwrap

Reference = Literal["cached", "adapters_off", "none"]
Metrics = dict[str, tuple[object, object]]

__all__ = ["Preference", "reference_logprobs"]

NEED_REFERENCE = frozenset({"dpo", "cdpo", "robust", "hinge", "ipo", "kto"})
PER_TOKEN = frozenset({"ipo", "simpo", "orpo"})
"""Losses that compare means over tokens by their definition."""


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log s(beta (r_c - r_r)), Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; log-ratios [pairs]."""
    return -F.logsigmoid(beta * (chosen - rejected))


def cdpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(1 - e) dpo(c, r) + e dpo(r, c): a share e of the labels is wrong (Mitchell 2023, "A note on DPO
    with noisy preferences"). Its minimum is a finite margin, log((1 - e) / e) / beta."""
    right, wrong = dpo(chosen, rejected, beta), dpo(rejected, chosen, beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def robust(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """((1 - e) dpo(c, r) - e dpo(r, c)) / (1 - 2e), whose mean over flipped labels is the loss of the
    true ones (Chowdhury et al. 2024, arXiv 2403.00409)."""
    right, wrong = dpo(chosen, rejected, beta), dpo(rejected, chosen, beta)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta (r_c - r_r)): SLiC's loss on normalised log-probabilities (Zhao et al. 2023,
    arXiv 2305.10425; RSO, Liu et al. 2023, arXiv 2309.06657)."""
    return F.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 with h = r_c - r_r (Azar et al. 2023, arXiv 2310.12036, eq. 17; tau = beta).

    Give means over tokens: the paper writes sums, whose square grows with the length of answers, but
    its authors confirmed that their results are from means, which all later implementations use.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log s(beta (l_c - l_r - gamma)), with mean log-probabilities (Meng et al. 2024, arXiv 2405.14734,
    eq. 6). `gamma` is the wanted margin as a share of beta: the paper's gamma / beta."""
    return -F.logsigmoid(beta * (chosen - rejected - gamma))


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-l_c - beta log s(log(odds_c / odds_r)), odds = p / (1 - p), p = exp(mean log-probability)
    (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7; beta is its lambda)."""
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x <= 0; certainty (x = 0) is taken as a probability of 1 - 1e-6."""
    return torch.log(-torch.expm1(x.clamp(max=-1e-6)))


def kto(
    ratios: Tensor,
    good: Tensor,
    z_ref: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w (1 - s(+-beta (r - z))), + and w_D for good answers, - and w_U for bad ones (Ethayarajh et al.
    2024, arXiv 2402.01306, section 4.1).

    z is the policy's KL to the reference, estimated on the answers of other questions and not
    differentiated. With z = 0 this is APO-zero for single answers (D'Oosterlinck et al. 2024, arXiv
    2408.06266, eq. 7).
    """
    margin = beta * (ratios - z_ref)
    weight = torch.where(good, desirable_weight, undesirable_weight)
    return weight * (1 - torch.where(good, margin, -margin).sigmoid())


@dataclass
class _Answers:
    """Of each answer, [count]: summed log-probability, log-ratio and KL terms (None without a reference),
    tokens."""

    logps: Tensor
    ratios: Tensor | None
    kl: Tensor | None
    lengths: Tensor
    good: Tensor
    """The chosen one of its pair, or rated good."""

    def scores(self, ratio: bool, per_token: bool) -> Tensor:
        """What a loss compares."""
        sums = self.ratios if ratio and self.ratios is not None else self.logps
        return sums / self.lengths if per_token else sums


class Preference:
    """An objective over preference pairs, or over rated answers with `kto`.

    The loss of a batch is a sum over its pairs (kto: over its answers). `kto` also takes pairs, as a
    good and a bad answer each.

    KTO's z is a figure of a whole batch. With `adapters_off` both models are at hand, and z is the
    paper's: max(0, mean log-ratio) over the answers of the micro-batch, each behind another's question,
    at the price of two forwards without gradients. With `cached` no reference model is in memory to
    score such a pairing, and z is 0, which is APO-zero: z has no gradient and decides only from where on
    the sigmoid saturates.

    Rewards in the metrics are beta times what the loss compares: log-ratios, or log-probabilities
    without a reference, as sums or means over tokens.

    Args:
        loss: one of dpo, cdpo, robust, hinge, ipo, simpo, orpo, kto.
        beta: strength of the pull towards the reference; simpo: scale of the margin (2 to 10).
        label_smoothing: cdpo, robust: share of pairs with the wrong label, below 0.5.
        gamma: simpo: margin, as a share of beta.
        rpo_alpha: adds alpha times the negative log-probability per token of each chosen answer, which
            keeps it likely (Pang et al. 2024, arXiv 2404.19733).
        reference: where reference log-probabilities come from: `cached` is `batch.extras["reference"]`,
            `adapters_off` the same model without its adapter, `none` for simpo and orpo.
        length_normalised: compare means over tokens instead of sums.
        desirable_weight, undesirable_weight: kto: weights of good and bad answers.
        loss_chunk: positions whose logits are alive at once.

    Raises:
        UserError: an unknown loss, or one that needs a reference without any.
    """

    def __init__(
        self,
        loss: str = "dpo",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        gamma: float = 0.5,
        rpo_alpha: float = 0.0,
        reference: Reference = "cached",
        *,
        length_normalised: bool = False,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_chunk: int = 1024,
    ) -> None:
        pair_losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "dpo": partial(dpo, beta=beta),
            "cdpo": partial(cdpo, beta=beta, label_smoothing=label_smoothing),
            "robust": partial(robust, beta=beta, label_smoothing=label_smoothing),
            "hinge": partial(hinge, beta=beta),
            "ipo": partial(ipo, beta=beta),
            "simpo": partial(simpo, beta=beta, gamma=gamma),
            "orpo": partial(orpo, beta=beta),
        }
        if loss != "kto" and loss not in pair_losses:
            raise UserError(f"unknown preference loss {loss!r}", hint=", ".join([*pair_losses, "kto"]))
        if loss in NEED_REFERENCE and reference == "none":
            raise UserError(f"{loss} needs a reference model", hint="simpo and orpo do without")
        self.loss, self.beta, self.rpo_alpha, self.reference = loss, beta, rpo_alpha, reference
        self.per_token = length_normalised or loss in PER_TOKEN
        self.loss_chunk = loss_chunk
        self._of_pairs = pair_losses.get(loss)
        self._of_ratings = partial(
            kto, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
        )

    def weight(self, batch: Batch) -> float:
        """Number of pairs, or of answers for kto."""
        sequences = _sequences(batch)
        return float(sequences.count if self.loss == "kto" else sequences.count // 2)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed loss of the batch, shapes as in Batch."""
        inner, sequences = unwrap(model), _sequences(batch)
        if sequences.good is not None and self.loss != "kto":
            raise UserError(f"{self.loss} learns from pairs, the data has single ratings", hint="use kto")
        reference = self._reference(inner, batch)
        z_ref = self._z_ref(inner, batch) if self.loss == "kto" else None
        layout = PackedLayout(batch.cu_seqlens, batch.tokens.device, batch.parents)
        router = RouterLog() if inner.shape.is_moe else None
        hidden = model(batch.tokens, batch.positions, layout, router)
        logps = token_logprobs(hidden, inner.head_weight, batch.labels, self.loss_chunk)
        answers = _answers(logps, reference, sequences)
        scores = answers.scores(self.loss in NEED_REFERENCE, self.per_token)
        if self._of_pairs is not None:
            losses = self._of_pairs(scores[0::2], scores[1::2])
        else:
            losses = self._of_ratings(scores, answers.good, 0.0 if z_ref is None else z_ref)
        total, weight = losses.sum(), self.weight(batch)
        sft = -(answers.logps / answers.lengths)[answers.good].sum()
        if self.rpo_alpha:
            total = total + self.rpo_alpha * sft
        metrics: Metrics = {"train/loss": (total.detach(), weight)}
        if self.rpo_alpha or self.loss == "orpo":
            metrics["train/sft_loss"] = (sft.detach(), answers.good.sum())
        metrics.update(self._figures(answers, scores.detach(), z_ref, sequences.good is None))
        if router is not None:
            aux, figures = router_terms(router, inner.shape, layout, weight)
            total = total + aux
            metrics.update(figures)
        return Loss(total, metrics)

    def _reference(self, inner: nn.Module, batch: Batch) -> Tensor | None:
        """float32 [T] log-probabilities of the labels under the reference, None if there are none.

        A loss without a reference counts the drift from one that the batch carries.
        """
        if self.reference == "adapters_off":
            return logprobs_without_adapters(inner, batch, self.loss_chunk)
        known = batch.extras.get("reference")
        if self.reference == "cached" and known is None:
            raise UserError(
                "the batch has no reference log-probabilities",
                hint="annotate the shards with reference_logprobs, or use another reference",
            )
        return known

    def _z_ref(self, inner: nn.Module, batch: Batch) -> Tensor:
        """KTO's z, a scalar; see the class."""
        others = mismatched(batch) if self.reference == "adapters_off" else None
        if others is None or others.sequences is None:
            return torch.zeros((), device=batch.tokens.device)
        policy = reference_logprobs(inner, others, self.loss_chunk)
        reference = logprobs_without_adapters(inner, others, self.loss_chunk)
        ratios = _answers(policy, reference, others.sequences).scores(ratio=True, per_token=self.per_token)
        return ratios.mean().clamp(min=0)

    @torch.no_grad()
    def _figures(self, answers: _Answers, scores: Tensor, z_ref: Tensor | None, pairs: bool) -> Metrics:
        """Sums and weights; the same names whatever the batch holds."""
        good, rewards = answers.good, self.beta * scores
        metrics: Metrics = {}
        sides = {"chosen": good, "rejected": ~good}
        for side, some in sides.items():
            metrics[f"rewards/{side}"] = (rewards[some].sum(), some.sum())
            metrics[f"logps/{side}"] = (answers.logps[some].sum(), answers.lengths[some].sum())
        if pairs:
            margin = rewards[0::2] - rewards[1::2]
            likelier = answers.logps[0::2] - answers.logps[1::2]
            metrics["rewards/margin"] = (margin.sum(), len(margin))
            metrics["rewards/accuracy"] = (_right(margin).sum(), len(margin))
            metrics["logps/accuracy"] = (_right(likelier).sum(), len(likelier))
        elif z_ref is not None:
            above = rewards - self.beta * z_ref
            metrics["rewards/accuracy"] = (_right(torch.where(good, above, -above)).sum(), len(rewards))
        if z_ref is not None:
            metrics["pref/z_ref"] = (z_ref * len(rewards), len(rewards))
        if answers.ratios is not None and answers.kl is not None:
            metrics["pref/kl"] = (answers.kl.sum(), answers.lengths.sum())
            metrics["logps/chosen_drift"] = (answers.ratios[good].sum(), answers.lengths[good].sum())
        return metrics


def _right(margin: Tensor) -> Tensor:
    """1 above zero, a half at zero: a policy that still is its reference prefers nothing."""
    return (margin > 0) + 0.5 * (margin == 0)


def _sequences(batch: Batch) -> Sequences:
    if batch.sequences is None:
        raise UserError("the data has no answers to compare", hint="give preference pairs or rated answers")
    return batch.sequences


def _kl(ratios: Tensor) -> Tensor:
    """exp(-r) - 1 + r of each token's log-ratio, never negative: its mean over the policy's own tokens is the
    KL to the reference (Schulman 2020, "Approximating KL divergence", k3). The tokens here are the data's.

    Where the policy has left an answer altogether exp(-r) would drown all others: r ends at -10.
    """
    return (-ratios).clamp(max=10.0).expm1() + ratios.clamp(min=-10.0)


def _answers(logps: Tensor, reference: Tensor | None, sequences: Sequences) -> _Answers:
    """Log-ratios are summed token by token, where they are small, so that little is rounded away."""
    good = sequences.good
    if good is None:
        good = torch.arange(sequences.count, device=logps.device) % 2 == 0
    ratios = None if reference is None else logps - reference
    return _Answers(
        logps=sequences.sums(logps),
        ratios=None if ratios is None else sequences.sums(ratios),
        kl=None if ratios is None else sequences.sums(_kl(ratios)),
        lengths=sequences.sums(torch.ones_like(logps)).clamp(min=1),
        good=good,
    )
