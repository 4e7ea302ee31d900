"""From a stage's section to model, data and sizes: the building blocks of the wiring.

Rooms below know nothing of recipes; this file and `execute` hand each the plain numbers it needs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kllm.config.align import LoraSection
from kllm.config.parts import ModelSection
from kllm.config.stages import DistillStage, TrainingStage
from kllm.data.loader import val_batches
from kllm.data.reasoning import ThinkOptions
from kllm.data.shards import Prepared, prepare
from kllm.errors import UserError
from kllm.export import tokenizers
from kllm.export.load import load_model
from kllm.model.frozen import BASES
from kllm.model.lora import LoraConfig, add_lora, lora_targets
from kllm.model.presets import ModelShape
from kllm.model.prune import student_from
from kllm.model.transformer import Transformer
from kllm.observe.reporting import Reporter
from kllm.run.context import StageContext
from kllm.run.shapes import (
    AdapterSize,
    check_positions,
    check_vocabulary,
    fresh_shape,
    pruned_shape,
    shape_overrides,
    steps_and_tokens,
)
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.train.device import Runtime


def load_tokenizer(ctx: StageContext, chat_template: str | None = None) -> Tokenizer:
    """The stage's tokenizer: its own input, or the one beside its model."""
    source = ctx.inputs.get("tokenizer") or ctx.inputs.get("model")
    if source is None:
        raise UserError("no tokenizer", where=f"{ctx.stage.name}.tokenizer", hint="give --tokenizer DIR")
    template = Path(chat_template).read_text(encoding="utf-8") if chat_template else None
    return tokenizers.load_tokenizer(source, chat_template=template)


def build_model(
    ctx: StageContext, stage: TrainingStage, tokenizer: Tokenizer, runtime: Runtime, data: Prepared
) -> Transformer:
    """A fresh model, the weights the stage starts from, or a student cut out of them; with its adapter."""
    seq_len = stage.dataset.seq_len
    if "model" not in ctx.inputs:
        shape = fresh_shape(stage.model, tokenizer.vocab_size)
        check_positions(shape, seq_len)
        model = Transformer(shape)
        model.init_weights(ctx.seed)
    else:
        model, _ = load_model(ctx.inputs["model"], tokenizer=False, say=ctx.reporter.message)
        if isinstance(stage, DistillStage) and stage.student_from:
            model = _student(model, stage, data)
            shape = model.shape
        else:
            shape = with_overrides(model.shape, stage.model)
        check_vocabulary(tokenizer.vocab_size, shape)
        check_positions(shape, seq_len)
        if shape != model.shape:
            state = model.state_dict()
            model = Transformer(shape)
            model.load_state_dict(state)
    model.activation_checkpointing = stage.train.activation_checkpointing
    model.ensure_context(seq_len)
    if stage.adapter is not None:
        add_lora(model, lora_config(stage.adapter), ctx.seed)
    return model.to(runtime.device)


JUDGED_TOKENS = 16384
"""Tokens of the data by which a teacher's parts are judged before a student is cut out of it."""


def _student(teacher: Transformer, stage: DistillStage, data: Prepared) -> Transformer:
    shape = pruned_shape(teacher.shape, stage.model)
    teacher.ensure_context(stage.dataset.seq_len)
    rows = val_batches(data.train[0], stage.dataset.seq_len, JUDGED_TOKENS, 4)
    return student_from(teacher, shape, rows, stage.distill.prune)


def lora_config(section: LoraSection) -> LoraConfig:
    """The plain numbers of an adapter."""
    return LoraConfig(
        rank=section.rank,
        alpha=section.alpha or 2.0 * section.rank,
        dropout=section.dropout,
        targets=tuple(section.targets),
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init=section.init,
        base=section.base,
    )


def planned_adapter(section: LoraSection, shape: ModelShape) -> AdapterSize:
    """What an adapter of a model of this shape trains, before any weight exists.

    Raises:
        UserError: a target that matches nothing, a rank that PiSSA cannot take.
    """
    config = lora_config(section)
    with torch.device("meta"):
        targets = lora_targets(Transformer(shape), config)
    trained = active = 0
    for *stack, outputs, inputs in targets.values():
        one = config.rank * (outputs + inputs) + (outputs if config.use_dora else 0)
        trained += one * (stack[0] if stack else 1)
        active += one * (shape.num_experts_per_tok if stack else 1)
    return AdapterSize(trained, active, BASES[config.base])


