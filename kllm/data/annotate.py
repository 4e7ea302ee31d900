"""What another model says about each stored token: computed once, kept beside the shard, memory-mapped.

The log-probabilities of a reference model, or a teacher's best tokens, depend on a document's own tokens
only, so they hold for every epoch, packing and batch size. They are found again by a key that names the
model and the options; a killed computation leaves nothing and starts again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kllm.data.assemble import Pieces, Window, assemble
from kllm.data.batch import Batch
from kllm.data.build import remove_torn
from kllm.data.loader import row_capacity
from kllm.data.pack import Ints
from kllm.data.shards import Shard
from kllm.errors import KllmError, UserError
from kllm.files import new_directory, write_json

FORMAT = 1
Fields = Mapping[str, tuple[Any, int]]  # name -> (dtype, values for each token; 0 = one number, no axis)
Annotation = dict[str, NDArray[Any]]  # name -> [stored tokens] or [stored tokens, width]
Compute = Callable[[Batch], Mapping[str, Tensor]]


def annotate(
    shard: Shard,
    key: str,
    fields: Fields,
    compute: Compute,
    *,
    micro_tokens: int,
    seq_len: int,
    progress: Callable[[int, int], None] | None = None,
) -> Annotation:
    """The annotations of a shard's tokens, from the disk if they were computed before.

    Args:
        shard: conversations, pairs or ratings (whole documents: their context does not depend on packing).
        key: names the model's content and every option that decides the numbers.
        fields: dtype and width of each annotation.
        compute: batch of T tokens -> {name: [T] or [T, width]}; the value of a token belongs to its label.
            It gets each stored token once, on the CPU, without gradients.
        micro_tokens: about this many tokens in one batch.
        seq_len: the longest conversation in training.
        progress: called with (tokens done, tokens in all).

    Returns:
        Read-only memory maps beside the shard; arrays in memory for a shard without a folder.

    Raises:
        UserError: plain text, or documents that training would cut.
        KllmError: the disk is full, or the model gives NaN.
    """
    _check(shard, seq_len)
    if shard.folder is None:
        made: dict[str, list[NDArray[Any]]] = {name: [] for name in fields}
        for values in _values(shard, fields, compute, micro_tokens, progress):
            for name, part in values.items():
                made[name].append(part)
        return {name: _joined(parts, *fields[name]) for name, parts in made.items()}
    folder = shard.folder / f"notes-{_digest(shard, key, fields)}"
    if (found := _open(folder, shard, fields)) is not None:
        return found
    remove_torn(folder)
    with new_directory(folder) as aside, ExitStack() as stack:
        files = {name: stack.enter_context((aside / f"{name}.bin").open("wb")) for name in fields}
        for values in _values(shard, fields, compute, micro_tokens, progress):
            for name, part in values.items():
                files[name].write(part.tobytes())
        stack.close()
        write_json(aside / "meta.json", {"format": FORMAT, "key": key, "tokens": len(shard.tokens)})
    found = _open(folder, shard, fields)
    if found is None:
        raise KllmError("the annotations cannot be read back", where=str(folder))
    return found


def _check(shard: Shard, seq_len: int) -> None:
    source = str(shard.meta.get("source", "shard"))
    if shard.kind == "text":
        hint = "only conversations, preference pairs and ratings can be annotated"
        raise UserError("rows of plain text depend on the packing", source, hint)
    longest = int(np.diff(shard.offsets).max(initial=0))
    if longest > row_capacity(shard.kind, seq_len):
        reason = f"a document of {longest} tokens is longer than seq_len {seq_len}: training would cut it"
        raise UserError(reason, source, "prepare the data with the seq_len of the training")


def _digest(shard: Shard, key: str, fields: Fields) -> str:
    layout = {name: [np.dtype(dtype).str, width] for name, (dtype, width) in fields.items()}
    parts = [FORMAT, shard.meta.get("hash"), shard.split, len(shard.tokens), key, layout]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def _open(folder: Path, shard: Shard, fields: Fields) -> Annotation | None:
    """The finished annotations in `folder`; None if they are not there or not whole."""
    found: Annotation = {}
    if not (folder / "meta.json").exists():
        return None
    for name, (dtype, width) in fields.items():
        path, shape = folder / f"{name}.bin", _shape(len(shard.tokens), width)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            return None
        found[name] = np.memmap(path, dtype=dtype, mode="r", shape=shape) if size else np.zeros(shape, dtype)
    return found


def _shape(count: int, width: int) -> tuple[int, ...]:
    return (count, width) if width else (count,)


def _joined(parts: list[NDArray[Any]], dtype: Any, width: int) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(_shape(0, width), dtype)


def _values(
    shard: Shard,
    fields: Fields,
    compute: Compute,
    micro_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Annotation]:
    """The annotations of one group of documents after another, which follow one another in the shard."""
    for first, last in _groups(shard.offsets, micro_tokens):
        renderings = np.arange(first, last)
        pieces = Pieces(
            shards=np.zeros(len(renderings), np.int64),
            begins=shard.offsets[renderings],
            lengths=shard.lengths(renderings),
            open=np.zeros(len(renderings), bool),
            renderings=renderings,
        )
        name = f"{shard.meta.get('source', 'data')} documents {first} to {last - 1}"
        batch = assemble(Window([shard], [{}], [pieces], [name]), shard.kind, None)
        with torch.no_grad():
            made = compute(batch)
        yield {name: _array(made[name], name, len(batch.tokens), *spec) for name, spec in fields.items()}
        if progress is not None:
            progress(int(shard.offsets[last]), len(shard.tokens))


def _groups(offsets: Ints, micro_tokens: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of documents with at most `micro_tokens` tokens together, or of a single one."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + micro_tokens, side="right")) - 1
        last = max(first + 1, last)
        yield first, last
        first = last


def _array(values: Tensor, name: str, tokens: int, dtype: Any, width: int) -> NDArray[Any]:
    if tuple(values.shape) != _shape(tokens, width):
        raise ValueError(f"{name} has the shape {tuple(values.shape)}, not {_shape(tokens, width)}")
    values = values.detach().cpu()
    if values.is_floating_point():
        values = values.float()  # NumPy has no bfloat16
        if bool(values.isnan().any()):
            hint = "the model is broken, or its precision too low"
            raise KllmError(f"the model gives NaN as {name}", hint=hint)
    return values.numpy().astype(dtype)
