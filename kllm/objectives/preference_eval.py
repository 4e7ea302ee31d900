"""Held-out preferences: does the model prefer the better answer, and is that answer still likely?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kllm.data.batch import Batch
from kllm.objectives.preference import Preference
from kllm.observe.metrics import Accumulator
from kllm.train.device import Runtime
from kllm.train.objective import unwrap

CHOSEN_COLLAPSE = -0.5
"""Nats per token: below it a chosen answer's tokens are on average 40% less likely than before training."""

FIGURES = {
    "val/loss": "train/loss",
    "val/accuracy": "rewards/accuracy",
    "val/logp_accuracy": "logps/accuracy",
    "val/chosen_logp": "logps/chosen",
    "val/chosen_drift": "logps/chosen_drift",
    "val/kl": "pref/kl",
}


@torch.no_grad()
def evaluate_preference(
    model: nn.Module, batches: Sequence[Batch], runtime: Runtime, objective: Preference
) -> dict[str, float]:
    """The objective's figures on held-out pairs or ratings; batches are shared out over processes.

    `val/loss` per pair (kto: per answer), `val/accuracy` (the chosen answer has the higher reward; ties
    count half, so 0.5 before training), `val/margin` of rewards, `val/logp_accuracy` (the chosen answer
    is likelier as it stands, no reference asked), `val/chosen_logp`, `val/chosen_drift` and `val/kl` in nats
    per token. What the loss or the data do not have is left out.
    """
    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    seen = Accumulator()
    names = [*FIGURES.values(), "rewards/chosen", "rewards/rejected"]
    for batch in batches[runtime.rank :: runtime.world]:
        with runtime.autocast():
            metrics = objective(inner, batch.to(runtime.device)).metrics
        seen.update({name: metrics[name] for name in names if name in metrics})
    inner.train(was_training)
    for name in names:  # a process without a batch must send the same list
        seen.add(name, 0.0, 0.0)
    means = seen.read(runtime.sums)
    result = {name: means[source] for name, source in FIGURES.items() if source in means}
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        result["val/margin"] = means["rewards/chosen"] - means["rewards/rejected"]
    return result


def collapse_warning(chosen_drift: float) -> str | None:
    """One line if chosen answers have become much less likely than at the start, else None.

    A preference loss is content with any margin, also one that both answers fall to (Pal et al. 2024,
    arXiv 2402.13228; Razin et al. 2024, arXiv 2410.08847).

    Args:
        chosen_drift: `logps/chosen_drift` or `val/chosen_drift`, nats per token.
    """
    if chosen_drift >= CHOSEN_COLLAPSE:
        return None
    return (
        f"chosen answers have lost {-chosen_drift:.2f} nats per token since the start: "
        "lower optim.lr, raise preference.beta or set preference.rpo_alpha"
    )
