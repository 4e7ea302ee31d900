"""Adapters in `kllm convert`: what the flags mean, the base of an adapter, keeping one beside the model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kllm.errors import UserError
from kllm.export.resolve import ADAPTER_CONFIG
from kllm.export.resolve_adapter import resolve_adapter
from kllm.files import write_json

if TYPE_CHECKING:
    from kllm.model.transformer import Transformer


def split_weight(text: str) -> tuple[str, float]:
    """`DIR@0.5` as (DIR, 0.5); without a number after the sign (a hub revision) the weight is 1.

    Raises:
        UserError: a weight that is no finite number.
    """
    reference, sign, number = text.rpartition("@")
    if not sign or not reference or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise UserError(f"{number} is no weight", where=f"flag --adapter {text}", hint=f"{reference}@0.5")
    return reference, weight


def base_of(adapter: str) -> str:
    """The model that an adapter says it was made for: a path or a hub id.

    Raises:
        UserError: no adapter, it does not say, or the model is not here.
    """
    from kllm.export.hub import is_hub_id
    from kllm.export.peft import read_peft_config

    place = resolve_adapter(adapter)
    base = read_peft_config(place).get("base_model_name_or_path") if place.is_dir() else None
    if not isinstance(base, str) or not base:
        message = "the adapter does not say which model it is for"
        raise UserError(message, where=adapter, hint="--base MODEL")
    for found in (Path(base).expanduser(), place / base):
        if found.exists():
            return str(found)
    if is_hub_id(base):
        return base
    raise UserError(f"its base model {base} is not there", where=adapter, hint="--base MODEL")


def keep_adapter(reference: str, model: Transformer, directory: Path, base: str) -> None:
    """The adapter beside the model as a PEFT folder, which names `base`."""
    from kllm.export.adapter import read_adapter, write_peft
    from kllm.export.peft import WEIGHTS, read_peft_config

    given = resolve_adapter(reference)
    if given.is_dir():  # its two files; what a training left beside them is nobody else's
        directory.mkdir()
        shutil.copyfile(given / WEIGHTS, directory / WEIGHTS)
        write_json(directory / ADAPTER_CONFIG, read_peft_config(given) | {"base_model_name_or_path": base})
        return
    adapter = read_adapter(given, model.shape.head_dim)
    gate = model.shape.shared_expert_gate
    write_peft(
        adapter.pairs, directory, alpha=adapter.alpha, rank=adapter.rank, base=base, shared_expert_gate=gate
    )


def to_peft(source: str, out: Path, base: str, heads: int | None) -> dict[str, Any]:
    """A LoRA file as a PEFT folder.

    Args:
        base: what the folder names as its base model.
        heads: of the base; rows of MiniMind's first generation are reordered by head.
    """
    from kllm.export.adapter import read_adapter, write_peft

    adapter = read_adapter(source)
    if adapter.source == "peft":
        raise UserError("is a PEFT folder already", where=source, hint="copy it, or merge it: --merge")
    if heads:
        rows = next((b.shape[0] for name, (_, b) in adapter.pairs.items() if name.endswith("q_proj")), heads)
        adapter = read_adapter(source, rows // heads)
    write_peft(adapter.pairs, out, alpha=adapter.alpha, rank=adapter.rank, base=base)
    size = sum(f.stat().st_size for f in out.iterdir())
    return {"modules": len(adapter.pairs), "rank": adapter.rank, "bytes": size}
