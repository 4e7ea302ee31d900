"""`--smoke`: one rule that shrinks every size, so that each recipe runs in a minute on a CPU.

The rule:

- a tokenizer has 600 tokens, learned from at most 256 KiB;
- a fresh model keeps its style but has 2 layers, width 64, 4 heads (2 for keys and values) of 16, an MLP
  of 128, and at most 4 experts of 96, 2 per token, 1 shared;
- a model from outside the recipe (a folder or a hub id) is replaced by a tiny one, trained for 6 steps in
  a stage put in front; so is its tokenizer, unless that is a local folder of its own;
- training takes 6 steps of 1024 tokens in rows of at most 512, saves and evaluates every 3, on at most
  256 KiB of each source, bad rows tolerated, without compilation; an adapter has rank 4;
- answers that are sampled on the way have 8 tokens; an endpoint is asked 8 prompts and is a model of this
  recipe where it was an URL;
- evaluation asks 4 questions and reads 8 tokens of each answer; an export writes all its files;
- data that is not on this machine is replaced by the built-in world's; extra sinks are left out.

The names and the order of stages, the objective, the optimiser and the schedule stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kllm.config.load import Loaded, dump_yaml, recipe_leaves
from kllm.config.parts import ModelSection
from kllm.config.recipe import REFERENCE, Recipe
from kllm.data.hub import is_hub_id
from kllm.data.sources import expand, is_builtin
from kllm.errors import UserError
from kllm.eval.names import EXAMPLES
from kllm.model.presets import get_preset
from kllm.run.shapes import DEFAULT_PRESET

STEPS = 6
TEXT_BYTES = 256 * 1024
TOKENIZER = "smoke-tokenizer"
MODEL = "smoke-model"
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def shrink(loaded: Loaded) -> Loaded:
    """The recipe at smoke size; the origin of every changed value is `--smoke`."""
    recipe = loaded.recipe
    stages = [_shrunk(stage.model_dump()) for stage in recipe.stages]
    outside_model = [s for s in stages if _take_inside(s)]
    for stage in outside_model:
        if stage["stage"] not in ("eval", "export") and not (stage.get("tokenizer") or {}).get("path"):
            stage["tokenizer"] = {"path": REFERENCE + MODEL}
    outside_tokenizer = [s for s in stages if _outside(s.get("tokenizer"))]
    for stage in outside_tokenizer:
        if not Path(stage["tokenizer"]["path"]).exists():
            stage["tokenizer"] = {"path": REFERENCE + TOKENIZER}
    front: list[dict[str, Any]] = []
    if outside_model or outside_tokenizer:
        front.append(_shrunk({"stage": "tokenizer", "name": TOKENIZER}))
    if outside_model:
        front.append(_shrunk({"stage": "pretrain", "name": MODEL, "tokenizer": REFERENCE + TOKENIZER}))
    data = {**recipe.model_dump(), "nproc": min(recipe.nproc, 2), "stages": [*front, *stages]}
    small = Recipe.model_validate(_without_none(data))
    origins = _origins(loaded, small)
    return replace(loaded, recipe=small, origins=origins, text=dump_yaml(small, origins))


def _take_inside(stage: dict[str, Any]) -> bool:
    """Replaces the models from outside that a stage names by the recipe's own; whether there were any."""
    found = False
    for key in ("model", "teacher"):
        if _outside(stage.get(key)):
            stage[key], found = {"path": REFERENCE + MODEL}, True
    for key in ("student_from", "from_endpoint"):
        if _outside(stage.get(key)):
            stage[key], found = REFERENCE + MODEL, True
    return found


def _outside(section: Any) -> bool:
    """The section names a model or tokenizer that no stage of the recipe makes."""
    path = section.get("path") if isinstance(section, Mapping) else section
    return bool(path) and not str(path).startswith(REFERENCE)


def _shrunk(stage: dict[str, Any]) -> dict[str, Any]:
    kind = stage["stage"]
    if kind == "eval":
        tasks = list(dict.fromkeys(_here_task(t) for t in stage["tasks"]))
        return {**stage, "tasks": tasks, "limit": 4, "max_new_tokens": 8, "batch_size": 4}
    if kind == "export":
        return {**stage, "calibrate": None}
    split = {"tokenizer": "pretrain", "pretrain": "pretrain", "dpo": "preference"}.get(kind, "sft")
    sources = stage.get("data") or [{"path": f"builtin:world/{split}"}]
    stage = {**stage, "data": [_here(source, split) for source in sources]}
    if kind == "tokenizer":
        return {**stage, "vocab_size": 600, "max_bytes": TEXT_BYTES}
    return {
        **stage,
        "model": _tiny(stage.get("model") or {}, kind, stage.get("student_from")),
        "dataset": _tiny_dataset(stage.get("dataset") or {}, split),
        "train": _tiny_training(stage.get("train") or {}),
        "log": {},
        **_tiny_alignment(stage),
    }


