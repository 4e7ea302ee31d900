"""Everything that can be known to be wrong before any work begins, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kllm.config.align import LoraSection
from kllm.config.load import Loaded
from kllm.config.recipe import Recipe
from kllm.config.stages import EvalStage, ExportStage, TrainingStage
from kllm.data import hub
from kllm.data.sources import expand, is_builtin
from kllm.errors import UserError, UserErrors
from kllm.eval.names import check_task
from kllm.model.presets import ModelShape, get_preset, gguf_arch
from kllm.observe.sinks import check_sinks
from kllm.run.fingerprint import data_paths, templates
from kllm.run.inputs import Input, find_inputs
from kllm.run.rundir import RunDir
from kllm.run.shapes import (
    check_positions,
    check_vocabulary,
    planned_shape,
    vocab_of_directory,
)

DISTRIBUTED = ("pretrain", "sft", "lora", "dpo", "distill")
"""Kinds of stages that run on several processes."""


def check_all(loaded: Loaded, run: RunDir, names: Iterable[str]) -> None:
    """Checks the stages `names`: files, presets, shapes, lengths, packages.

    Raises:
        UserErrors: all that is wrong (one alone is raised as it is).
    """
    errors: list[UserError] = []
    for name in names:
        errors += stage_errors(loaded, run, name)
    unique = list({str(e): e for e in errors}.values())
    if len(unique) == 1:
        raise unique[0]
    if unique:
        raise UserErrors(unique)


def stage_errors(loaded: Loaded, run: RunDir, name: str) -> list[UserError]:
    """All that is wrong with one stage."""
    recipe, stage = loaded.recipe, loaded.recipe.stage(name)
    errors: list[UserError] = []

    def attempt(key: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except UserErrors as e:
            errors.extend(e.errors)
        except UserError as e:
            errors.append(_placed(e, f"{name}.{key}", loaded))
        return None

    key = {"eval": "tasks", "export": "calibrate"}.get(stage.stage, "data")
    for path in data_paths(stage):
        attempt(key, lambda path=path: _check_source(path))  # type: ignore[misc]
    for path in templates(stage):
        attempt("chat_template", lambda path=path: _check_file(path))  # type: ignore[misc]
    if isinstance(stage, EvalStage):
        attempt("tasks", lambda: _check_tasks(stage.tasks))
    inputs = attempt("model", lambda: find_inputs(recipe, name, run.path, fetch=False))
    if isinstance(stage, ExportStage) and inputs is not None:
        attempt("gguf", lambda: _check_export(recipe, stage, inputs))
    if isinstance(stage, TrainingStage):
        attempt("log.sinks", lambda: check_sinks(stage.log.sinks))
        attempt("train.batch_tokens", lambda: _check_processes(recipe, stage))
        preset_ok = attempt("model.preset", lambda: get_preset(stage.model.preset or "k-small"))
        if inputs is not None and preset_ok is not None:
            shape = attempt("model", lambda: _check_shape(recipe, stage, inputs))
            adapter = stage.adapter
            if adapter is not None and shape is not None:
                attempt("lora", lambda: _check_adapter(adapter, shape))
    return errors


def _placed(error: UserError, key: str, loaded: Loaded) -> UserError:
    """The error with the line of the recipe that its key stands on, where it is known."""
    own = error.where or ""
    inner = f"{key.split('.')[0]}.{own}" if f"{key.split('.')[0]}.{own}" in loaded.origins else key
    origin = loaded.origins.get(inner, "")
    if not origin or origin in ("default", "file name"):
        return error
    about = inner if inner != key or own in ("", "model") else f"{key}: {own}"
    return UserError(error.message, where=f"{origin}: {about}", hint=error.hint)


def _check_source(path: str) -> None:
    """A local source must exist and hold something; a hub id is not asked for here."""
    if is_builtin(path):
        expand(path)
        return
    if hub.is_hub_id(path) and not Path(path).exists():
        return
    files = expand(path)
    if not any(file.stat().st_size for file in files):
        raise UserError("the file is empty" if len(files) == 1 else "all its files are empty", where=path)


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise UserError("no such file", where=path)


def _check_tasks(tasks: Iterable[str]) -> None:
    for task in tasks:
        check_task(task)


def _check_processes(recipe: Recipe, stage: TrainingStage) -> None:
    rows = max(1, stage.train.batch_tokens // stage.row_tokens)
    if rows < recipe.nproc:
        raise UserError(
            f"{rows} rows a step cannot feed {recipe.nproc} processes",
            hint=f"at least {recipe.nproc * stage.row_tokens} tokens a step, or fewer processes",
        )


def _check_export(recipe: Recipe, stage: ExportStage, inputs: dict[str, Input]) -> None:
    """A shape that llama.cpp cannot compute, or widths that no group of weights divides."""
    found = inputs.get("model")
    shape = planned_shape(recipe, stage.name, found.directory if found else None, None)
    if shape is None:
        return
    if stage.gguf:
        gguf_arch(shape)
    if stage.quant in ("awq", "int4"):
        inner = shape.moe_intermediate_size if shape.is_moe else shape.intermediate_size
        widths = {shape.hidden_size, shape.q_size, inner, shape.shared_size}
        if odd := sorted(w for w in widths if w % 32):
            raise UserError(f"{stage.quant} needs widths in multiples of 32, and {odd[0]} is none")


def _check_adapter(section: LoraSection, shape: ModelShape) -> None:
    """Targets that the model has, and a rank that they can take."""
    from kllm.run.assemble import planned_adapter  # torch: only where an adapter is trained

    planned_adapter(section, shape)


def _check_shape(recipe: Recipe, stage: TrainingStage, inputs: dict[str, Input]) -> ModelShape | None:
    """The exact Hugging Face target, the positions, and the vocabulary of what exists already.

    Returns:
        The shape; None while it cannot be known.
    """
    model = inputs["model"].directory if "model" in inputs else None
    tokenizer = inputs["tokenizer"].directory if "tokenizer" in inputs else None
    shape = planned_shape(recipe, stage.name, model, tokenizer)
    if shape is None:
        return None
    if stage.model.max_position_embeddings:
        shape = shape.with_(max_position_embeddings=stage.model.max_position_embeddings)
    check_positions(shape, stage.dataset.seq_len)
    vocab = vocab_of_directory(tokenizer) if tokenizer else None
    if model is not None and vocab is not None:
        check_vocabulary(vocab, shape)
    return shape
