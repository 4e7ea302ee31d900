"""PEFT directories: `adapter_config.json` and `adapter_model.safetensors`, read and written by hand.

Keys are `base_model.model.` + the module's Hugging Face name + `.lora_A.weight`, `.lora_B.weight`, with DoRA
`.lora_magnitude_vector`. Traps: compatibility specification, section 9.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.export.resolve_adapter import KINDS
from kllm.export.shards import save_tensor_file
from kllm.files import new_directory, write_json
from kllm.model.lora_layers import PROJECTIONS, lora_scale

Pairs = dict[str, tuple[Tensor, Tensor]]

_PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values (or their beginnings) of init_lora_weights with which PEFT takes something out of the base."""
EXPERT = re.compile(r"(.+\.mlp\.(?:shared_)?experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
DOUBLED = "shared_expert.down_proj"
ROUTER = re.compile(r".+\.mlp\.gate")


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes: W + scale * B A for the modules of `pairs`; with DoRA its rows have length m.

    Attributes:
        pairs: a module's Hugging Face name -> A [r, in] and B [out, r], float32; modules with a rank or
            alpha of their own have it worked into B.
        rank, alpha, scale: the adapter's.
        source: "peft" (made for weights as they are on disk) or "memory" (as they are in memory).
        magnitudes: module name -> m [out], the row lengths of DoRA modules.
    """

    pairs: Pairs
    rank: int
    alpha: float
    scale: float
    source: str
    magnitudes: dict[str, Tensor] = field(default_factory=dict)


# -- reading -----------------------------------------------------------------------------------------


def read_peft(directory: Path) -> Adapter:
    """The adapter in a PEFT directory.

    Raises:
        UserError: no adapter, or one of a kind that cannot be merged.
        KllmError: damaged.
    """
    where = directory / "adapter_config.json"
    config = read_peft_config(directory)
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError("r and lora_alpha must be numbers", where=str(where)) from None
    pairs, magnitudes = _by_module(_tensors(directory), str(directory / WEIGHTS))
    if magnitudes.keys() != (pairs.keys() if config.get("use_dora") else set()):
        message = "use_dora and the lora_magnitude_vector tensors do not agree"
        raise UserError(message, where=str(directory), hint="copy the folder again")
    rslora = bool(config.get("use_rslora"))
    scale = lora_scale(alpha, rank, rslora) or 1.0
    for name, (a, b) in pairs.items():
        own = lora_scale(_pattern(config.get("alpha_pattern"), name, alpha, str(where)), a.shape[0], rslora)
        if own != scale:
            pairs[name] = (a, b * (own / scale))
    return Adapter(pairs, rank, alpha, scale, "peft", magnitudes)


def _tensors(directory: Path) -> dict[str, Tensor]:
    file = directory / WEIGHTS
    try:
        return load_file(file)
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError) as e:
        raise KllmError(f"damaged adapter: {e}", where=str(file), hint="copy the file again") from None
    if not (directory / "adapter_model.bin").exists():
        raise UserError("no such file", where=str(file), hint="copy the folder again")
    convert = f"save_file(torch.load('adapter_model.bin', weights_only=True), '{WEIGHTS}')"
    message = f"its weights are in adapter_model.bin, and only {WEIGHTS} is read"
    raise UserError(message, str(directory), f"in Python, with safetensors.torch: {convert}")


def read_peft_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter that can be merged.

    Raises:
        UserError: not there, broken, or of another kind.
    """
    where = directory / "adapter_config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = "no adapter_config.json: not a PEFT adapter"
        raise UserError(message, where=str(directory), hint=KINDS) from None
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror}", where=str(where)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"broken JSON: {e}", where=str(where), hint="copy the file again") from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=str(where), hint="copy the file again")
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise UserError(f"peft_type {kind!r} is not supported, only LORA", where=str(directory))
    for unsupported in ("modules_to_save", "fan_in_fan_out", "lora_bias", "alora_invocation_tokens"):
        if config.get(unsupported):
            raise UserError(f"adapters with {unsupported} cannot be merged", where=str(directory))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGED):
        message = f"init_lora_weights {init!r}: it belongs to a base that PEFT changed, not to the plain one"
        convert = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise UserError(message, where=str(directory), hint=f"in PEFT: {convert}")
    return config


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: float, where: str) -> float:
    """PEFT's rule: the first pattern that is the name or its end after a dot."""
    try:
        for pattern, value in (patterns or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                found = float(value)
                if not math.isfinite(found):
                    raise ValueError
                return found
    except (re.error, TypeError, ValueError, AttributeError):
        raise UserError("alpha_pattern is broken", where=where) from None
    return default


def _by_module(tensors: dict[str, Tensor], where: str) -> tuple[Pairs, dict[str, Tensor]]:
    pairs: Pairs = {}
    magnitudes: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name.endswith(_M):
            magnitudes[name.removesuffix(_M)] = tensor.float().flatten()
        elif name.endswith(_A):
            name = name.removesuffix(_A)
            other = tensors.get(f"{_PREFIX}{name}{_B}")
            if other is None or not is_known(name):
                raise _unmergeable(key, where)
            if (
                tensor.dim() != 2
                or other.dim() != 2
                or tensor.shape[0] != other.shape[1]
                or not tensor.numel()
            ):
                raise UserError(f"{name}: its LoRA matrices do not fit each other", where=where)
            pairs[name] = (tensor.float(), other.float())
        elif not name.endswith(_B) or f"{_PREFIX}{name.removesuffix(_B)}{_A}" not in tensors:
            raise _unmergeable(key, where)
    if not pairs:
        raise UserError("no LoRA matrices in it", where=where)
    for name, pair in pairs.items():
        parts = (*pair, *(magnitudes[n] for n in (name,) if n in magnitudes))
        if not all(torch.isfinite(t).all() for t in parts):
            raise UserError(f"{name}: its LoRA holds NaN or Inf", where=where)
        if name in magnitudes and len(magnitudes[name]) != len(pair[1]):
            raise UserError(f"{name}: its LoRA matrices do not fit each other", where=where)
    return pairs, magnitudes


def _unmergeable(key: str, where: str) -> UserError:
    """A tensor that is no half of a projection's pair, with what PEFT calls it."""
    reason = ""
    if key.endswith(".bias"):
        reason = ": biases were trained (PEFT's setting bias)"
    elif "embed_tokens" in key or "lm_head" in key:
        reason = ": the embedding or the head was trained (target_modules, trainable_token_indices)"
    elif key.endswith((_A, _B)):
        reason = ": its other half is missing" if is_known(key.removesuffix(_A).removesuffix(_B)) else ""
    return UserError(f"tensor {key} cannot be merged{reason}", where=where)


def is_known(name: str) -> bool:
    """Whether adapters of the module are read: a projection, dense or of an expert, or a router."""
    return name.rsplit(".", 1)[-1] in PROJECTIONS or ROUTER.fullmatch(name) is not None


# -- writing -----------------------------------------------------------------------------------------


def unreadable(names: Iterable[str]) -> list[str]:
    """The modules whose adapters readers of PEFT directories do not agree on: experts, routers, heads."""
    return [n for n in names if n.rsplit(".", 1)[-1] not in PROJECTIONS or EXPERT.fullmatch(n)]


def write_peft(
    pairs: Pairs,
    directory: Path,
    *,
    alpha: float,
    rank: int,
    base: str,
    shared_expert_gate: bool = False,
    use_rslora: bool = False,
    magnitudes: Mapping[str, Tensor] | None = None,
    dropout: float = 0.0,
    targets: Iterable[str] | None = None,
    kllm_only: bool = False,
) -> None:
    """Writes a PEFT directory that peft and vLLM load beside the base's Hugging Face directory.

    Args:
        pairs: module name -> (A [r, in], B [out, r]) for the model as it is in memory.
        directory: replaced if it exists; whole or not at all.
        alpha: the change of a weight is alpha / rank * B A (alpha / sqrt(rank) with use_rslora).
        rank: of the adapter; modules with another one keep its scale (rank_pattern, alpha_pattern).
        base: path or hub id of the base model.
        shared_expert_gate: the base has real gates, so nothing of it is doubled on disk.
        magnitudes: module name -> m [out]: a DoRA adapter (vLLM does not load it).
        dropout: what it was trained with, for who goes on.
        targets: target_modules; by default the last parts of the names.
        kllm_only: writes experts and routers too, under the names they had before transformers 5 stacked
            experts; kllm reads them.

    Raises:
        UserError: a module that readers do not agree on (an expert, a router), or no modules.
    """
    where = str(directory)
    if not pairs:
        raise UserError("no matrices to write", where=where)
    if not kllm_only and (names := unreadable(pairs)):
        message = f"PEFT readers do not agree on adapters of {names[0]}"
        raise UserError(message, where=where, hint="merge it instead")
    magnitudes = magnitudes or {}
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        factor = 2 if name.endswith(DOUBLED) and not shared_expert_gate else 1
        parts = {_A: a, _B: b.detach() * factor}
        if name in magnitudes:
            parts[_M] = magnitudes[name].detach() * factor
        for suffix, tensor in parts.items():
            value = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            tensors[f"{_PREFIX}{name}{suffix}"] = value
    config = _config(sorted(set(targets or map(_target, pairs))), alpha, rank, base)
    config |= {"use_rslora": use_rslora, "use_dora": bool(magnitudes), "lora_dropout": dropout}
    scale = lora_scale(alpha, rank, use_rslora)
    for name, (a, _) in pairs.items():
        if (own := a.shape[0]) != rank:
            config["rank_pattern"][name] = own
            config["alpha_pattern"][name] = scale * (math.sqrt(own) if use_rslora else own)
    with new_directory(directory) as aside:
        save_tensor_file(tensors, aside / WEIGHTS)
        write_json(aside / "adapter_config.json", config)


def _target(name: str) -> str:
    """How target_modules names a module: a bare gate_proj would mean the routed experts too, so of those and
    of routers the whole name is given, which means nothing else."""
    if unreadable([name]):
        return name
    parent, _, last = name.rpartition(".")
    return f"shared_expert.{last}" if parent.endswith(".shared_expert") else last


def _config(targets: list[str], alpha: float, rank: int, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
