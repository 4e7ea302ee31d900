"""Mixture of experts: softmax router, top-k experts by sort and grouped matmul, shared experts.

No loop over tokens or experts and no host sync: token copies are sorted by expert and one grouped
matrix product per projection does the rest (MegaBlocks, Gale et al. 2022, arXiv 2211.15841).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kllm.model.attention import PackedLayout
from kllm.model.presets import ModelShape


@dataclass
class RouterLog:
    """What the routers of one forward did; pass one to the model to collect it.

    Per layer: `probabilities` [T, E] (softmax, differentiable), `chosen` int64 [T, k], `logits` [T, E].
    """

    probabilities: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class Experts(nn.Module):
    """E gated MLPs as three stacked tensors, [E, I, H], [E, I, H] and [E, H, I]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        E, H, I = shape.num_experts, shape.hidden_size, shape.moe_intermediate_size  # noqa: E741
        self.gate_proj = nn.Parameter(torch.empty(E, I, H))
        self.up_proj = nn.Parameter(torch.empty(E, I, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, I))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, H] sorted by expert; offsets int32 [E] are the ends of each expert's rows."""
        gate = F.grouped_mm(x, self.gate_proj.transpose(1, 2), offs=offsets)
        up = F.grouped_mm(x, self.up_proj.transpose(1, 2), offs=offsets)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=offsets)


class MoE(nn.Module):
    """Routed experts plus one always-on shared MLP."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.experts = Experts(shape)
        self.shared_expert: nn.Module | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if shape.shared_size:
            from kllm.model.transformer import MLP

            self.shared_expert = MLP(shape.hidden_size, shape.shared_size)
            if shape.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(shape.hidden_size, 1, bias=False)

    def route(self, x: Tensor, log: RouterLog | None) -> tuple[Tensor, Tensor]:
        """Weights [T, k] and experts int64 [T, k] for tokens x [T, H]."""
        logits = self.gate(x).float()
        if self.shape.router_noise and self.training:  # noisy top-k, std 1/E (V-MoE, Riquelme et al. 2021)
            logits = logits + torch.randn_like(logits) / self.shape.num_experts
        probabilities = logits.softmax(dim=-1)
        weights, chosen = probabilities.topk(self.shape.num_experts_per_tok, dim=-1)
        if self.shape.norm_topk_prob:
            if self.shape.num_experts_per_tok > 1:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            else:
                # w / w is 1 with no gradient: the router would never learn. Straight-through: 1 + (w - w)
                weights = 1.0 + (weights - weights.detach())
        if log is not None:
            log.probabilities.append(probabilities)
            log.chosen.append(chosen)
            log.logits.append(logits)
        return weights, chosen

    def forward(self, x: Tensor, log: RouterLog | None = None) -> Tensor:
        """x [..., H] -> [..., H]."""
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(flat, log)
        k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = F.one_hot(chosen.flatten(), self.shape.num_experts).sum(dim=0)
        offsets = counts.cumsum(dim=0).to(torch.int32)
        rows = flat.index_select(0, order // k)
        out = self.experts(rows, offsets)
        # back to token order: the inverse permutation gathers each token's k results side by side
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        out = out.index_select(0, inverse).view(-1, k, flat.shape[1])
        y = (out * weights.to(out.dtype)[..., None]).sum(dim=1)
        if self.shared_expert is not None:
            shared = self.shared_expert(flat)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(flat)) * shared
            y = y + shared
        return y.view_as(x)


def load_balance_loss(log: RouterLog, shape: ModelShape, layout: PackedLayout) -> Tensor:
    """Auxiliary loss summed over layers, 1 per layer when the load is even (0 for `kl_uniform`).

    switch: E * sum_e f_e P_e over the batch (Fedus et al. 2021, eq. 4; f_e divided by k so that it
    does not grow with k). sequence: the same inside each document, averaged over documents
    (DeepSeek-V2, eq. 12). kl_uniform: KL(U || mean router probability) (mini-llm).
    """
    E, k = shape.num_experts, shape.num_experts_per_tok
    total = log.probabilities[0].new_zeros(())
    for probabilities, chosen in zip(log.probabilities, log.chosen, strict=True):
        hits = F.one_hot(chosen, E).sum(dim=1).to(probabilities.dtype) / k
        if shape.aux_loss_type == "kl_uniform":
            total = total - (probabilities.mean(dim=0) * E + 1e-8).log().mean()
        elif shape.aux_loss_type == "sequence":
            total = total + _per_document(hits, probabilities, layout)
        else:
            total = total + E * (hits.mean(dim=0) * probabilities.mean(dim=0)).sum()
    return total


def _per_document(hits: Tensor, probabilities: Tensor, layout: PackedLayout) -> Tensor:
    documents, E = layout.documents(), hits.shape[1]
    lengths = (layout.cu_seqlens[1:] - layout.cu_seqlens[:-1]).to(hits.dtype)[:, None]
    empty = hits.new_zeros(lengths.shape[0], E)
    f = empty.index_add(0, documents, hits) / lengths
    p = empty.index_add(0, documents, probabilities) / lengths
    return E * (f * p).sum(dim=1).mean()


def router_z_loss(log: RouterLog) -> Tensor:
    """mean over tokens of logsumexp(router logits)^2, summed over layers (ST-MoE, eq. 5)."""
    return torch.stack([logits.logsumexp(dim=-1).square().mean() for logits in log.logits]).sum()


def expert_load(log: RouterLog, num_experts: int) -> Tensor:
    """Share of token copies that each expert took, [layers, E]."""
    counts = torch.stack([F.one_hot(c.flatten(), num_experts).sum(dim=0) for c in log.chosen]).float()
    return counts / counts.sum(dim=1, keepdim=True)
