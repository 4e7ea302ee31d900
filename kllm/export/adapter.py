"""Merges a LoRA adapter (a PEFT directory) into a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.model.transformer import Transformer

_PREFIX = "base_model.model."
_MERGEABLE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def merge_adapter(model: Transformer, path: str) -> dict[str, Any]:
    """Adds scale * B A (Hu et al. 2021, eq. 3) to the weights that the adapter names.

    Args:
        model: changed in place.
        path: a PEFT directory (adapter_config.json, adapter_model.safetensors).

    Returns:
        modules merged, rank, scale.
    """
    place = Path(path)
    if not place.exists():
        raise UserError("no such adapter", where=path)
    pairs, scale = _read_peft(place)
    modules = dict(model.named_modules())
    for name, (a, b) in pairs.items():
        target = modules.get(name)
        if not isinstance(target, torch.nn.Linear):
            raise UserError(f"the model has no linear layer {name}", where=path, hint="another base model?")
        weight = target.weight
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise UserError(
                f"{name} is {tuple(weight.shape)}, the adapter's {b.shape[0], a.shape[1]}", where=path
            )
        delta = scale * (b.double() @ a.double())
        if name.endswith("shared_expert.down_proj") and not model.shape.shared_expert_gate:
            delta = delta / 2  # on disk, where the adapter was made, this weight is doubled
        weight.copy_((weight.double() + delta.to(weight.device)).to(weight.dtype))
    return {"modules": len(pairs), "rank": next(iter(pairs.values()))[0].shape[0], "scale": scale}


def _read_peft(directory: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no adapter_config.json: not a PEFT adapter", where=str(directory)) from None
    except json.JSONDecodeError as e:
        raise UserError(f"broken JSON: {e}", where=str(directory / "adapter_config.json")) from None
    _refuse(config, str(directory))
    file = directory / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as e:
        raise KllmError(f"damaged adapter: {e}", where=str(file)) from None
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name.endswith(".lora_A.weight"):
            name = name.removesuffix(".lora_A.weight")
            other = tensors.get(f"{_PREFIX}{name}.lora_B.weight")
            if other is None or name.rsplit(".", 1)[-1] not in _MERGEABLE:
                raise UserError(f"tensor {key} cannot be merged", where=str(file))
            pairs[name] = (tensor, other)
        elif not name.endswith(".lora_B.weight"):
            raise UserError(f"tensor {key} cannot be merged", where=str(file))
    if not pairs:
        raise UserError("no LoRA matrices in it", where=str(file))
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return pairs, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _refuse(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type {config.get('peft_type')!r} is not supported, only LORA", where=where)
    for field in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(field):
            raise UserError(f"adapters with {field} cannot be merged", where=where)
