"""The model of a stage as arithmetic, before any weight exists: shape, sizes, memory. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kllm.config.parts import ModelSection
from kllm.config.recipe import REFERENCE, Recipe
from kllm.config.stages import DistillStage, TokenizerStage, TrainingStage
from kllm.errors import UserError
from kllm.export.config import config_to_shape
from kllm.model.presets import (
    SHAPE_FIELDS,
    ModelShape,
    count_parameters,
    get_preset,
    hf_model_type,
    parameters_by_part,
)

DEFAULT_PRESET = "k-small"


def shape_overrides(section: ModelSection) -> dict[str, Any]:
    """The fields of a shape that a model section sets."""
    given = section.model_dump(exclude_none=True)
    return {name: value for name, value in given.items() if name in SHAPE_FIELDS}


def fresh_shape(section: ModelSection, vocab_size: int) -> ModelShape:
    """Preset, overrides and the tokenizer's vocabulary; a shape without exact target is a UserError."""
    shape = get_preset(section.preset or DEFAULT_PRESET)
    shape = shape.with_(vocab_size=vocab_size, **shape_overrides(section))
    # an override of the width alone must not leave a stale head_dim
    if section.head_dim is None and (section.hidden_size or section.num_attention_heads):
        shape = shape.with_(head_dim=shape.hidden_size // shape.num_attention_heads)
    hf_model_type(shape)
    return shape


def pruned_shape(teacher: ModelShape, section: ModelSection) -> ModelShape:
    """The teacher's shape with the student's sizes; what no part of the teacher can fill is refused."""
    given = shape_overrides(section)
    allowed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "moe_intermediate_size")  # fmt: skip
    for name, value in given.items():
        have = getattr(teacher, name)
        if name not in allowed and value != have:
            raise UserError("a student is cut out of its teacher by sizes only", where=f"model.{name}")
        if name in allowed and value > have:
            raise UserError(f"the teacher has only {have}", where=f"model.{name}", hint="give a smaller one")
    shape = teacher.with_(**given)
    hf_model_type(shape)
    return shape


def check_positions(shape: ModelShape, seq_len: int) -> None:
    """Rows longer than the model has positions are refused."""
    if seq_len > shape.max_position_embeddings:
        raise UserError(
            f"rows of {seq_len} tokens are longer than the model's {shape.max_position_embeddings} positions",
            where="dataset.seq_len",
            hint="lower dataset.seq_len or raise model.max_position_embeddings",
        )


def check_vocabulary(vocab_size: int, shape: ModelShape) -> None:
    """A tokenizer with more tokens than its model has rows is refused."""
    if vocab_size > shape.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, the model only {shape.vocab_size}",
            where="tokenizer",
            hint="use the tokenizer that the model was trained with",
        )


def shape_of_directory(place: Path) -> ModelShape:
    """The shape of a model directory, from its config.json; of a model file, from its own head."""
    if place.is_file():
        from kllm.export.load import file_shape

        return file_shape(place)
    path = place / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the model's config: {e}", where=str(path)) from None
    return config_to_shape(config, str(path))


