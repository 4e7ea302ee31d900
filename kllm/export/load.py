"""One loader for everything that can stand where a model is expected."""

from __future__ import annotations

from pathlib import Path

import torch

from kllm.export.hf import check_state, read_shape, read_tensors
from kllm.export.mapping import hf_to_state
from kllm.export.resolve import resolve
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer, Tokenizer | None]:
    """The model in `path` (anything `resolve` takes) and its tokenizer, if it has one."""
    directory = resolve(path)
    state, shape = hf_to_state(read_tensors(directory), read_shape(directory), str(directory))
    with torch.device("meta"):
        model = Transformer(shape)
    check_state(state, model, str(directory))
    model.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    if shape.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").exists() else None
    model = model.to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, tokenizer