def with_overrides(shape: ModelShape, section: ModelSection) -> ModelShape:
    """A loaded model's shape with overrides that leave its tensors alone; others are refused."""
    changed = shape.with_(**shape_overrides(section))
    fixed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "tie_word_embeddings", "qk_norm", "attention_bias",
             "num_experts", "moe_intermediate_size", "num_shared_experts")  # fmt: skip
    for name in fixed:
        if getattr(changed, name) != getattr(shape, name):
            raise UserError(
                f"the loaded model has {name} {getattr(shape, name)}, not {getattr(changed, name)}",
                where=f"model.{name}",
            )
    return changed


@dataclass
class Sizes:
    """How the planned amount becomes rows and steps."""

    rows_per_step: int
    micro_rows: int
    steps: int


def plan_sizes(stage: TrainingStage, rows_per_epoch: int) -> Sizes:
    """Rows per step and micro-batch, and the number of steps for steps, tokens or epochs."""
    row = stage.row_tokens
    steps, _ = steps_and_tokens(stage, rows_per_epoch * row)
    rows_per_step = max(1, stage.train.batch_tokens // row)
    return Sizes(rows_per_step, max(1, stage.train.micro_batch_tokens // row), steps or 1)


class _SlowNews:
    """Says how far a long preparation is, now and then."""

    def __init__(self, reporter: Reporter, seconds: float = 5.0) -> None:
        self.reporter, self.seconds, self.last = reporter, seconds, time.monotonic()

    def __call__(self, source: str, docs: int, tokens: int) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            self.reporter.message(f"preparing {source}: {docs:,} documents, {tokens:,} tokens")


def _thinking(stage: TrainingStage) -> ThinkOptions | None:
    """What is done to the thinking in conversations; None = nothing."""
    given = stage.dataset
    options = ThinkOptions(
        unify=given.unify_reasoning,
        answer_tags="strip" if given.unify_reasoning else "keep",
        add_empty=given.add_empty_think,
        drop=given.drop_reasoning,
    )
    both = isinstance(stage, DistillStage) and stage.collect.plain_ratio > 0  # its empty blocks are context
    return options if both or options != ThinkOptions() else None


def prepare_data(ctx: StageContext, stage: TrainingStage, tokenizer: Tokenizer, runtime: Runtime) -> Prepared:
    """Token shards of the stage's data; the first process makes them, the others find them."""
    dataset = stage.dataset
    options: dict[str, Any] = {
        "kind": stage.data_kind,
        "cache_dir": Path(dataset.cache_dir) if dataset.cache_dir else ctx.run_dir / "cache" / "shards",
        "seq_len": dataset.seq_len,
        "val_fraction": dataset.val_fraction,
        "val_data": list(dataset.val_data),
        "max_bad_rows": dataset.max_bad_rows,
        "max_bytes": dataset.max_bytes,
        "min_chars": dataset.min_chars,
        "system_prompt_ratio": dataset.system_prompt_ratio,
        "keep_empty_think": dataset.keep_empty_think,
        "think": _thinking(stage),
        "seed": ctx.seed,
    }
    if runtime.main:
        prepared = prepare(list(stage.data), tokenizer, progress=_SlowNews(ctx.reporter), **options)
    runtime.barrier()
    if not runtime.main:
        prepared = prepare(list(stage.data), tokenizer, progress=None, **options)
    return prepared


def token_weight_table(weights: dict[str, float], tokenizer: Tokenizer, vocab: int) -> np.ndarray | None:
    """Loss weight per token id [V] from weights by token string; a string must be one token."""
    if not weights:
        return None
    table = np.ones(vocab, dtype=np.float32)
    for text, weight in weights.items():
        ids = tokenizer.encode_raw(text)
        if len(ids) != 1:
            raise UserError(
                f"{text!r} is {len(ids)} tokens in this tokenizer, not one",
                where="train.token_weights",
                hint=f"single tokens: {', '.join(list(tokenizer.added_tokens)[:8])}",
            )
        table[ids[0]] = weight
    return table
