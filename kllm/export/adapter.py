"""LoRA adapters: reads PEFT directories and MiniMind's `.pth` files, merges them, writes PEFT directories.

PEFT's format and its traps: compatibility specification, section 9. On disk the down projection of a
gateless shared expert is doubled (see `mapping`), so an adapter made for the disk has a doubled B there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.export.pth import read_lora_pth
from kllm.export.shards import save_tensor_file
from kllm.files import new_directory, write_json
from kllm.model.transformer import Transformer

Pairs = dict[str, tuple[Tensor, Tensor]]

_ADAPTERS = "an adapter is a PEFT folder or a MiniMind LoRA .pth"
_PREFIX = "base_model.model."
_MERGEABLE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_EXPERT = re.compile(r"(.+\.mlp\.(?:shared_)?experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
_DOUBLED = "shared_expert.down_proj"


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes: W + scale * B A for the modules of `pairs`.

    `pairs` maps a module's Hugging Face name to A [r, in] and B [out, r], float32; modules with a rank
    or alpha of their own have it worked into B. `rank` and `alpha` are the adapter's, `source` is
    "peft" (made for weights as they are on disk) or "minimind" (for weights as they are in memory).
    """

    pairs: Pairs
    rank: int
    alpha: float
    scale: float
    source: str


def read_adapter(path: str | Path, head_dim: int | None = None) -> Adapter:
    """The adapter in a PEFT directory or a MiniMind LoRA file.

    Args:
        path: a directory (adapter_config.json, adapter_model.safetensors) or a `.pth` file.
        head_dim: of the base model; see `read_lora_pth`.

    Raises:
        UserError: no adapter, or one of a kind that cannot be merged.
        KllmError: damaged.
    """
    place = Path(path)
    if not place.exists():
        raise UserError("no such adapter", where=str(path), hint=_ADAPTERS)
    if place.suffix in (".gguf", ".safetensors"):
        raise UserError("not an adapter", where=str(path), hint=_ADAPTERS)
    if place.is_dir():
        return _read_peft(place)
    pairs = read_lora_pth(place, head_dim)
    rank = max(a.shape[0] for a, _ in pairs.values())
    return Adapter(pairs, rank, float(rank), 1.0, "minimind")


@torch.no_grad()
def merge_adapter(model: Transformer, path: str | Path) -> dict[str, Any]:
    """Adds scale * B A (Hu et al. 2021, eq. 3) to the weights that the adapter names.

    Args:
        model: changed in place; not at all when an error is raised.
        path: a PEFT directory or a MiniMind LoRA file.

    Returns:
        modules merged, rank, scale.
    """
    adapter = read_adapter(path, model.shape.head_dim)
    targets = adapter_targets(model, adapter, str(path))
    halved = adapter.source == "peft" and not model.shape.shared_expert_gate
    for name, weight in targets.items():
        a, b = adapter.pairs[name]
        delta = adapter.scale * (b.double() @ a.double())
        if halved and name.endswith(_DOUBLED):
            delta = delta / 2
        weight.copy_((weight.double() + delta.to(weight.device)).to(weight.dtype))
    return {"modules": len(adapter.pairs), "rank": adapter.rank, "scale": adapter.scale}


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
    if match := _EXPERT.fullmatch(name):
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
    if name.rsplit(".", 1)[-1] not in _MERGEABLE or not isinstance(module, torch.nn.Linear):
        return None
    return module.weight


