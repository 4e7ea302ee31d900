"""Next-token prediction: pretraining and supervised fine-tuning are this one objective.

L = sum_i w_i * -log p(x_{i+1} | x_{<=i}) / sum_i w_i over labelled positions of the whole step
(all micro-batches, all processes). What differs is the labels: every token, or the assistant's.
"""

from __future__ import annotations

from torch import Tensor, nn

from kllm.data.batch import IGNORE, Batch
from kllm.model.attention import PackedLayout
from kllm.model.head import linear_cross_entropy
from kllm.model.moe import RouterLog, expert_load, load_balance_loss, router_z_loss
from kllm.model.presets import ModelShape
from kllm.train.objective import Loss, unwrap


class LanguageModeling:
    """Cross-entropy of labels, plus the router's auxiliary losses in a mixture of experts.

    Args:
        loss_chunk: positions whose logits are alive at once.
    """

    def __init__(self, loss_chunk: int = 1024) -> None:
        self.loss_chunk = loss_chunk

    def weight(self, batch: Batch) -> float:
        """Summed loss weight of the labelled tokens."""
        if batch.weights is None:
            return float(batch.trained_tokens)
        return float(batch.weights[batch.labels != IGNORE].double().sum())

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Summed loss of the batch, shapes as in Batch."""
        inner = unwrap(model)
        layout = PackedLayout(batch.cu_seqlens, batch.tokens.device, batch.parents)
        router = RouterLog() if inner.shape.is_moe else None
        hidden = model(batch.tokens, batch.positions, layout, router)
        total = linear_cross_entropy(hidden, inner.head_weight, batch.labels, batch.weights, self.loss_chunk)
        weight = self.weight(batch)
        metrics: dict[str, tuple[object, object]] = {"train/loss": (total.detach(), weight)}
        if router is not None:
            aux, figures = router_terms(router, inner.shape, layout, weight)
            total = total + aux
            metrics.update(figures)
        return Loss(total, metrics)


def router_terms(
    router: RouterLog, shape: ModelShape, layout: PackedLayout, weight: float
) -> tuple[Tensor, dict[str, tuple[object, object]]]:
    """The routers' auxiliary losses of a micro-batch, to add to its summed loss, and their metrics.

    They are means over the micro-batch: times its `weight` they add up like the loss does.
    """
    aux = shape.router_aux_loss_coef * load_balance_loss(router, shape, layout)
    if shape.router_z_loss_coef:
        aux = aux + shape.router_z_loss_coef * router_z_loss(router)
    load = expert_load(router, shape.num_experts).max() * shape.num_experts
    metrics: dict[str, tuple[object, object]] = {
        "train/aux_loss": (aux.detach() * weight, weight),
        "moe/load_max": (load * weight, weight),
    }
    return aux * weight, metrics
