"""A recipe that is still being put together: layers of plain data, and where each part came from.

Layers in rising order: the file that `extends:` names, the recipe, overrides (`--set` and flags). Nothing
is checked here; the whole is validated once, at the end, so that all errors come in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kllm.config.base import Section
from kllm.config.overrides import Override
from kllm.config.recipe import Recipe
from kllm.config.schema import choices, find_field, nullable, plain_type, subsection
from kllm.config.stages import STAGES
from kllm.config.yamlfile import KeyPath, Tree, parse_yaml, scalar
from kllm.errors import UserError

TOP_KEYS = ("name", "seed", "device", "nproc")


@dataclass
class Draft:
    """Plain data in the shape of a recipe, with the origin (`file:line`, `flag --lr`) of its parts."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Origin of the nearest enclosing part that has one; '' if none has."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ""

    def overlay(self, tree: Tree) -> None:
        """Put a file's data over this draft: mappings merge, stages merge by name, all else is replaced."""
        self.origins.setdefault((), tree.file)
        for key, value in tree.data.items():
            if key == "stages" and isinstance(value, list) and isinstance(self.data.get("stages"), list):
                for index, stage in enumerate(value):
                    self._overlay_stage(tree, index, stage)
            else:
                self._put((key,), value, tree, (key,), None)

    def _overlay_stage(self, tree: Tree, index: int, stage: Any) -> None:
        stages = self.data["stages"]
        target = len(stages)
        if isinstance(stage, Mapping):
            name = stage.get("name") or stage.get("stage")
            target = next((i for i, s in enumerate(stages) if _name(s) == name), target)
        if target == len(stages):
            stages.append({})
        section = STAGES.get(str(stage.get("stage"))) if isinstance(stage, Mapping) else None
        self._put(("stages", target), stage, tree, ("stages", index), section)

    def _put(
        self, path: KeyPath, value: Any, tree: Tree, source: KeyPath, section: type[Section] | None
    ) -> None:
        here = _at(self.data, path)
        if isinstance(here, dict) and isinstance(value, Mapping):
            self._drop_exclusive(path, here, value, section)
            self.origins.setdefault(path, tree.where(source))
            for key, inner in value.items():
                found = find_field(section, (key,)) if section else None
                self._put((*path, key), inner, tree, (*source, key), subsection(found) if found else None)
            return
        _assign(self.data, path, value)
        self._forget(path)
        for known, line in tree.lines.items():
            if known[: len(source)] == source:
                place = path + known[len(source) :]
                self.origins[place] = f"{tree.file}:{line}"

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]

    def _drop_exclusive(
        self, path: KeyPath, here: dict[str, Any], given: Iterable[str], section: type[Section] | None
    ) -> None:
        for group in section.exclusive if section else ():
            if any(key in group for key in given):
                for key in group:
                    if not self.origins.get((*path, key), "").startswith("flag"):  # two flags do contradict
                        here.pop(key, None)
                        self._forget((*path, key))

    def stages(self) -> list[tuple[int, str, str]]:
        """(index, kind, name) of every stage that says its kind."""
        stages = self.data.get("stages")
        listed = stages if isinstance(stages, list) else []
        return [
            (i, str(s["stage"]), str(_name(s)))
            for i, s in enumerate(listed)
            if isinstance(s, dict) and s.get("stage") in STAGES
        ]

    def override(self, item: Override, target: str | None) -> None:
        """Apply one override. Keys are relative to the stage `target` if it has them; else they name a stage.

        Raises:
            UserError: the key names no stage and there is no target.
        """
        parts = tuple(item.key.split("."))
        if parts[0] in TOP_KEYS and len(parts) == 1:
            field_of = Recipe.model_fields[parts[0]]
            self._set(parts, _typed(item.value, field_of, exact=True), item.origin)
            return
        stages = self.stages()
        by_name = {name: (index, kind) for index, kind, name in stages}
        if target is None and len(stages) == 1:
            target = stages[0][2]
        if target is not None:
            index, kind = by_name[target]
            if _knows(kind, parts) or parts[0] not in by_name or len(parts) == 1:
                self._set_in_stage(index, kind, parts, item)
                return
        if parts[0] not in by_name or len(parts) == 1:
            raise _no_stage(item, list(by_name))
        index, kind = by_name[parts[0]]
        self._set_in_stage(index, kind, parts[1:], item)

    def _set_in_stage(self, index: int, kind: str, parts: tuple[str, ...], item: Override) -> None:
        base: KeyPath = ("stages", index)
        found = find_field(STAGES[kind], parts)
        owner = find_field(STAGES[kind], parts[:-1]) if len(parts) > 1 else None
        section = subsection(owner) if owner is not None else STAGES[kind] if len(parts) == 1 else None
        holder = _at(self.data, (*base, *parts[:-1]))
        if isinstance(holder, str) and section is not None:  # `tokenizer: PATH` stands for {path: PATH}
            origin = self.place((*base, *parts[:-1]))
            _assign(self.data, (*base, *parts[:-1]), {"path": holder})
            inner: KeyPath = (*base, *parts[:-1], "path")
            self.origins[inner] = origin
            holder = _at(self.data, (*base, *parts[:-1]))
        if isinstance(holder, dict):
            self._drop_exclusive((*base, *parts[:-1]), holder, [parts[-1]], section)
        value = _typed(item.value, found, exact=found is not None)
        self._set((*base, *parts), value, item.origin)

    def _set(self, path: KeyPath, value: Any, origin: str) -> None:
        _assign(self.data, path, value)
        self._forget(path)
        self.origins[path] = origin


def _name(stage: Any) -> Any:
    return (stage.get("name") or stage.get("stage")) if isinstance(stage, Mapping) else None


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(data, dict):
            data = data.get(str(part))
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def _assign(data: Any, path: KeyPath, value: Any) -> None:
    """Set a value, making the mappings on the way; what is no mapping there gives way."""
    for part in path[:-1]:
        if isinstance(part, int):
            data = data[part]
            continue
        if not isinstance(data.get(part), (dict, list)):
            data[part] = {}
        data = data[part]
    data[path[-1]] = value


def _knows(kind: str, parts: tuple[str, ...]) -> bool:
    """Does the stage kind have this option, or is it a key inside one of its dict options?"""
    if find_field(STAGES[kind], parts):
        return True
    owner = find_field(STAGES[kind], parts[:-1]) if len(parts) > 1 else None
    return owner is not None and getattr(plain_type(owner.annotation), "__origin__", None) is dict


def _typed(value: Any, found: Any, exact: bool) -> Any:
    """Text from the command line as data: flow lists and mappings are parsed, the schema types the rest."""
    if not isinstance(value, str):
        return value
    if not exact:
        return scalar(value)
    kind = plain_type(found.annotation)
    if value in ("null", "~") and nullable(found):
        return None
    nested = getattr(kind, "__origin__", None) in (list, dict, tuple) or subsection(found) is not None
    if nested and not choices(kind) and value[:1] in ("[", "{"):
        try:
            return parse_yaml(value, "flag --set").data
        except UserError:
            return value
    return value


def _no_stage(item: Override, names: list[str]) -> UserError:
    parts = item.key.split(".")
    owners = [name for name in names if name in STAGES and find_field(STAGES[name], tuple(parts))]
    hint = f"write {' or '.join(f'{name}.{item.key}' for name in owners or names[:3])}"
    return UserError(f"{item.key}: no stage is called {parts[0]!r}", where=item.origin, hint=hint)
