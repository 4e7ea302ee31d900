"""Writes a model as GGUF, the file that llama.cpp and ollama run; no llama.cpp is needed for it.

f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 and q5_1 are quantised by the gguf package, the K-quant mixes
(q4_k_m, q5_k_m, q6_k) by `kquants`.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from kllm.config.parts import GgufType
from kllm.errors import KllmError, UserError
from kllm.export.gguf_names import OWN_OUTPUT, hyperparameters, tensors
from kllm.export.gguf_tokens import tokenizer_metadata
from kllm.export.kquants import choose_type
from kllm.export.kquants import quantize as quantize_k
from kllm.files import new_file
from kllm.model.presets import ModelShape, gguf_arch
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer

QUANTS: tuple[str, ...] = get_args(GgufType)
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    **{name: f"MOSTLY_{name.upper()}" for name in QUANTS[3:]},
}
_LARGEST = 65504.0
"""Of float16, in which quantised blocks keep their scales."""
_K_MIXES = ("q4_k_m", "q5_k_m", "q6_k")


@dataclass(frozen=True)
class GgufInfo:
    """What is said about the model in `general.*`; empty texts are left out."""

    name: str
    license: str = ""
    source: str = ""
    """The run or folder it was made from."""


@dataclass(frozen=True)
class GgufFile:
    """What was written."""

    path: Path
    quant: str
    arch: str
    bytes: int
    tensor_types: dict[str, int] = field(default_factory=dict)
    """Type -> number of tensors: widths that a type's blocks do not divide fall back to others."""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def write_gguf(model: Transformer, tokenizer: Tokenizer, path: Path, quant: str, info: GgufInfo) -> GgufFile:
    """Writes one file, aside and renamed, so that it is there whole or not at all.

    Args:
        model: any device and dtype.
        tokenizer: its own; see `gguf_tokens.tokenizer_metadata`.
        path: replaced if it exists.
        quant: one of `QUANTS`.
        info: goes into the metadata.

    Raises:
        UserError: llama.cpp cannot compute this shape, or cannot split text as this tokenizer does.
        KllmError: the disk is full, or may not be written.
    """
    import gguf

    if quant not in QUANTS:
        raise UserError(f"unknown type {quant!r}", where="flag --quant", hint=f"known: {', '.join(QUANTS)}")
    shape = model.shape
    arch = gguf_arch(shape)
    keys = tokenizer_metadata(tokenizer, shape.vocab_size)
    with new_file(path) as aside:
        writer = gguf.GGUFWriter(aside, arch)
        try:
            _add_general(writer, info, quant, model)
            for name, value in hyperparameters(shape, arch).items():
                _add(writer, f"{arch}.{name}", value)
            for name, value in keys.items():
                _add(writer, name, value)
            types = _add_tensors(writer, model, arch, quant, str(path))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as e:  # numpy counts what was written and keeps the reason to itself
            raise e if e.errno else OSError(errno.ENOSPC, str(e)) from None
        finally:
            writer.close()
        size = aside.stat().st_size
    return GgufFile(path, quant, arch, size, dict(types))


def _add_general(writer: Any, info: GgufInfo, quant: str, model: Transformer) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(info.name)
    writer.add_size_label(size_label(model))
    if info.license:
        writer.add_license(info.license)
    writer.add_tags(["kllm", "text-generation"])
    if info.source:
        writer.add_string("kllm.source", info.source)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[quant]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def size_label(model: Transformer) -> str:
    """1.1M, 135M, 1.2B; experts as 4x12M, as llama.cpp's own converter writes it."""

    def short(count: float) -> str:
        scaled, unit = next((count / 10**n, u) for n, u in ((9, "B"), (6, "M"), (3, "K")) if count >= 10**n)
        return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"

    total = model.num_parameters()
    experts = model.shape.num_experts
    if not experts:
        return short(total)
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    return f"{experts}x{short(total - routed + routed / experts)}"


def _add(writer: Any, key: str, value: Any) -> None:
    """One key in the type that llama.cpp's reader expects."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def _add_tensors(writer: Any, model: Transformer, arch: str, quant: str, where: str) -> Counter[str]:
    import gguf

    types: Counter[str] = Counter()
    shape = model.shape
    for name, tensor in tensors(dict(model.state_dict()), shape, arch):
        kind = tensor_type(name, tensor, quant, shape, arch)
        if kind not in ("f32", "bf16") and not tensor.abs().max() <= _LARGEST:  # NaN neither
            message = f"tensor {name} has values that {kind} cannot hold"
            raise KllmError(message, where=where, hint="--quant bf16")
        data = _quantised(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
        types[kind] += 1
    return types


def tensor_type(name: str, tensor: Tensor, quant: str, shape: ModelShape, arch: str) -> str:
    """f32, f16, bf16, q8_0, ..., q6_k: how a tensor is stored in a file of type `quant`."""
    if tensor.dim() == 1 or quant == "f32" or name.endswith("ffn_gate_inp.weight"):
        return "f32"
    if quant in ("f16", "bf16"):
        return quant
    cols = tensor.shape[-1]
    if quant in _K_MIXES:
        block = re.match(r"blk\.(\d+)\.", name)
        return choose_type(
            quant,
            name,
            int(block[1]) if block else 0,
            shape.num_hidden_layers,
            cols,
            experts=shape.num_experts,
            gqa=shape.num_attention_heads // shape.num_key_value_heads,
            tied=shape.tie_word_embeddings and arch not in OWN_OUTPUT,
            arch=arch,
        )
    if cols % 32:
        return "f16"
    # in a small model the vocabulary is most of the quality, so it keeps eight bits
    return "q8_0" if name in ("token_embd.weight", "output.weight") else quant


def _quantised(tensor: Tensor, kind: str) -> np.ndarray:
    import gguf

    weights = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if kind.endswith("_k"):
        return quantize_k(weights, kind)
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind.upper()])
