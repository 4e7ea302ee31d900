"""Held-out loss and bits per byte, always on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from kllm.data.batch import IGNORE, Batch
from kllm.model.attention import PackedLayout
from kllm.model.head import token_losses
from kllm.train.device import Runtime
from kllm.train.objective import unwrap


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Sequence[Batch], runtime: Runtime, token_bytes: np.ndarray, chunk: int = 1024
) -> dict[str, float]:
    """`val/loss` in nats per token and `val/bpb` in bits per byte of text.

    Bits per byte counts only tokens that stand for bytes, so that models with different tokenizers
    compare (token_bytes int [V], 0 for special tokens). Batches are shared out over processes.
    """
    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    sizes = torch.from_numpy(token_bytes).to(runtime.device)
    nll = count = text_nll = text_bytes = 0.0
    for batch in batches[runtime.rank :: runtime.world]:
        batch = batch.to(runtime.device)
        layout = PackedLayout(batch.cu_seqlens, runtime.device, batch.parents)
        with runtime.autocast():
            hidden = inner(batch.tokens, batch.positions, layout)
        losses = token_losses(hidden, inner.head_weight, batch.labels, chunk).double()
        trained = batch.labels != IGNORE
        length = torch.where(trained, sizes[batch.labels.clamp_min(0)], 0)
        nll += float(losses.sum())
        count += float(trained.sum())
        text_nll += float(losses[length > 0].sum())
        text_bytes += float(length.sum())
    inner.train(was_training)
    nll, count, text_nll, text_bytes = runtime.sums([nll, count, text_nll, text_bytes])
    result = {"val/loss": nll / count} if count else {}
    if text_bytes:
        result["val/bpb"] = text_nll / math.log(2) / text_bytes
    return result
