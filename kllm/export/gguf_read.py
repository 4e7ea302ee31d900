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
        if len(sizes.get("token_embd.weight", ())) != 2:
            raise UserError("no token_embd.weight: not a language model", where=str(self.path))
        shape = _shape(_Keys(self.fields, self.arch, str(self.path)), sizes["token_embd.weight"][0])
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
                value = torch.from_numpy(values.copy()).float()
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise UserError(f"tensor {tensor.name} is of type {kind}, which cannot be read",
                                where=str(self.path)) from None  # fmt: skip
            except (ValueError, IndexError) as e:
                raise KllmError(f"tensor {tensor.name} is damaged: {e}", where=str(self.path)) from None
            pairs = self.arch in PAIRWISE and rotated(tensor.name)
            if pairs and value.dim() and len(value) % shape.head_dim == 0:  # else its shape is refused later
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
        model = GgufModel(path, _Fields(reader.fields, where), reader)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError):
        # numpy's own words would tell nobody anything
        raise KllmError("damaged or cut off", where=where, hint="copy the file again") from None
    if model.arch not in ARCHITECTURES:
        hint = f"known: {', '.join(ARCHITECTURES)}"
        raise UserError(f"architecture {model.arch!r} is not supported", where=where, hint=hint)
    end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    if end > size:
        raise KllmError("cut off in the middle of the weights", where=where, hint="copy the file again")
    return model


class _Fields(Mapping[str, Any]):
    """Keys of a file; a long list of tokens is turned into Python strings only when asked for."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._fields = {name: field for name, field in fields.items() if not name.startswith("GGUF.")}
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            field = self._fields[name]
            try:
                self._read[name] = field.contents()
            except (ValueError, IndexError):
                raise KllmError(f"key {name} is damaged", self._where, "copy the file again") from None
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


@dataclass(frozen=True)
class _Keys:
    """The keys of an architecture, checked when they are asked for."""

    fields: Mapping[str, Any]
    arch: str
    where: str

    def get(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(f"{self.arch}.{key}", default)
        if value is None:
            raise UserError(f"key {self.arch}.{key} is missing", where=self.where)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; 0 only where that is the default."""
        value = self.get(key, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        if not fits or (value == 0 and default != 0):
            name = f"{self.arch}.{key}"
            raise UserError(f"key {name} is {str(value)[:40]}, not a positive number", where=self.where)
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))


def _shape(keys: _Keys, rows: int) -> ModelShape:
    for key in _SCALES:
        if keys.get(key, 1.0) not in (0.0, 1.0):
            message = f"{keys.arch}.{key} is not 1: another architecture's arithmetic"
            raise UserError(message, where=keys.where)
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", 0) or keys.count("rope.dimension_count", 0)
    head_dim = head_dim or hidden // heads
    if keys.count("rope.dimension_count", head_dim) != head_dim:
        raise UserError("partial rotary embedding is not supported", where=keys.where)
    shape = ModelShape(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=keys.count("feed_forward_length"),
        num_hidden_layers=keys.count("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=keys.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=shortest(keys.number("attention.layer_norm_rms_epsilon")),
        rope_theta=shortest(keys.number("rope.freq_base", 10000.0)),
        rope_scaling=_scaling(keys),
        max_position_embeddings=keys.count("context_length"),
    )
    if heads % shape.num_key_value_heads or head_dim % 2 or not head_dim:
        kv = shape.num_key_value_heads
        raise UserError(f"{heads} heads of {head_dim}, {kv} key heads: no such attention", where=keys.where)
    experts = keys.count("expert_count", 0)
    return shape if not experts else _with_experts(shape, experts, keys)


def _with_experts(shape: ModelShape, experts: int, keys: _Keys) -> ModelShape:
    arch, chosen = keys.arch, keys.count("expert_used_count")
    if chosen > experts:
        raise UserError(f"{chosen} of {experts} experts for each token", where=keys.where)
    width = keys.count("expert_feed_forward_length", shape.intermediate_size)
    shared = keys.count("expert_shared_feed_forward_length", 0)
    if arch == "bailingmoe":
        shared = keys.count("expert_shared_count", 0) * width
    whole = shared % width == 0 and arch != "qwen2moe"
    renormalised = {"qwen2moe": False, "bailingmoe": bool(keys.get("expert_weights_norm", False))}
    return shape.with_(
        num_experts=experts,
        num_experts_per_tok=chosen,
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


def _scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"rope scaling {kind!r} is not supported", where=keys.where)
    factor = shortest(keys.number("rope.scaling.factor"))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return scaling
    scaling["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length")
    for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        value = keys.number(f"rope.scaling.yarn_{key}", usual)
        if value != usual:
            scaling[key] = value
    if f"{keys.arch}.rope.scaling.attn_factor" in keys.fields:
        multiplier = keys.number("rope.scaling.attn_factor")
        scaling["attention_factor"] = shortest(multiplier * (1 + 0.1 * math.log(factor)))
    return scaling
