"""One loader for everything that can stand where a model is expected, whoever wrote it.

A Hugging Face directory (a checkpoint is one; also quantised with AWQ or compressed-tensors), a GGUF
file, or a `.pth` / `.ckpt` file of MiniMind and its kin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.export.config import config_to_shape
from kllm.export.hf import check_state, read_config, read_tensors
from kllm.export.mapping import hf_to_state
from kllm.export.resolve import resolve
from kllm.export.tokenizers import tokenizer_of
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]
State = dict[str, Tensor]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    assume: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    say: Say | None = None,
) -> tuple[Transformer, Tokenizer | None]:
    """The model in `path` (anything `resolve` takes) and its tokenizer, if it has one.

    Args:
        assume: what the tensors of a `.pth` cannot tell (`num_attention_heads`, ...); see `pth.read_pth`.
        tokenizer: False leaves the tokenizer alone (None is returned).
        say: is told what had to be assumed, one line each.

    Raises:
        UserError, KllmError: not a model, one that kllm does not run, or a damaged one.
    """
    place = resolve(path)
    state, shape = _read(place, assume or {}, say or (lambda line: None))
    if shape.num_hidden_layers > len(state):  # also keeps a broken number from costing minutes
        message = f"{shape.num_hidden_layers} layers, but {len(state)} tensors in all"
        raise UserError(message, where=str(place), hint="not whole, or another architecture")
    with torch.device("meta"):
        model = Transformer(shape)
    check_state(state, model, str(place))
    _check_finite(state, str(place))
    model.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    if shape.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model = model.to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, _own_tokenizer(place, shape.vocab_size) if tokenizer else None


def _own_tokenizer(place: Path, rows: int) -> Tokenizer | None:
    found = tokenizer_of(place)
    if found is not None and found.vocab_size > rows:
        raise UserError(
            f"its tokenizer has {found.vocab_size:,} tokens, the model {rows:,} rows",
            where=str(place),
            hint=f"kllm convert {place} OUT --tokenizer {place} adds the rows",
        )
    return found


def _read(place: Path, assume: Mapping[str, Any], say: Say) -> tuple[State, ModelShape]:
    kind = source_kind(place)
    if kind != "pth" and assume:
        message = f"{next(iter(assume))} is in the model's own files"
        raise UserError(message, where=str(place), hint="leave --assume out; it is for a .pth")
    if kind == "gguf":
        return _read_gguf(place)
    if kind == "pth":
        from kllm.export.pth import read_pth

        found = read_pth(place, assume)
        for line in found.assumed:
            say(f"{place.name}: assumed {line}")
        return found.state, found.shape
    config, tensors = read_config(place), read_tensors(place)
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise UserError("quantization_config is not a JSON object", where=str(place / "config.json"))
    if quantization:
        from kllm.export.quantized import dequantize_tensors

        tensors = dequantize_tensors(tensors, quantization, str(place))
    return hf_to_state(tensors, config_to_shape(config, str(place / "config.json")), str(place))


def _read_gguf(place: Path) -> tuple[State, ModelShape]:
    from kllm.export.gguf_read import open_gguf

    opened = open_gguf(place)
    shape = opened.shape()
    state = opened.state(shape)
    head, embedding = state.get("lm_head.weight"), state["model.embed_tokens.weight"]
    if head is None or torch.equal(head, embedding):
        state["lm_head.weight"] = embedding
        shape = shape.with_(tie_word_embeddings=True)
    return state, shape


def source_kind(place: Path) -> str:
    """`hf`, `gguf` or `pth`, of what `resolve` found."""
    if place.is_dir():
        return "hf"
    return "gguf" if place.suffix == ".gguf" else "pth"


def file_shape(place: Path) -> ModelShape:
    """The shape of a model file that `resolve` found, without reading its weights."""
    if source_kind(place) == "gguf":
        from kllm.export.gguf_read import open_gguf

        return open_gguf(place).shape()
    from kllm.export.pth import peek_shape

    return peek_shape(place)


def _check_finite(state: State, where: str) -> None:
    """NaN or infinity in a weight makes everything after it nonsense: refused, by name."""
    for name, tensor in state.items():
        # a sum carries every NaN and infinity, in one pass and with nothing copied
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            kind = "NaN" if torch.isnan(tensor).any() else "infinite values"
            raise KllmError(f"tensor {name} holds {kind}", where=where, hint="a broken training or copy")


def generation_defaults(place: Path) -> dict[str, float]:
    """Sampling defaults of a model's generation_config.json; a broken file counts as none."""
    try:
        config = json.loads((place / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    found = {name: config.get(name) for name in _SAMPLING}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
