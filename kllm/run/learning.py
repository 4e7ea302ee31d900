"""What each kind of training stage learns from and how: its source, objective and held-out figures.

The loop and the run around it are the same for all kinds; this is all that differs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from kllm.config.stages import DistillStage, DpoStage, TrainingStage
from kllm.data.annotate import Annotation, annotate
from kllm.data.batch import Batch
from kllm.data.loader import PackedSource, val_batches
from kllm.data.pairsource import PairSource
from kllm.data.shards import Prepared, Shard
from kllm.errors import UserError
from kllm.export.load import load_model
from kllm.model.transformer import Transformer
from kllm.objectives.distill import Distill
from kllm.objectives.lm import LanguageModeling
from kllm.objectives.preference import Preference
from kllm.objectives.preference_eval import evaluate_preference
from kllm.objectives.reference import reference_logprobs
from kllm.objectives.teacher import teacher_topk
from kllm.run.assemble import token_weight_table
from kllm.run.context import StageContext
from kllm.run.fingerprint import hash_directory
from kllm.run.rollouts import on_policy, online_pairs
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.train.device import Runtime
from kllm.train.evaluate import evaluate
from kllm.train.objective import Objective, Source

REFERENCE_FREE = ("simpo", "orpo")


@dataclass
class Materials:
    """What a stage has when its learning is put together."""

    ctx: StageContext
    stage: TrainingStage
    runtime: Runtime
    tokenizer: Tokenizer
    model: Transformer
    data: Prepared

    @property
    def micro_rows(self) -> int:
        return max(1, self.stage.train.micro_batch_tokens // self.stage.row_tokens)

    @property
    def rows_per_step(self) -> int:
        return max(1, self.stage.train.batch_tokens // self.stage.row_tokens)


@dataclass
class Learning:
    """source: what a step sees; objective: what is learned; held_out: figures of the held-out data, or None
    when there is none; rows_per_epoch: rows of one pass over the data."""

    source: Source
    objective: Objective
    held_out: Callable[[nn.Module], dict[str, float]] | None
    rows_per_epoch: int


def learning_of(materials: Materials) -> Learning:
    """The learning of a stage, by its kind."""
    stage = materials.stage
    if isinstance(stage, DpoStage):
        return _preference(materials, stage)
    if isinstance(stage, DistillStage) and "teacher" in materials.ctx.inputs:
        return _distillation(materials, stage)
    source = packed_source(materials)
    objective = LanguageModeling(stage.train.loss_chunk)
    return Learning(source, objective, held_out_loss(materials), source.rows_per_epoch)


def packed_source(materials: Materials, extras: Sequence[Annotation] | None = None) -> PackedSource:
    """Packed rows of the stage's data; `extras` are per-token annotations, one mapping a shard."""
    stage, runtime = materials.stage, materials.runtime
    kind = stage.data_kind
    table = token_weight_table(
        stage.train.token_weights, materials.tokenizer, materials.model.shape.vocab_size
    )
    options: dict[str, Any] = {
        "seq_len": stage.dataset.seq_len,
        "rows_per_step": materials.rows_per_step,
        "micro_rows": materials.micro_rows,
        "seed": materials.ctx.seed,
        "rank": runtime.rank,
        "world": runtime.world,
        "packing": stage.dataset.packing,
        "token_weights": table,
        "extras": extras,
    }
    shards, weights = materials.data.train, [s.weight for s in stage.data]
    if kind in ("preference", "rated"):
        return PairSource(shards, weights, **options)
    return PackedSource(shards, weights, kind=kind, **options)


def held_out_batches(materials: Materials, extras: Annotation | None = None) -> list[Batch]:
    """The held-out rows, always the same ones; [] when nothing was held out."""
    val, stage = materials.data.val, materials.stage
    if not val.docs:
        return []
    return val_batches(
        val, stage.dataset.seq_len, stage.train.eval_tokens, materials.micro_rows, extras=extras
    )


def held_out_loss(materials: Materials) -> Callable[[nn.Module], dict[str, float]] | None:
    """`val/loss` and `val/bpb` of the held-out rows."""
    batches = held_out_batches(materials)
    if not batches:
        return None
    sizes = np.zeros(materials.model.shape.vocab_size, dtype=np.int64)
    known = materials.tokenizer.token_bytes()
    sizes[: len(known)] = known
    runtime, chunk = materials.runtime, materials.stage.train.loss_chunk
    return lambda model: evaluate(model, batches, runtime, sizes, chunk)


# -- preferences --------------------------------------------------------------------------------------


def _preference(materials: Materials, stage: DpoStage) -> Learning:
    free = stage.preference.loss in REFERENCE_FREE
    # with an adapter its model without it is at hand: for kto's estimate of the KL, and for pairs made on
    # the way, whose reference would be a second model in memory
    both = stage.adapter is not None and not free and (stage.online or stage.preference.loss == "kto")
    options = stage.preference.model_dump()
    options["beta"] = options["beta"] or (2.0 if stage.preference.loss == "simpo" else 0.1)
    objective = Preference(
        **options,
        reference="none" if free else "adapters_off" if both else "cached",
        loss_chunk=stage.train.loss_chunk,
    )
    # made first: what is wrong with its prompts is said before anything is computed
    own = online_pairs(materials, stage, annotated=not free and not both) if stage.online else None
    # without a reference in the loss, that of the held-out pairs still shows how far the model drifts
    train, val = (None, None) if both else _reference(materials, stage, val_only=free or stage.online)
    batches, runtime = held_out_batches(materials, val), materials.runtime

    def held_out(model: nn.Module) -> dict[str, float]:
        return evaluate_preference(model, batches, runtime, objective)

    source: Any = own or packed_source(materials, train)
    rows = own.steps_per_epoch * materials.rows_per_step if own else source.rows_per_epoch
    return Learning(source, objective, held_out if batches else None, rows)