def _tiny_alignment(stage: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    if lora := stage.get("lora"):
        small["lora"] = {**lora, "rank": min(lora.get("rank") or 0, 4)}
    if rollout := stage.get("rollout"):
        prompts = [_here(source, "rl") for source in rollout.get("prompts") or []]
        small["rollout"] = {**rollout, "prompts": prompts, "samples": 2, "max_tokens": 8, "refresh_every": 2}
    if stage.get("prompts"):
        small["prompts"] = [p if _exists(p) else "builtin:world/rl" for p in stage["prompts"]]
    if collect := stage.get("collect"):
        small["collect"] = {
            **collect,
            "limit": 8,
            "max_tokens": 8,
            "parallel": 4,
            "model": None,
            "require": [],
        }
        small["collect"] |= {"check_answer": False, "min_chars": 0, "duplicates": 1.0, "language": "any"}
        small["collect"] |= {"max_repetition": 1.0, "refusals": False}
    return small


def _tiny(model: dict[str, Any], kind: str, student_from: str | None) -> dict[str, Any]:
    if student_from:
        return {"num_hidden_layers": 1}
    if model.get("path") or (kind != "pretrain" and not model.get("preset")):
        return model
    preset = model.get("preset") or DEFAULT_PRESET
    try:
        shape = get_preset(preset)
    except UserError:
        return model  # the checks will say so
    experts = model.get("num_experts")
    small = {**model, **_SHAPE, "preset": preset}
    if experts or (experts is None and shape.is_moe):
        given = ModelSection.model_validate(_without_none(model))
        small |= {
            "num_experts": min(experts or shape.num_experts, 4),
            "num_experts_per_tok": min(given.num_experts_per_tok or shape.num_experts_per_tok or 2, 2),
            "moe_intermediate_size": 96,
        }
        if (given.num_shared_experts or shape.num_shared_experts) and given.num_shared_experts != 0:
            small["num_shared_experts"] = 1
    return small


def _tiny_dataset(dataset: dict[str, Any], split: str) -> dict[str, Any]:
    return {
        **dataset,
        "seq_len": min(dataset.get("seq_len", 512), 512),
        "val_fraction": max(dataset.get("val_fraction", 0.05), 0.05),
        "val_data": [_here(source, split) for source in dataset.get("val_data", [])],
        "max_bytes": min(dataset.get("max_bytes") or TEXT_BYTES, TEXT_BYTES),
        "max_bad_rows": 10**9,
        "cache_dir": None,
    }


def _tiny_training(train: dict[str, Any]) -> dict[str, Any]:
    return {
        **train,
        "steps": STEPS,
        "tokens": None,
        "epochs": None,
        "batch_tokens": 1024,
        "micro_batch_tokens": 512,
        "save_every": 3,
        "eval_every": 3,
        "eval_tokens": 1024,
        "log_every": 1,
        "sample_every": STEPS if train.get("sample_every") else 0,
        "compile": "off",
    }


def _here(source: Any, split: str) -> dict[str, Any]:
    """The source if it is on this machine, else the built-in one."""
    data = dict(source) if isinstance(source, Mapping) else {"path": source}
    return data if _exists(data["path"]) else {**data, "path": f"builtin:world/{split}"}


def _here_task(task: str) -> str:
    kind, _, file = task.partition(":")
    return task if not file or kind == "builtin" or _exists(file) else EXAMPLES.get(kind, "builtin:world")


def _exists(path: str) -> bool:
    if is_builtin(path):
        return True
    if is_hub_id(path) and not Path(path).exists():
        return False
    try:
        return bool(expand(path))
    except UserError:
        return False


def _without_none(value: Any) -> Any:
    """Plain data without unset keys: what `null` means differs from key to key."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value


def _origins(loaded: Loaded, small: Recipe) -> dict[str, str]:
    before = dict(recipe_leaves(loaded.recipe))
    return {
        key: loaded.origins.get(key, "default") if key in before and before[key] == value else "--smoke"
        for key, value in recipe_leaves(small)
    }