def write_peft(
    pairs: Pairs, directory: Path, *, alpha: float, rank: int, base: str, shared_expert_gate: bool = False
) -> None:
    """Writes a PEFT directory that peft and vLLM load beside the base's Hugging Face directory.

    Args:
        pairs: module name -> (A [rank, in], B [out, rank]) for the model as it is in memory.
        directory: replaced if it exists; whole or not at all.
        alpha: the change of a weight is alpha / rank * B A.
        rank: of every pair.
        base: path or hub id of the base model.
        shared_expert_gate: the base has real gates, so nothing of it is doubled on disk.

    Raises:
        UserError: a module that no reader adapts (an expert, an embedding), or another rank.
    """
    where = str(directory)
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    for name, (a, b) in pairs.items():
        parent, _, last = name.rpartition(".")
        if last not in _MERGEABLE or _EXPERT.fullmatch(name):
            raise UserError(
                f"PEFT readers do not agree on adapters of {name}", where=where, hint="merge it instead"
            )
        if a.shape[0] != rank or b.shape[1] != rank:
            raise UserError(f"{name} has rank {a.shape[0]}, the adapter {rank}", where=where)
        # a bare gate_proj would mean the routed experts too
        targets.add(f"shared_expert.{last}" if parent.endswith(".shared_expert") else last)
        doubled = name.endswith(_DOUBLED) and not shared_expert_gate
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = (
            a.detach().to("cpu", torch.float32, copy=True).contiguous()
        )
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = (
            (b.detach() * (2 if doubled else 1)).to("cpu", torch.float32, copy=True).contiguous()
        )
    if not pairs:
        raise UserError("no matrices to write", where=where)
    with new_directory(directory) as aside:
        save_tensor_file(tensors, aside / "adapter_model.safetensors")
        write_json(aside / "adapter_config.json", _peft_config(sorted(targets), alpha, rank, base))


def _peft_config(targets: list[str], alpha: float, rank: int, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _read_peft(directory: Path) -> Adapter:
    where = directory / "adapter_config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
        _refuse(config, str(directory))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1:
            raise ValueError
    except FileNotFoundError:
        message = "no adapter_config.json: not a PEFT adapter"
        raise UserError(message, where=str(directory), hint=_ADAPTERS) from None
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror}", where=str(where)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"broken JSON: {e}", where=str(where), hint="copy the file again") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError("r and lora_alpha must be numbers", where=str(where)) from None
    file = directory / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise UserError("no such file", where=str(file), hint="copy the folder again") from None
    except (OSError, SafetensorError) as e:
        raise KllmError(f"damaged adapter: {e}", where=str(file), hint="copy the file again") from None
    rslora = bool(config.get("use_rslora"))
    scale = _scale(alpha, rank, rslora) or 1.0
    pairs: Pairs = {}
    for name, (a, b) in _pairs(tensors, str(file)).items():
        own = _scale(_pattern(config.get("alpha_pattern"), name, alpha, str(where)), a.shape[0], rslora)
        pairs[name] = (a, b if own == scale else b * (own / scale))
    return Adapter(pairs, rank, alpha, scale, "peft")


def _scale(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) (rank-stabilised, Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: float, where: str) -> float:
    """PEFT's rule: the first pattern that is the name or its end after a dot."""
    try:
        for pattern, value in (patterns or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                return float(value)
    except (re.error, TypeError, ValueError, AttributeError):
        raise UserError("alpha_pattern is broken", where=where) from None
    return default


def _pairs(tensors: dict[str, Tensor], where: str) -> Pairs:
    pairs: Pairs = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name.endswith(".lora_A.weight"):
            name = name.removesuffix(".lora_A.weight")
            other = tensors.get(f"{_PREFIX}{name}.lora_B.weight")
            if other is None or name.rsplit(".", 1)[-1] not in _MERGEABLE:
                raise UserError(f"tensor {key} cannot be merged", where=where)
            if (
                tensor.dim() != 2
                or other.dim() != 2
                or tensor.shape[0] != other.shape[1]
                or not tensor.numel()
            ):
                raise UserError(f"{name}: its LoRA matrices do not fit each other", where=where)
            if not (torch.isfinite(tensor).all() and torch.isfinite(other).all()):
                raise UserError(f"{name}: its LoRA holds NaN or Inf", where=where)
            pairs[name] = (tensor.float(), other.float())
        elif not name.endswith(".lora_B.weight"):
            raise UserError(f"tensor {key} cannot be merged", where=where)
    if not pairs:
        raise UserError("no LoRA matrices in it", where=where)
    return pairs


def _refuse(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type {config.get('peft_type')!r} is not supported, only LORA", where=where)
    for field in ("use_dora", "modules_to_save", "fan_in_fan_out"):
        if config.get(field):
            raise UserError(f"adapters with {field} cannot be merged", where=where)
