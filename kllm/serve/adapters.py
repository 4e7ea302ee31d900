"""Adapters as models of their own names: read, compared with their base, served by its engine."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kllm.errors import KllmError

if TYPE_CHECKING:
    from kllm.model.decode_adapters import AdapterWeights
    from kllm.model.presets import ModelShape
    from kllm.serve.registry import Served


def check_reference(reference: str, base: Path | None) -> None:
    """Whether an adapter can be had and fits, as far as it can be told without the network.

    Args:
        reference: what --adapter names.
        base: what holds its model; None if that is still to be fetched.

    Raises:
        UserError, KllmError: nothing there, damaged, another model's, merged into the base already.
    """
    from kllm.export.hub import is_hub_id
    from kllm.export.resolve_adapter import check_unmerged, resolve_adapter

    if not Path(reference).expanduser().exists() and is_hub_id(reference):
        return
    with _named(reference):
        place = resolve_adapter(reference)
        if base is not None:
            check_unmerged(base, reference)
    if base is not None:
        _weights(reference, place, _shape_at(base))


def read_reference(reference: str, shape: ModelShape) -> AdapterWeights:
    """The adapter that --adapter names, for a model of this shape.

    Raises:
        UserError, KllmError: as `check_reference`; the hub cannot be reached.
    """
    from kllm.export.resolve_adapter import resolve_adapter

    with _named(reference):
        place = resolve_adapter(reference)
    return _weights(reference, place, shape)


def _weights(reference: str, place: Path, shape: ModelShape) -> AdapterWeights:
    from kllm.export.adapter_weights import adapter_weights

    with _named(reference, place):
        return adapter_weights(place, shape)


def _shape_at(base: Path) -> ModelShape:
    from kllm.export.hf import read_shape
    from kllm.export.load import file_shape

    return read_shape(base) if base.is_dir() else file_shape(base)


@contextlib.contextmanager
def _named(reference: str, place: Path | None = None) -> Iterator[None]:
    """Errors of an adapter name its flag: `flag --adapter nope: no such adapter`."""
    try:
        yield
    except KllmError as error:
        if error.where in (reference, str(place)):
            error.where = f"flag --adapter {reference}"
        raise


def beside(base: Served, name: str, weights: AdapterWeights) -> Served:
    """The adapter that `base`'s engine knows by this name, as a model of its own."""
    whole = hashlib.sha256(base.fingerprint.encode())
    for module, pair in sorted(weights.pairs.items()):
        magnitude = weights.magnitudes.get(module)
        for tensor in pair if magnitude is None else (*pair, magnitude):
            whole.update(f"{module} {tuple(tensor.shape)}".encode())
            whole.update(tensor.float().contiguous().cpu().numpy().data)
    rank = max(len(a) for a, _ in weights.pairs.values())
    return replace(
        base,
        name=name,
        root=base.name,
        parent=base.name,
        adapter=name,
        fingerprint=f"{base.fingerprint.rpartition('-')[0]}-{whole.hexdigest()[:12]}",
        created=int(time.time()),
        lines=(f"LoRA on {base.name}, rank {rank}, {len(weights.pairs)} modules",),
    )
