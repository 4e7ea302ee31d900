"""Commands that run one stage: their flags are the schema's, their work is `kllm.run.pipeline`'s."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kllm.cli import options
from kllm.config.overrides import as_overrides
from kllm.errors import UserError

if TYPE_CHECKING:
    from kllm.config.load import Loaded

_EXAMPLES = {
    "tokenizer": "kllm tokenizer train --data texts.jsonl --vocab-size 6400",
    "pretrain": "kllm pretrain --data texts.jsonl --preset k-small --tokens 20M",
    "sft": "kllm sft --model runs/pretrain --data chats.jsonl --epochs 2",
    "lora": "kllm lora --model runs/quickstart --data builtin:identity/sft --rank 16",
    "dpo": "kllm dpo --model runs/quickstart --data pairs.jsonl --preference.beta 0.1",
    "distill": "kllm distill --teacher runs/quickstart --student-from runs/quickstart --layers 3",
    "eval": "kllm eval runs/quickstart",
    "export": "kllm export runs/quickstart --gguf q8_0 --gguf q4_k_m",
}
_ABOUT = {
    "tokenizer": "Train a byte-level BPE tokenizer.",
    "pretrain": "Train a model on plain text; without --tokenizer one is trained on the same data first.",
    "sft": "Fine-tune a model on conversations; only the assistant's words are learned.",
    "lora": "Fine-tune an adapter (LoRA) on conversations; the weights stay: sft with lora.rank.",
    "dpo": "Learn from preferences: pairs, single ratings (--loss kto), own answers (--online).",
    "distill": "Teach a smaller model what a larger one knows, by its probabilities or by its answers.",
    "eval": "Measure a model.",
    "export": "Write a model for other programs: a Hugging Face folder and GGUF files, each checked.",
}


def _build(kind: str) -> Callable[..., Any]:
    flags = options.stage_flags(kind)

    def command(**values: Any) -> int:
        return _run(kind, flags, values)

    extras = [options.RECIPE_FLAG, options.STAGE_FLAG, options.OUT_FLAG]
    parameters = [options.extra_parameter(extra) for extra in extras]
    if kind in ("eval", "export"):
        verb = "measure" if kind == "eval" else "write"
        text = f"The model to {verb}, the same as --model."
        what = typer.Argument(help=text, metavar="[MODEL]", show_default=False)
        parameters.append(options.extra_parameter(("given_model", Annotated[str | None, what], None)))
    parameters += options.flag_parameters(flags)
    parameters += [options.extra_parameter(extra) for extra in options.RUN_FLAGS]
    command.__doc__ = f"{_ABOUT[kind]}\n\nExample: {_EXAMPLES[kind]}"
    return options.with_signature(command, parameters)


def build_tokenizer() -> Callable[..., Any]:
    """The callback of `kllm tokenizer train`."""
    return _build("tokenizer")


def build_pretrain() -> Callable[..., Any]:
    """The callback of `kllm pretrain`."""
    return _build("pretrain")


def build_sft() -> Callable[..., Any]:
    """The callback of `kllm sft`."""
    return _build("sft")


def build_lora() -> Callable[..., Any]:
    """The callback of `kllm lora`."""
    return _build("lora")


def build_dpo() -> Callable[..., Any]:
    """The callback of `kllm dpo`."""
    return _build("dpo")


def build_distill() -> Callable[..., Any]:
    """The callback of `kllm distill`."""
    return _build("distill")


def build_eval() -> Callable[..., Any]:
    """The callback of `kllm eval`."""
    return _build("eval")


def build_export() -> Callable[..., Any]:
    """The callback of `kllm export`."""
    return _build("export")


def _run(kind: str, flags: list[options.Flag], values: dict[str, Any]) -> int:
    if values.get("given_model") is not None:
        if values.get("model") is not None:
            raise UserError("the model is given twice", where="MODEL and --model")
        values["model"] = values["given_model"]
    loaded = load_stage(kind, flags, values)
    from kllm.run.pipeline import run_stage

    out = values.get("out")
    return run_stage(
        loaded,
        str(loaded.stage),
        out=None if out is None else Path(out),
        dry_run=values["dry_run"],
        fresh=values["fresh"],
        reporter_mode=options.reporter_mode(values),
    )


def load_stage(kind: str, flags: list[options.Flag], values: dict[str, Any]) -> Loaded:
    """The recipe that a single command stands for: a file's, or one made from its flags."""
    from kllm.config.load import load_recipe, make_recipe

    overrides = [*as_overrides(values.get("set")), *options.overrides_of(flags, values)]
    recipe, stage = values.get("recipe"), values.get("stage")
    if recipe is not None:
        return load_recipe(recipe, overrides, stage=stage, kind=kind)
    if stage is not None:
        raise UserError("--stage chooses a stage of a recipe, and no --recipe is given")
    given = {override.key: override.value for override in overrides}
    _needs_a_model(kind, given)
    fresh = not {"tokenizer", "tokenizer.path", "model.path"} & given.keys()
    name = _name(values.get("out"), kind, given)
    return make_recipe(kind, overrides, name=name, tokenizer_first=kind == "pretrain" and fresh)


def _needs_a_model(kind: str, given: dict[str, Any]) -> None:
    starts = {"model.path", "model.preset", *(["student_from"] if kind == "distill" else [])}
    if kind not in ("tokenizer", "pretrain") and not starts & given.keys():
        hint = "--model RUN, FOLDER or HUB ID, or --recipe FILE; e.g. " + _EXAMPLES[kind]
        raise UserError(f"kllm {kind} needs a model to start from", hint=hint)
    if (
        kind in ("sft", "lora", "dpo")
        and "model.path" not in given
        and not {"tokenizer", "tokenizer.path"} & given.keys()
    ):
        raise UserError("a model with fresh weights needs a tokenizer", hint="--tokenizer FOLDER or HUB ID")


def _name(out: str | None, kind: str, given: dict[str, Any]) -> str:
    """Name of a single command's run: the folder asked for, else what is done to which model."""
    if out is not None:
        text = Path(out).resolve().name
    else:
        model = given.get("model.path") or given.get("student_from") or given.get("model.preset")
        text = f"{kind}-{Path(str(model)).name}" if model else kind
    return re.sub(r"[^\w.\-]+", "-", text).strip("-_.") or kind
