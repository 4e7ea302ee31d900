"""Optimisers from plain numbers: parameter groups, AdamW or Muon+AdamW, and the schedule.

The schedule is a pure function of the step, so resuming needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kllm.optim.muon import Muon


@dataclass(frozen=True)
class OptimConfig:
    """Numbers of `config.parts.OptimSection`, without the room `config`."""

    name: str = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.02
    min_lr_ratio: float = 0.1
    decay: float = 0.2
    muon_lr: float = 0.02
    muon_momentum: float = 0.95


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: a fraction of `total` below 1, else a number of steps."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def lr_scale(step: int, total: int, config: OptimConfig) -> float:
    """Multiplier of the peak rate for 0-based `step` of `total`; ends at `min_lr_ratio`.

    cosine: Loshchilov and Hutter 2016. wsd: warm-up, stable, linear decay over the last `decay`
    share (Hu et al. 2024, MiniCPM). linear: straight down. constant: warm-up only.
    """
    warm = warmup_steps(config.warmup, total)
    if step < warm:
        return (step + 1) / (warm + 1)
    if config.schedule == "constant":
        return 1.0
    floor = config.min_lr_ratio
    last = max(total - 1, warm + 1)
    progress = min((step - warm) / (last - warm), 1.0)
    if config.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return 1 - (1 - floor) * progress
    start = 1 - max(round(config.decay * total), 1) / max(last - warm, 1)
    if progress <= start:
        return 1.0
    return 1 - (1 - floor) * min((progress - start) / max(1 - start, 1e-9), 1.0)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    apart = ("embed_tokens", "lm_head", "lora_magnitude")
    return parameter.dim() >= 2 and not any(part in name for part in apart)


class Optimizers:
    """One or two optimisers that step together, each group at its own peak rate.

    `state_dict` is keyed by optimiser; `set_scale` applies the schedule.
    """

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["peak_lr"] = float(group["lr"])

    def set_scale(self, scale: float) -> float:
        """Sets every group to peak * scale; returns the first group's rate (for the log)."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


Named = list[tuple[str, nn.Parameter]]


def _groups(named: Named, lr: float, weight_decay: float, ratio: float) -> list[dict[str, Any]]:
    """Groups of one peak rate, and LoRA's B matrices at `ratio` times it."""
    fast = [p for n, p in named if ratio != 1 and n.endswith("lora_B")]
    rest = [p for n, p in named if ratio == 1 or not n.endswith("lora_B")]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return [{**group, "weight_decay": weight_decay} for group in groups if group["params"]]


def _muon(matrices: Named, config: OptimConfig, ratio: float) -> torch.optim.Optimizer:
    groups = _groups(matrices, config.muon_lr, config.weight_decay, ratio)
    if all(p.is_cuda and p.dim() == 2 for _, p in matrices):
        return torch.optim.Muon(groups, lr=config.muon_lr, momentum=config.muon_momentum)
    return Muon(groups, config.muon_lr, config.muon_momentum)


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, lora_plus_ratio: float = 1.0
) -> Optimizers:
    """AdamW (fused) with no decay on norms, biases and embeddings; or Muon for the hidden matrices.

    Args:
        named: parameters; those that require no gradient are left out.
        lora_plus_ratio: learning rate of LoRA's B matrices as a multiple of all others' (LoRA+, Hayou et
            al. 2024: B should learn faster than A, by about 16).
    """
    trained = [(n, p) for n, p in named if p.requires_grad]
    matrices = [(n, p) for n, p in trained if _is_matrix(n, p)]
    others = [(n, p) for n, p in trained if not _is_matrix(n, p)]
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if config.name == "muon" and matrices:
        result: dict[str, torch.optim.Optimizer] = {"muon": _muon(matrices, config, lora_plus_ratio)}
        if others:
            result["adamw"] = torch.optim.AdamW(_groups(others, config.lr, 0.0, 1.0), **adam)
        return Optimizers(result)
    groups = _groups(matrices, config.lr, config.weight_decay, lora_plus_ratio)
    return Optimizers({"adamw": torch.optim.AdamW([*groups, *_groups(others, config.lr, 0.0, 1.0)], **adam)})
