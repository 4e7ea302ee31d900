"""An adapter on disk as the engine takes it: matched to a model in memory, its scale worked in."""

from __future__ import annotations

from pathlib import Path

from kllm.export.adapter import in_memory, read_adapter
from kllm.model.decode_adapters import AdapterWeights, check_adapter
from kllm.model.presets import ModelShape


def adapter_weights(path: str | Path, shape: ModelShape) -> AdapterWeights:
    """The adapter in `path` for a model of this shape, to be chosen per request.

    Args:
        path: whatever `read_adapter` takes.

    Raises:
        UserError: no adapter, another model's, or one that can only be merged.
        KllmError: damaged.
    """
    adapter = in_memory(read_adapter(path, shape.head_dim), shape)
    pairs = {name: (a, b * adapter.scale) for name, (a, b) in adapter.pairs.items()}
    weights = AdapterWeights(pairs, adapter.magnitudes, str(path))
    check_adapter(weights, shape)
    return weights