def vocab_of_directory(place: Path) -> int | None:
    """Largest token id + 1 of a tokenizer.json, without loading the tokenizer; None if there is none."""
    if place.is_file():
        from kllm.export.tokenizers import tokenizer_of

        found = tokenizer_of(place)
        return found.vocab_size if found else None
    try:
        spec = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = spec["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
        return max([*ids, *(t["id"] for t in spec.get("added_tokens", []))]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return None


def planned_vocab(recipe: Recipe, name: str, directory: Path | None) -> int | None:
    """Vocabulary of a stage: its tokenizer's on disk, or that of the tokenizer stage it comes from."""
    if directory is not None:
        return vocab_of_directory(directory)
    reference = recipe.inputs(name).get("tokenizer", "")
    while reference.startswith(REFERENCE):
        stage = recipe.stage(reference.removeprefix(REFERENCE))
        if isinstance(stage, TokenizerStage):
            return stage.vocab_size
        reference = recipe.inputs(stage.name).get("tokenizer", "")
    return None


def planned_shape(recipe: Recipe, name: str, model: Path | None, tokenizer: Path | None) -> ModelShape | None:
    """The model that stage `name` will have, or None while that cannot be known (an unfetched hub id).

    Args:
        model, tokenizer: the stage's input directories where they exist.
    """
    stage = recipe.stage(name)
    if isinstance(stage, TokenizerStage):
        return None
    shape = None
    reference = recipe.inputs(name).get("model", "")
    if model is not None:
        shape = shape_of_directory(model)
    elif reference.startswith(REFERENCE):
        producer = reference.removeprefix(REFERENCE)
        shape = planned_shape(recipe, producer, None, tokenizer)
    if isinstance(stage, DistillStage) and stage.student_from and shape is not None:
        return pruned_shape(shape, stage.model)
    if shape is not None or reference or not isinstance(stage, TrainingStage):
        return shape
    vocab = planned_vocab(recipe, name, tokenizer)
    return fresh_shape(stage.model, vocab or get_preset(stage.model.preset or DEFAULT_PRESET).vocab_size)


def steps_and_tokens(stage: TrainingStage, epoch_tokens: int | None = None) -> tuple[int | None, int | None]:
    """Planned optimiser steps and tokens; None while the size of an epoch is unknown."""
    train, row = stage.train, stage.row_tokens
    step_tokens = max(1, train.batch_tokens // row) * row
    if train.steps is not None:
        return train.steps, train.steps * step_tokens
    tokens = train.tokens
    if tokens is None:
        if epoch_tokens is None:
            return None, None
        tokens = math.ceil((train.epochs or 1.0) * epoch_tokens)
    steps = max(1, math.ceil(tokens / step_tokens))
    return steps, steps * step_tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of training by part, on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class AdapterSize:
    """Parameters of an adapter: all that are trained, and those that work on one token; bytes that a weight
    of the frozen matrices takes."""

    trained: int
    active: int
    base_bytes: float


def training_memory(
    shape: ModelShape,
    micro_tokens: int,
    *,
    optimizer: str = "adamw",
    activation_bytes: int = 4,
    checkpointing: bool = False,
    loss_chunk: int = 1024,
    adapter: AdapterSize | None = None,
) -> Memory:
    """Estimate of what training holds: float32 weights, gradients and moments; saved activations.

    With an adapter it alone has gradients and moments, and the matrices may be rounded.

    Per token and layer the backward pass needs: the residual and its norm, twice (4 H); q, k, v and
    the rotated q, k (2 q + 3 kv); the attention's output (q); gate, up, SiLU and product (4 I) of each
    MLP visited. With checkpointing only the residual (H), plus one layer at work. The loss holds two
    chunks of logits in float32.
    """
    n = count_parameters(shape)
    parts = parameters_by_part(shape)
    matrices = sum(parts.get(k, 0) for k in ("attention", "mlp", "experts", "shared experts"))
    weights, trained = 4 * n, n
    if adapter is not None:
        weights += 4 * adapter.trained - round((4 - adapter.base_bytes) * matrices)
        trained = matrices = adapter.trained
    moments = 8 * trained - (4 * matrices if optimizer == "muon" else 0)
    width = shape.intermediate_size
    if shape.is_moe:
        width = shape.num_experts_per_tok * shape.moe_intermediate_size + shape.shared_size
    layer = 4 * shape.hidden_size + 3 * shape.q_size + 3 * shape.kv_size + 4 * width
    layers = shape.num_hidden_layers
    floats = shape.hidden_size * layers + layer if checkpointing else layer * layers
    logits = 2 * 4 * min(loss_chunk, micro_tokens) * shape.vocab_size
    return Memory(weights, 4 * trained, moments, micro_tokens * floats * activation_bytes + logits)
