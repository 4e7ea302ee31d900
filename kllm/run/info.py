"""What can be said of a model from its shape alone: counts, memory, work. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kllm.export.resolve import resolve
from kllm.model.presets import (
    PRESET_NOTES,
    PRESETS,
    ModelShape,
    active_parameters,
    count_parameters,
    flops_per_token,
    get_preset,
    hf_model_type,
    kv_bytes_per_token,
    parameters_by_part,
)
from kllm.run.shapes import shape_of_directory, training_memory


def find_shape(what: str) -> ModelShape:
    """The shape of a preset, or of the model behind a path or hub id.

    Raises:
        UserError: neither; with the nearest preset if it looks like one.
    """
    if what in PRESETS:
        return PRESETS[what]
    if not Path(what).exists() and "/" not in what:
        return get_preset(what)
    return shape_of_directory(resolve(what, weights=False))


def summary(name: str) -> dict[str, Any]:
    """One row of the table of presets."""
    shape = PRESETS[name]
    return {
        "name": name,
        "parameters": count_parameters(shape),
        "active_parameters": active_parameters(shape),
        "vocab_size": shape.vocab_size,
        "about": PRESET_NOTES.get(name, ""),
    }


def facts(name: str, shape: ModelShape, seq_len: int, micro_batch_tokens: int) -> dict[str, Any]:
    """Everything about one model as plain numbers: parameters, bytes, FLOPs per token.

    Args:
        seq_len: context for attention's work and the KV cache, in tokens.
        micro_batch_tokens: tokens of one training forward pass.
    """
    total = count_parameters(shape)
    memory = training_memory(shape, micro_batch_tokens)
    return {
        "name": name,
        "format": hf_model_type(shape),
        "shape": shape.to_dict(),
        "parameters": {
            "total": total,
            "active": active_parameters(shape),
            "by_part": parameters_by_part(shape),
        },
        "memory": {
            "training": {
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                "activations": memory.activations,
                "total": memory.total,
            },
            "inference": {
                "weights_float32": 4 * total,
                "weights_bfloat16": 2 * total,
                "cache_float32": kv_bytes_per_token(shape, 4) * seq_len,
                "cache_bfloat16": kv_bytes_per_token(shape, 2) * seq_len,
            },
        },
        "flops_per_token": {
            "training": flops_per_token(shape, seq_len, training=True),
            "inference": flops_per_token(shape, seq_len, training=False),
        },
        "seq_len": seq_len,
        "micro_batch_tokens": micro_batch_tokens,
    }
