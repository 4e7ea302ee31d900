"""A model on disk is a Hugging Face directory: writing one whole, reading its parts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.export.config import config_to_shape, generation_config, shape_to_config
from kllm.export.mapping import state_to_hf
from kllm.export.shards import save_tensors
from kllm.files import new_directory, write_json
from kllm.model.presets import ModelShape, hf_model_type
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.words import PATTERN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOATS = (*DTYPES.values(), torch.float64)


def save_model(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: Path,
    *,
    dtype: str = "float32",
    files: dict[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a directory that transformers and vLLM load with no custom code; whole or not at all.

    Args:
        model: the model (any device).
        tokenizer: saved beside it; its special ids go into the configs.
        directory: replaced if it exists.
        dtype: of the file, float32, bfloat16 or float16.
        files: further text files by name (README.md).
        max_shard_bytes: weights above this size are split into several files with an index.
    """
    with new_directory(directory) as aside:
        write_model_files(model, tokenizer, aside, dtype=dtype, max_shard_bytes=max_shard_bytes)
        for name, text in (files or {}).items():
            (aside / name).write_text(text, encoding="utf-8")


def write_model_files(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> None:
    """`save_model` into a directory that somebody else makes atomic (a checkpoint)."""
    target = target_of(model.shape, tokenizer)
    tensors = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in state_to_hf(model.state_dict(), model.shape, target).items()
    }
    for name, tensor in tensors.items() if dtype == "float16" else ():
        if not tensor.isfinite().all():
            message = f"tensor {name} has values that float16 cannot hold"
            raise KllmError(message, where=str(directory), hint="--dtype bfloat16")
    write_files(
        tensors,
        model.shape,
        tokenizer,
        directory,
        model_type=target,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def target_of(shape: ModelShape, tokenizer: Tokenizer | None) -> str:
    """The model_type to write: a Qwen2 with Qwen's own tokenizer stays one.

    With any other tokenizer it is a llama with biases: beside model_type qwen2 transformers 5 rebuilds
    Qwen's normalizer and pattern from code, whatever tokenizer.json says.
    """
    target = hf_model_type(shape)
    if target == "llama" and shape.attention_bias and shape.q_size == shape.hidden_size and tokenizer:
        spec = tokenizer.spec()
        normalizer = (spec.get("normalizer") or {}).get("type")
        first = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [{}])[0]
        if normalizer == "NFC" and (first.get("pattern") or {}).get("Regex") == PATTERN:
            return "qwen2"
    return target


def write_files(
    tensors: dict[str, Tensor],
    shape: ModelShape,
    tokenizer: Tokenizer | None,
    directory: Path,
    *,
    dtype: str,
    model_type: str | None = None,
    max_shard_bytes: int | None = None,
    quantization_config: dict[str, Any] | None = None,
) -> None:
    """Weights, configs and tokenizer files into a directory that exists.

    Args:
        tensors: in Hugging Face names and forms, contiguous, on the CPU.
        quantization_config: how they are packed, for config.json.
    """
    save_tensors(tensors, directory, max_shard_bytes)
    stops = list(tokenizer.stop_token_ids) if tokenizer else [2, 0]
    pad = tokenizer.pad_token_id if tokenizer else 0
    bos = tokenizer.bos_token_id if tokenizer else None
    eos = tokenizer.eos_token_id if tokenizer else 2
    ids = {"eos_token_id": eos, "pad_token_id": pad, "bos_token_id": bos}
    config = shape_to_config(shape, model_type=model_type, dtype=dtype, **ids)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", generation_config(stops, pad, bos))
    if tokenizer is not None:
        tokenizer.save(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError("no config.json: not a model directory", where=str(directory)) from None
    except ValueError as e:
        raise UserError(f"broken JSON: {e}", where=str(file), hint="copy the file again") from None
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror}", where=str(file)) from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=str(file))
    return config


def read_shape(directory: Path) -> ModelShape:
    """The shape that config.json declares (tensors may refine it at load)."""
    return config_to_shape(read_config(directory), where=str(directory / "config.json"))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, its shards, or pytorch_model*.bin (weights only)."""
    files = _weight_files(directory, "model", ".safetensors")
    files = files or _weight_files(directory, "pytorch_model", ".bin")
    if not files:
        hint = "weights are in model.safetensors or pytorch_model.bin"
        raise UserError("no model.safetensors: not a model directory", where=str(directory), hint=hint)
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".bin":
            from kllm.export.pth import load_weights

            tensors.update(load_weights(file))
            continue
        try:
            with safe_open(file, framework="pt") as f:
                tensors.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise KllmError(f"damaged weights: {e}", where=str(file), hint="copy the file again") from None
    return tensors


def _weight_files(directory: Path, stem: str, suffix: str) -> list[Path]:
    """The whole file, else the shards of its index, else what looks like shards; no copies in other types."""
    if (whole := directory / f"{stem}{suffix}").exists():
        return [whole]
    names = [file.name for file in directory.glob(f"{stem}-*{suffix}")]
    names = names or [file.name for file in directory.glob(f"{stem}*{suffix}")]
    count = re.search(r"-of-(\d+)\.", names[0]) if names else None
    try:
        index = json.loads((directory / f"{stem}{suffix}.index.json").read_text(encoding="utf-8"))
        wanted = {Path(name).name for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the names say how many there are
        wanted = set(names)
        if count and len(names) < int(count[1]):
            wanted |= {f"one of {int(count[1])} weight files"}
    if gone := sorted(name for name in wanted if not (directory / name).is_file()):
        message = f"{gone[0]} is missing ({len(wanted) - len(gone)} files are here)"
        raise UserError(message, where=str(directory), hint="copy the folder again")
    return [directory / name for name in sorted(wanted)]


def check_state(state: dict[str, Tensor], model: Transformer, where: str) -> None:
    """One line about the first missing, extra or misshapen tensor; never a partial load."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(
                f"tensor {name} is missing", where=where, hint="not whole, or another architecture"
            )
        if tuple(state[name].shape) != tuple(tensor.shape):
            raise UserError(
                f"tensor {name} has shape {tuple(state[name].shape)}, the config says {tuple(tensor.shape)}",
                where=where,
                hint="another model's config?",
            )
        if state[name].dtype not in _FLOATS:
            kind = str(state[name].dtype).removeprefix("torch.")
            raise UserError(f"tensor {name} is {kind}, not plain floats", where=where)
    if extra := sorted(set(state) - set(expected)):
        raise UserError(f"unknown tensor {extra[0]}", where=where, hint="not an architecture kllm knows")
