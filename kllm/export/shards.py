"""Writes tensors as one safetensors file, or as several with an index when they are large."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kllm.files import write_json


def save_tensors(tensors: dict[str, Tensor], directory: Path, max_shard_bytes: int | None = None) -> None:
    """model.safetensors, or model-0000i-of-0000n.safetensors with model.safetensors.index.json.

    Args:
        tensors: contiguous CPU tensors by name.
        directory: exists; somebody else makes it atomic.
        max_shard_bytes: largest file, but for a single tensor that is larger; None is one file.
    """
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        save_tensor_file(tensors, directory / "model.safetensors")
        return
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_tensor_file({n: tensors[n] for n in names}, directory / file)
        where.update(dict.fromkeys(names, file))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def save_tensor_file(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file with the permissions of any other new file."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # a full disk is told in words alone
        if match := re.search(r"\(os error (\d+)\)", str(e)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        raise
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library makes it readable to its owner alone


def _split(tensors: dict[str, Tensor], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
