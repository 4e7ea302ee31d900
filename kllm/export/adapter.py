"""LoRA adapters: reads PEFT directories and MiniMind's `.pth` files, merges them, writes what was trained.

On disk the down projection of a gateless shared expert is doubled (see `mapping`), so an adapter made for the
disk has a doubled B there; `in_memory` halves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kllm.errors import UserError
from kllm.export.peft import DOUBLED, EXPERT, Adapter, is_known, read_peft, unreadable, write_peft
from kllm.export.pth import read_lora_pth
from kllm.export.resolve_adapter import KINDS, resolve_adapter
from kllm.model.lora import lora_config, lora_pairs
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

__all__ = [
    "Adapter",
    "adapter_targets",
    "in_memory",
    "merge_adapter",
    "merge_adapters",
    "read_adapter",
    "save_adapter",
    "write_peft",
]


def read_adapter(path: str | Path, head_dim: int | None = None) -> Adapter:
    """The adapter in a PEFT directory or a MiniMind LoRA file.

    Args:
        path: whatever `resolve_adapter` takes: a directory (adapter_config.json, adapter_model.safetensors),
            a run or stage of `kllm lora`, a `.pth` file, a hub id.
        head_dim: of the base model; see `read_lora_pth`.

    Raises:
        UserError: no adapter, or one of a kind that cannot be merged.
        KllmError: damaged.
    """
    place = resolve_adapter(path)
    if place.suffix in (".gguf", ".safetensors"):
        raise UserError("not an adapter", where=str(path), hint=KINDS)
    if place.is_dir():
        return read_peft(place)
    pairs = read_lora_pth(place, head_dim)
    rank = max(a.shape[0] for a, _ in pairs.values())
    return Adapter(pairs, rank, float(rank), 1.0, "minimind")


def in_memory(adapter: Adapter, shape: ModelShape) -> Adapter:
    """The adapter for the weights of a model of this shape as they are in memory."""
    if adapter.source != "peft" or shape.shared_expert_gate:
        return adapter
    half = {name: 0.5 if name.endswith(DOUBLED) else 1.0 for name in adapter.pairs}
    return replace(
        adapter,
        pairs={name: (a, b * half[name]) for name, (a, b) in adapter.pairs.items()},
        magnitudes={name: m * half[name] for name, m in adapter.magnitudes.items()},
        source="memory",
    )


# -- merging -----------------------------------------------------------------------------------------


def merge_adapter(model: Transformer, path: str | Path) -> dict[str, Any]:
    """`merge_adapters` of one with weight 1.

    Returns:
        modules merged, rank, scale.
    """
    (report,) = merge_adapters(model, [(path, 1.0)])
    return {key: report[key] for key in ("modules", "rank", "scale")}


@torch.no_grad()
def merge_adapters(model: Transformer, adapters: Sequence[tuple[str | Path, float]]) -> list[dict[str, Any]]:
    """Adds the adapters' changes of the weights, each times its weight: W + sum_i w_i (W_i - W).

    W_i - W is scale * B A (Hu et al. 2021, eq. 3), or m (W + scale * B A) / |W + scale * B A| - W with DoRA
    (Liu et al. 2024, eq. 5): each is taken from the base, so the order of the adapters changes nothing.

    Args:
        model: changed in place; not at all when an error is raised.
        adapters: (what `read_adapter` takes, weight), at least one.

    Returns:
        For each: adapter (its name), weight, modules, rank, scale.
    """
    changes: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    report: list[dict[str, Any]] = []
    for path, share in adapters:
        adapter = in_memory(read_adapter(path, model.shape.head_dim), model.shape)
        targets = adapter_targets(model, adapter, str(path))
        for name, weight in targets.items():
            change = share * _change(adapter, name, weight.double().cpu())
            changes[name] = changes[name] + change if name in changes else change
        weights |= targets
        facts = {"modules": len(adapter.pairs), "rank": adapter.rank, "scale": adapter.scale}
        place = Path(path)
        label = place.parent.name if place.name == "adapter" else place.name
        report.append({"adapter": label, "weight": share, **facts})
    for name, weight in weights.items():
        weight.copy_((weight.double() + changes[name].to(weight.device)).to(weight.dtype))
    return report


def _change(adapter: Adapter, name: str, weight: Tensor) -> Tensor:
    a, b = adapter.pairs[name]
    change = adapter.scale * (b.double() @ a.double())
    if name in adapter.magnitudes:
        moved = weight + change
        return moved * (adapter.magnitudes[name].double() / moved.norm(dim=1))[:, None] - weight
    return change


def adapter_targets(model: Transformer, adapter: Adapter, where: str) -> dict[str, Tensor]:
    """The weights that the adapter changes, by name; UserError when it is another model's."""
    modules = dict(model.named_modules())
    targets: dict[str, Tensor] = {}
    for name, (a, b) in adapter.pairs.items():
        weight = _weight(modules, name, model.shape.moe_intermediate_size)
        if weight is None:
            raise UserError(f"the model has no linear layer {name}", where=where, hint="another base model?")
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            message = f"{name} is {tuple(weight.shape)}, the adapter's {b.shape[0], a.shape[1]}"
            raise UserError(message, where=where, hint="another base model?")
        targets[name] = weight
    return targets


def _weight(modules: Mapping[str, torch.nn.Module], name: str, width: int) -> Tensor | None:
    """The weight [out, in] that a module's name means; a view for one expert, `width` wide, of several."""
    if match := EXPERT.fullmatch(name):
        stem, number, part = match.group(1), int(match.group(2)), match.group(3)
        if stem.endswith(".shared_experts"):  # side by side in one wider MLP
            whole = getattr(modules.get(stem.removesuffix("s")), part, None)
            if not isinstance(whole, torch.nn.Linear):
                return None
            side = int(part == "down_proj")
            fits = (number + 1) * width <= whole.weight.shape[side]
            return whole.weight.narrow(side, number * width, width) if fits else None
        stack = getattr(modules.get(stem), part, None)
        return stack[number] if isinstance(stack, Tensor) and number < stack.shape[0] else None
    module = modules.get(name)
    return module.weight if is_known(name) and isinstance(module, torch.nn.Linear) else None


# -- training ----------------------------------------------------------------------------------------


def save_adapter(model: Transformer, directory: Path, base: str) -> list[str]:
    """Writes the adapter of a model in training as a PEFT directory for the base model's own directory.

    PiSSA becomes a plain LoRA of twice the rank, which needs no changed base (`lora_pairs`).

    Args:
        model: with adapters (`add_lora`).
        directory: replaced if it exists; whole or not at all.
        base: path or hub id of the base model.

    Returns:
        Names of adapted experts and routers: kllm reads them back, other readers do not.
    """
    weights, config = lora_pairs(model), lora_config(model)
    write_peft(
        weights.pairs,
        directory,
        alpha=weights.alpha,
        rank=weights.rank,
        base=base,
        shared_expert_gate=model.shape.shared_expert_gate,
        use_rslora=weights.use_rslora,
        magnitudes=weights.magnitudes,
        dropout=config.dropout,
        targets=_peft_targets(model, list(weights.pairs)),
        kllm_only=True,
    )
    return unreadable(weights.pairs)


def _peft_targets(model: Transformer, names: list[str]) -> list[str] | None:
    """target_modules: full names where a last part is adapted in some layers only, else None."""
    layers = model.shape.num_hidden_layers
    ends: dict[str, int] = {}
    for name in names:
        end = name.split(".", 3)[-1]
        ends[end] = ends.get(end, 0) + 1
    return None if all(count == layers for count in ends.values()) else names