def _reference(
    materials: Materials, stage: DpoStage, val_only: bool
) -> tuple[list[Annotation] | None, Annotation]:
    """Log-probabilities of every answer under the model as it starts, made once and kept with the data."""
    model, runtime, chunk = materials.model, materials.runtime, stage.train.loss_chunk

    def compute(batch: Batch) -> dict[str, Any]:
        with runtime.autocast():
            return {"reference": reference_logprobs(model, batch.to(runtime.device), chunk)}

    key = _key("reference", materials, "model")
    fields = {"reference": (np.dtype("<f4"), 0)}
    (val,) = _annotated(materials, [materials.data.val], key, fields, compute)
    train = None if val_only else _annotated(materials, materials.data.train, key, fields, compute)
    return train, val


def _annotated(
    materials: Materials,
    shards: Sequence[Shard],
    key: str,
    fields: dict[str, tuple[np.dtype[Any], int]],
    compute: Callable[[Batch], dict[str, Any]],
) -> list[Annotation]:
    """What `compute` says of the shards' tokens; the first process makes it, the others find it."""
    stage, runtime, news = materials.stage, materials.runtime, _News(materials.ctx, key.partition("-")[0])

    def every() -> list[Annotation]:
        return [
            annotate(
                shard, key, fields, compute,
                micro_tokens=stage.train.micro_batch_tokens, seq_len=stage.dataset.seq_len, progress=news,
            )
            for shard in shards
        ]  # fmt: skip

    found = every() if runtime.main else []
    runtime.barrier()
    return found or every()


class _News:
    """Says how far a long pass over the data is, now and then."""

    def __init__(self, ctx: StageContext, what: str, seconds: float = 5.0) -> None:
        self.ctx, self.what, self.seconds, self.last = ctx, what, seconds, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self.ctx.is_main and time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            self.ctx.reporter.message(f"{self.what}: {done:,} of {total:,} tokens")


def _key(what: str, materials: Materials, source: str, **options: Any) -> str:
    """Name of an annotation: what, by which model, how."""
    place, stage = materials.ctx.inputs.get(source), materials.stage
    seed, memo = materials.ctx.seed, materials.ctx.run_dir / "hashes.json"
    origin = f"seed {seed}" if place is None else hash_directory(place, memo)
    own: Any = None
    if what == "reference":  # overrides such as rope_theta make another model of the same files
        lora = stage.adapter.model_dump() if stage.adapter else None
        own = [asdict(materials.model.shape), lora]
    options["dtype"] = str(materials.runtime.dtype)
    text = json.dumps([origin, own, options], sort_keys=True, default=str)
    return f"{what}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


# -- distillation -------------------------------------------------------------------------------------


def _distillation(materials: Materials, stage: DistillStage) -> Learning:
    options, ctx = stage.distill, materials.ctx
    teacher, other = load_model(ctx.inputs["teacher"], materials.runtime.device, say=ctx.reporter.message)
    teacher.ensure_context(stage.row_tokens)
    teacher.eval().requires_grad_(False)
    same = other is None or _same_ids(materials.tokenizer, other)
    if not same and options.divergence != "uld":
        raise UserError(
            "teacher and student have different tokenizers",
            where="distill.divergence",
            hint="--distill.divergence uld compares them",
        )
    kept = options.top_k > 0 and options.divergence != "uld"  # which compares more than what can be kept
    train = _teacher_cache(materials, stage, teacher) if kept else None
    alpha = options.alpha if options.alpha is not None else 0.0 if options.on_policy else 0.5
    objective = Distill(
        None if kept else teacher,
        student_hidden=materials.model.shape.hidden_size,
        divergence=options.divergence,
        temperature=options.temperature,
        alpha=alpha,
        top_k=options.top_k,
        beta=options.beta,
        skew=options.skew,
        hidden_weight=options.hidden_weight,
        hidden_loss=options.hidden_loss,
        loss_chunk=stage.train.loss_chunk,
        tokenizers=None if same or other is None else (materials.tokenizer, other),
    ).to(materials.runtime.device)
    source = packed_source(materials, train)
    learning = Learning(source, objective, held_out_loss(materials), source.rows_per_epoch)
    if options.on_policy:
        return on_policy(materials, stage, learning)
    return learning


def _same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both give a text the same ids; their chat templates do not matter."""
    return one.spec()["model"] == other.spec()["model"] and one.added_tokens == other.added_tokens


def _teacher_cache(materials: Materials, stage: DistillStage, teacher: Transformer) -> list[Annotation]:
    """The teacher's likeliest tokens at every trained place, made once and kept with the data."""
    k, runtime, options = stage.distill.top_k, materials.runtime, stage.distill
    vocab = materials.model.shape.vocab_size

    def compute(batch: Batch) -> dict[str, Any]:
        with runtime.autocast():
            return teacher_topk(
                teacher, batch.to(runtime.device), k, options.temperature, stage.train.loss_chunk, vocab
            )

    key = _key("teacher", materials, "teacher", k=k, temperature=options.temperature, vocab=vocab)
    fields: dict[str, tuple[np.dtype[Any], int]] = {
        "teacher_ids": (np.dtype("<i4"), k),
        "teacher_logprobs": (np.dtype("<f2"), k),
    }
    return _annotated(materials, materials.data.train, key, fields, compute)
