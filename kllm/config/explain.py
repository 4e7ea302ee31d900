"""Pydantic's errors in the words of the person who wrote the recipe: where, which key, what, what instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from kllm.config.base import Section
from kllm.config.hints import kind_hint, nearest, unknown_key
from kllm.config.recipe import LINKS_ERROR, LinkError, Recipe
from kllm.config.schema import choices, find_field, plain_type, subsection
from kllm.config.stages import STAGES
from kllm.config.yamlfile import KeyPath
from kllm.errors import UserError

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list of two",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def show(value: Any) -> str:
    """A value as the user would write it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(path: KeyPath, data: Any) -> str:
    """The key as shown and as `--set` takes it: (stages, 1, optim, lr) is `pretrain.optim.lr`."""
    parts, prefix = list(path), ""
    if len(parts) >= 2 and parts[0] == "stages" and isinstance(parts[1], int):
        prefix, parts = stage_name(data, parts[1]), parts[2:]
    for part in parts:
        prefix += f"[{part}]" if isinstance(part, int) else f".{part}" if prefix else part
    return prefix


def _raw_stage(data: Any, index: int) -> Any:
    stages = data.get("stages") if isinstance(data, Mapping) else None
    return stages[index] if isinstance(stages, (list, tuple)) and index < len(stages) else None


def stage_name(data: Any, index: int) -> str:
    """Name of a stage of an unchecked recipe."""
    stage = _raw_stage(data, index)
    name = (stage.get("name") or stage.get("stage")) if isinstance(stage, Mapping) else None
    return str(name) if name else f"stages[{index}]"


def own_path(error: ErrorDetails) -> KeyPath:
    """Pydantic's location without the tag that the union of stages puts into it."""
    loc = error["loc"]
    return (*loc[:2], *loc[3:]) if len(loc) > 2 and loc[0] == "stages" else loc


def _context(path: KeyPath, data: Any) -> tuple[str | None, type[Section], tuple[str, ...]]:
    """(stage kind or None, its section, the part of `path` inside it)."""
    if len(path) >= 2 and path[0] == "stages" and isinstance(path[1], int):
        stage = _raw_stage(data, path[1])
        kind = stage.get("stage") if isinstance(stage, Mapping) else None
        if kind in STAGES:
            return kind, STAGES[kind], tuple(str(p) for p in path[2:])
    return None, Recipe, tuple(str(p) for p in path)


def _unknown(path: KeyPath, data: Any) -> str:
    kind, section, inside = _context(path, data)
    prefix, key = inside[:-1], inside[-1]
    field = find_field(section, prefix) if prefix else None
    if prefix and field is None:  # inside a list item such as data[0]
        from kllm.config.parts import DataSource

        return unknown_key(kind, DataSource, prefix, key)
    inner = subsection(field) if field is not None else None
    return unknown_key(kind, inner or section, prefix, key)


def _literal(path: KeyPath, data: Any, value: Any) -> str:
    _, section, inside = _context(path, data)
    names = tuple(part for part in inside if not part.isdigit())
    field = find_field(section, names)
    kind = plain_type(field.annotation) if field is not None else None
    known = choices(kind)
    if not known and kind is not None and getattr(kind, "__args__", None):
        known = choices(kind.__args__[0])
    near = nearest(str(value), known) if isinstance(value, str) else None
    end = f"; did you mean {near}?" if near else ""
    return f"must be one of {', '.join(known)}, got {show(value)}{end}"


def message_of(error: ErrorDetails, path: KeyPath, data: Any) -> str:
    """One sentence for one pydantic error."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, data)
    if kind == "missing":
        return "is missing"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {context[key]:g}, got {show(value)}"
    if kind in _EXPECTED:
        advice = " (put it in quotes)" if kind == "string_type" and isinstance(value, (int, float)) else ""
        return f"expected {_EXPECTED[kind]}, got {show(value)}{advice}"
    if kind == "literal_error":
        return _literal(path, data, value)
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    if kind == "union_tag_invalid":
        return f"unknown kind of stage {context['tag']!r}{kind_hint(str(context['tag']))}"
    if kind == "union_tag_not_found":
        return f"a stage must say its kind: stage: {' | '.join(STAGES)}"
    if kind == "string_pattern_mismatch":
        signs = "'_' and '-'" if path[0] == "stages" else "'.', '_' and '-'"
        return f"is used as a folder name: letters, digits, {signs} only, got {show(value)}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "too_long":
        return f"must have {context['max_length']} items, got {context['actual_length']}"
    return error["msg"]


def explain(errors: list[ErrorDetails], data: Any, places: Any) -> list[UserError]:
    """All errors of one validation. `places(path)` gives `file:line` or `flag --lr` for a key path."""
    found = []
    for error in errors:
        path = own_path(error)
        if error["type"] == LINKS_ERROR:
            continue  # reported by `link_errors`, each at its own key
        if error["type"] == "union_tag_invalid":
            path = (*path, "stage")
        message = message_of(error, path, data)
        if error["type"] == "missing" and path == ("stages",) and "stage" in data:
            message += ": put the stage into a list, stages: [{stage: ..., ...}]"
        found.append(_placed(path, message, None, data, places))
    return found


def explain_links(errors: list[LinkError], data: Any, places: Any) -> list[UserError]:
    """The same for wrong names and inputs of stages."""
    return [_placed(e.loc, e.message, e.hint, data, places) for e in errors]


def _placed(path: KeyPath, message: str, hint: str | None, data: Any, places: Any) -> UserError:
    where = ": ".join(part for part in (places(path), dotted(path, data)) if part)
    return UserError(message, where=where or None, hint=hint)
