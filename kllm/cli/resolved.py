"""A resolved recipe on paper: every value, where it came from, and what a preset stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kllm.config.dump import inline, plain
from kllm.config.load import DEFAULT, Loaded, recipe_leaves
from kllm.config.parts import ModelSection
from kllm.errors import UserError
from kllm.model.presets import PRESETS, get_preset
from kllm.run.shapes import fresh_shape


def _preset_values(loaded: Loaded) -> dict[str, tuple[Any, str]]:
    """For every shape option that a recipe leaves to its preset: (value, `preset NAME`)."""
    values: dict[str, tuple[Any, str]] = {}
    for stage in loaded.recipe.stages:
        section = getattr(stage, "model", None)
        if not isinstance(section, ModelSection) or section.preset not in PRESETS:
            continue
        shape = get_preset(section.preset).to_dict()
        for name in ModelSection.model_fields:
            if getattr(section, name) is None and shape.get(name) is not None:
                values[f"{stage.name}.model.{name}"] = (shape[name], f"preset {section.preset}")
    return values


def resolved_rows(loaded: Loaded, changed: bool = False) -> list[tuple[str, Any, str]]:
    """(dotted key, value, origin) of every option that has a value."""
    presets = _preset_values(loaded)
    rows = []
    for key, value in recipe_leaves(loaded.recipe):
        origin = loaded.origins[key]
        if key in presets:
            value, origin = presets[key]
        if value is None or (changed and (origin == DEFAULT or key in presets)):
            continue
        rows.append((key, plain(value), origin))
    return rows


def resolved_json(loaded: Loaded, changed: bool = False) -> dict[str, Any]:
    """`{"pretrain.optim.lr": {"value": 0.0005, "origin": "recipes/small.yaml:31"}, ...}`."""
    return {key: {"value": value, "origin": origin} for key, value, origin in resolved_rows(loaded, changed)}


def resolved_text(loaded: Loaded, changed: bool = False) -> str:
    """`pretrain.optim.lr = 0.0005   recipes/small.yaml:31`, one option a line, stages apart."""
    rows = [(key, inline(value), origin) for key, value, origin in resolved_rows(loaded, changed)]
    left = min(44, max((len(key) for key, _, _ in rows), default=0))
    middle = min(36, max((len(value) for _, value, _ in rows), default=0))
    lines, stage = [], ""
    for key, value, origin in rows:
        head = key.split(".")[0] if "." in key else ""
        if head != stage:
            lines.append("")
            stage = head
        lines.append(f"{key:<{left}} = {value:<{middle}}  {origin}".rstrip())
    return "\n".join(lines) + "\n"


def preset_errors(loaded: Loaded) -> Iterator[UserError]:
    """Presets that do not exist, and shapes that no engine could load."""
    for stage in loaded.recipe.stages:
        section = getattr(stage, "model", None)
        if not isinstance(section, ModelSection) or section.preset is None:
            continue
        key = f"{stage.name}.model.preset"
        where = f"{loaded.origins.get(key, DEFAULT)}: {key}"
        try:
            fresh_shape(section, get_preset(section.preset).vocab_size)
        except UserError as error:
            yield UserError(error.message, where=where, hint=error.hint)
