"""A walk over the schema: every option as a dotted path with its type, help and default.

Flags, hints and override keys all come from this walk, so that none of them can know an option that
the others do not.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kllm.config.base import Section, field_docs
from kllm.config.stages import STAGES


@dataclass(frozen=True)
class Leaf:
    """One option. `path` is its dotted key inside the section walked."""

    path: tuple[str, ...]
    type: Any
    """The type without None and Annotated: int, str, bool, a Literal, list[...], dict[...] and so on."""
    help: str
    default: Any
    """Its default, None where there is none or where it is made from other fields."""
    section: type[Section]

    @property
    def key(self) -> str:
        return ".".join(self.path)


def plain_type(annotation: Any) -> Any:
    """`annotation` without `Annotated` and without `| None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return plain_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        if len(members) == 1:
            return plain_type(members[0])
    return annotation


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section that a field nests, or None for an option."""
    kind = plain_type(field.annotation)
    # inspect.isclass would not do: on Python 3.10 list[str] passes for a class
    is_class = typing.get_origin(kind) is None and isinstance(kind, type)
    return kind if is_class and issubclass(kind, Section) else None


def nullable(field: FieldInfo) -> bool:
    """May the field be null?"""
    return type(None) in typing.get_args(field.annotation)


def choices(kind: Any) -> tuple[str, ...]:
    """The allowed words of a Literal, else ()."""
    return tuple(str(arg) for arg in typing.get_args(kind)) if typing.get_origin(kind) is Literal else ()


def _default(field: FieldInfo) -> Any:
    if field.default_factory is not None:
        return field.get_default(call_default_factory=True)
    return None if field.default is PydanticUndefined else field.default


def leaves(section: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every option of a section and of the sections inside it, in the order of declaration."""
    docs = field_docs(section)
    for name, field in section.model_fields.items():
        inner = subsection(field)
        if inner is not None:
            yield from leaves(inner, (*prefix, name))
            continue
        kind = plain_type(field.annotation)
        yield Leaf((*prefix, name), kind, docs.get(name, ""), _default(field), section)


def find_field(section: type[Section], path: tuple[str, ...]) -> FieldInfo | None:
    """The field at a dotted path (a section or an option), or None; keys inside a dict do not count."""
    field: FieldInfo | None = None
    where: type[Section] | None = section
    for part in path:
        if where is None or part not in where.model_fields:
            return None
        field = where.model_fields[part]
        where = subsection(field)
    return field


@cache
def paths_ending_in(kind: str, name: str) -> tuple[str, ...]:
    """Dotted keys of a stage kind whose last part is `name`: (pretrain, lr) -> (optim.lr,)."""
    return tuple(leaf.key for leaf in leaves(STAGES[kind]) if leaf.path[-1] == name)
