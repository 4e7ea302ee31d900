"""What a model thinks of the labels of a batch, beside its training: the reference of preferences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kllm.data.batch import Batch
from kllm.model.attention import PackedLayout
from kllm.model.head import token_logprobs
from kllm.train.objective import unwrap


@contextmanager
def _aside(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A forward beside the training one: no gradients, no dropout, and nothing left behind.

    Casts made without gradients must not stay in autocast's cache: under older torch (its issue 158232)
    the training forward finds them there, and its weights get no gradient.
    """
    was_training = model.training
    model.eval()
    kind = device.type
    enabled = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if enabled else None
    try:
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield
    finally:
        model.train(was_training)


def reference_logprobs(model: nn.Module, batch: Batch, chunk: int = 1024) -> Tensor:
    """Log-probabilities of the batch's labels under `model`, to be kept beside the shards.

    Args:
        model: the reference; put back into the mode it was in.
        batch: on any device.
        chunk: positions whose logits are alive at once.

    Returns:
        float32 [T] on the model's device, 0 where there is no label.
    """
    inner = unwrap(model)
    batch = batch.to(inner.head_weight.device)
    inner.ensure_context(batch.context)
    layout = PackedLayout(batch.cu_seqlens, batch.tokens.device, batch.parents)
    with _aside(inner, batch.tokens.device):
        hidden = inner(batch.tokens, batch.positions, layout)
        return token_logprobs(hidden, inner.head_weight, batch.labels, chunk)


def logprobs_without_adapters(model: nn.Module, batch: Batch, chunk: int = 1024) -> Tensor:
    """`reference_logprobs` of the model that an adapter was added to (kllm.model.lora)."""
    from kllm.model.lora import adapters_off

    with adapters_off(unwrap(model)):
        return reference_logprobs(model, batch, chunk)
