"""A checked recipe as YAML, as `load_recipe` reads it and as a person would write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from kllm.config.base import Section
from kllm.config.recipe import Recipe


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would read as a number, which PyYAML's own 1.1 rules leave bare."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", json.dumps(value))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # PyYAML writes some line separators bare, where they fold into a space when read; "..." escapes them
    style = '"' if _ODD.search(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_ODD = re.compile(r"[\x00-\x1f\x7f-\xa0\u2028\u2029\ufeff]")
_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_Dumper.add_representer(float, _float)


def inline(value: Any) -> str:
    """A value as it stands behind a colon: `0.0005`, `[a.jsonl, b.jsonl]`, `{path: a, weight: 0.3}`."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("...").strip()


def plain(value: Any) -> Any:
    """Plain data of an option's value; a source with weight 1 is just its path."""
    if isinstance(value, Section):
        data = value.model_dump(mode="json")
        return data["path"] if set(data) == {"path", "weight"} and data["weight"] == 1.0 else data
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def dump_yaml(recipe: Recipe, origins: Mapping[str, str] | None = None) -> str:
    """The recipe as YAML that reads back to an equal recipe.

    Args:
        recipe: a checked recipe.
        origins: where values came from, by dotted key (`Loaded.origins`); written as a comment on each line.
    """
    known = origins or {}
    top = [name for name in Recipe.model_fields if name != "stages"]
    lines = [line for key in top for line in _line(recipe, key, "", key, known)]
    lines.append("stages:")
    for stage in recipe.stages:
        block = _block(stage, "    ", f"{stage.name}.", known)
        lines += ["  - " + block[0].lstrip(), *block[1:]]
    return "\n".join(lines) + "\n"


def _line(section: Section, key: str, indent: str, dotted: str, origins: Mapping[str, str]) -> list[str]:
    value = getattr(section, key)
    if value is None:
        return []
    line = f"{indent}{inline(key)}: {inline(plain(value))}"
    return [f"{line:<56}  # {origins[dotted]}" if dotted in origins else line]


def _block(section: Section, indent: str, prefix: str, origins: Mapping[str, str]) -> list[str]:
    lines = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            inner = _block(value, indent + "  ", f"{prefix}{name}.", origins)
            lines += [f"{indent}{name}:", *inner] if inner else []
        else:
            lines += _line(section, name, indent, f"{prefix}{name}", origins)
    return lines
