"""JSON schema of recipes: what editors complete and check while a recipe is written.

It describes what may be written, not what comes out: `20M` where a number is meant, a bare path where a
source is meant. Both are added here, since pydantic's schema describes only the parsed side.
"""

from __future__ import annotations

from typing import Any

from kllm.config import parts, stages
from kllm.config.base import Section, field_docs
from kllm.config.recipe import Recipe

_AS_TEXT = {
    "integer": {"type": "string", "pattern": r"^[-+]?[0-9][0-9_]*(\.[0-9]+)?([eE][-+]?[0-9]+)? ?[A-Za-z]*$"},
    "number": {"type": "string", "pattern": r"^[-+]?[0-9.][0-9.]*([eE][-+]?[0-9]+)?$"},
}
_OR_PATH = ("DataSource", "TokenizerRef")
_SECTIONS: dict[str, type[Section]] = {
    name: kind
    for module in (parts, stages)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Section)
}
_DESCRIPTIVE = ("description", "title", "default")


def recipe_schema() -> dict[str, Any]:
    """The schema, in draft 2020-12."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    _describe(schema, Recipe)
    for name, definition in definitions.items():
        _describe(definition, _SECTIONS[name])
        _open(definition)
        if name in _OR_PATH:
            definitions[name] = {"anyOf": [{"type": "string"}, definition]}
    _open(schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "kllm recipe"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Recipe that this one changes, one level.",
    }
    return schema


def _describe(definition: dict[str, Any], section: type[Section]) -> None:
    for name, text in field_docs(section).items():
        if name in definition["properties"]:
            definition["properties"][name]["description"] = text


def _open(section: dict[str, Any]) -> None:
    """Allow the written forms of every property, and leave out what has a default in the loader."""
    for name, schema in section.get("properties", {}).items():
        section["properties"][name] = _written(schema)
    section["required"] = [name for name in section.get("required", []) if name != "name"]
    if "stage" in section.get("properties", {}):
        section["required"].append("stage")
    if not section["required"]:
        del section["required"]


def _written(schema: dict[str, Any]) -> dict[str, Any]:
    outer = {key: value for key, value in schema.items() if key in _DESCRIPTIVE}
    inner = {key: value for key, value in schema.items() if key not in _DESCRIPTIVE}
    if "anyOf" in inner:
        forms = [form for choice in inner.pop("anyOf") for form in _forms(choice)]
        return {**outer, **inner, "anyOf": forms}
    forms = _forms(inner)
    return {**outer, **inner} if len(forms) == 1 else {**outer, "anyOf": forms}


def _forms(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """All ways to write one value."""
    kind = schema.get("type")
    if kind in _AS_TEXT:
        return [schema, _AS_TEXT[kind]]
    if kind == "array" and "items" in schema:
        return [schema, schema["items"]]
    return [schema]
