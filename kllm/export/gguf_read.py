"""Reads GGUF files of the architectures that kllm runs; every type that the gguf package dequantises."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.export.gguf_names import PAIRWISE, native_name, rotated, to_halves
from kllm.export.gguf_tokens import tokenizer_from_metadata
from kllm.model.presets import ModelShape
from kllm.model.rope import rope_frequencies
from kllm.tokenizer.tokenizer import Tokenizer

ARCHITECTURES = (*PAIRWISE, "qwen2", "qwen3", "qwen2moe", "qwen3moe")
_SCALES = ("embedding_scale", "residual_scale", "attention.scale", "logit_scale", "expert_weights_scale")


@dataclass
class GgufModel:
    """An open file: metadata now, tensors on demand (they stay on disk until asked for).

    Attributes:
        path: the file.
        fields: key -> value.
    """

    path: Path
    fields: Mapping[str, Any]
    _reader: Any

    @property
    def arch(self) -> str:
        return str(self.fields.get("general.architecture"))

    def shape(self) -> ModelShape:
        """The model's shape, from the metadata and the names and sizes of the tensors."""
        names = {t.name for t in self._reader.tensors}
        sizes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in self._reader.tensors}
        if "token_embd.weight" not in sizes:
            raise UserError("no token_embd.weight: not a language model", where=str(self.path))
        shape = _shape(self.fields, self.arch, sizes["token_embd.weight"][0], str(self.path))
        if self.arch == "smollm3":
            fourth = tuple(i for i in range(shape.num_hidden_layers) if i % 4 == 3)
            shape = shape.with_(no_rope_layers=fourth)
        if "rope_freqs.weight" in names:
            shape = shape.with_(rope_scaling=self._llama3(shape))
        return shape.with_(
            attention_bias="blk.0.attn_q.bias" in names,
            qk_norm="blk.0.attn_q_norm.weight" in names,
            tie_word_embeddings="output.weight" not in names,
        )

    def state(self, shape: ModelShape) -> dict[str, Tensor]:
        """Parameters of a Transformer of `shape`, float32, rows back in the order of halves."""
        import gguf

        state: dict[str, Tensor] = {}
        for tensor in self._reader.tensors:
            native = native_name(tensor.name)
            if native is None:
                continue
            try:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise UserError(f"tensor {tensor.name} is of type {kind}, which cannot be read",
                                where=str(self.path)) from None  # fmt: skip
            value = torch.from_numpy(values.copy()).float()
            if self.arch in PAIRWISE and rotated(tensor.name):
                value = to_halves(value, shape.head_dim)
            if native.endswith("shared_expert_gate.weight"):
                value = value.reshape(1, -1)
            state[native] = value
        return state

    def tokenizer(self) -> Tokenizer:
        """The file's own tokenizer; UserError when it cannot be rebuilt."""
        return tokenizer_from_metadata(self.fields, str(self.path))

    def _llama3(self, shape: ModelShape) -> dict[str, Any]:
        """The llama3 scaling whose factors are the file's; the converter keeps only the factors."""
        import gguf

        tensor = next(t for t in self._reader.tensors if t.name == "rope_freqs.weight")
        given = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        plain, _ = rope_frequencies(shape.head_dim, shape.rope_theta, None)
        low, high = 1.0, 4.0
        for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64):
            scaling = {
                "rope_type": "llama3",
                "factor": round(float(given.max()), 4),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
            scaled, _ = rope_frequencies(shape.head_dim, shape.rope_theta, scaling)
            if torch.allclose(plain / scaled, given, rtol=1e-4):
                return scaling
        raise UserError("rope_freqs.weight follows no llama3 scaling that is known", where=str(self.path))


def open_gguf(path: Path) -> GgufModel:
    """Maps a GGUF file; one that was opened before and did not change is not parsed again.

    Raises:
        UserError: not GGUF, or another architecture.
        KllmError: the file is cut off.
    """
    stat = path.stat()
    return _opened(path.resolve(), stat.st_size, stat.st_mtime_ns, str(path))


@lru_cache(maxsize=2)
def _opened(path: Path, size: int, _changed: int, where: str) -> GgufModel:
    import gguf

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError("not a GGUF file", where=where)
    try:
        reader = gguf.GGUFReader(path)
        model = GgufModel(path, _Fields(reader.fields), reader)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as e:
        raise KllmError(f"damaged or cut off: {e}", where=where, hint="copy the file again") from None
    if model.arch not in ARCHITECTURES:
        hint = f"known: {', '.join(ARCHITECTURES)}"
        raise UserError(f"architecture {model.arch!r} is not supported", where=where, hint=hint)
    end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    if end > size:
        raise KllmError("cut off in the middle of the weights", where=where, hint="copy the file again")
    return model


class _Fields(Mapping[str, Any]):
    """Keys of a file; a long list of tokens is turned into Python strings only when asked for."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {name: field for name, field in fields.items() if not name.startswith("GGUF.")}
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = self._fields[name].contents()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def _shape(fields: Mapping[str, Any], arch: str, rows: int, where: str) -> ModelShape:
    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        if value is None:
            raise UserError(f"key {arch}.{key} is missing", where=where)
        return value

    for key in _SCALES:
        if float(get(key, 1.0)) not in (0.0, 1.0):
            raise UserError(f"{arch}.{key} is not 1: another architecture's arithmetic", where=where)
    hidden, heads = int(get("embedding_length")), int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", 0) or get("rope.dimension_count", 0) or hidden // heads)
    if int(get("rope.dimension_count", head_dim)) != head_dim:
        raise UserError("partial rotary embedding is not supported", where=where)
    shape = ModelShape(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=int(get("feed_forward_length")),
        num_hidden_layers=int(get("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        rms_norm_eps=shortest(float(get("attention.layer_norm_rms_epsilon"))),
        rope_theta=shortest(float(get("rope.freq_base", 10000.0))),
        rope_scaling=_scaling(get, fields, arch, where),
        max_position_embeddings=int(get("context_length")),
    )
    experts = int(get("expert_count", 0))
    return shape if not experts else _with_experts(shape, experts, arch, get)


def _with_experts(shape: ModelShape, experts: int, arch: str, get: Any) -> ModelShape:
    width = int(get("expert_feed_forward_length", shape.intermediate_size))
    shared = int(get("expert_shared_feed_forward_length", 0))
    if arch == "bailingmoe":
        shared = int(get("expert_shared_count", 0)) * width
    whole = shared % width == 0 and arch != "qwen2moe"
    renormalised = {"qwen2moe": False, "bailingmoe": bool(get("expert_weights_norm", False))}
    return shape.with_(
        num_experts=experts,
        num_experts_per_tok=int(get("expert_used_count")),
        moe_intermediate_size=width,
        norm_topk_prob=renormalised.get(arch, True),
        num_shared_experts=shared // width if whole else 0,
        shared_expert_intermediate_size=0 if whole else shared,
        shared_expert_gate=arch == "qwen2moe",
    )


def shortest(value: float) -> float:
    """The decimal number of fewest digits that is the same float32: 1e-5, not 9.999999747378752e-06."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if torch.tensor(short).float() == torch.tensor(value).float():
            return short
    return value


def _scaling(get: Any, fields: Mapping[str, Any], arch: str, where: str) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"rope scaling {kind!r} is not supported", where=where)
    factor = shortest(float(get("rope.scaling.factor")))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return scaling
    scaling["original_max_position_embeddings"] = int(get("rope.scaling.original_context_length"))
    for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        value = float(get(f"rope.scaling.yarn_{key}", usual))
        if value != usual:
            scaling[key] = value
    multiplier = fields.get(f"{arch}.rope.scaling.attn_factor")
    if multiplier is not None:
        scaling["attention_factor"] = shortest(float(multiplier) * (1 + 0.1 * math.log(factor)))
    return scaling
