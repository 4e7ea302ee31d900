"""From a recipe file and flags to a checked `Recipe`, with the origin of every value.

`load_recipe` reads a file; `make_recipe` builds the recipe of a single command. Both go through one
draft and one validation, so that `--set`, a flag and a line of YAML cannot differ in meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kllm.config.base import Section
from kllm.config.draft import Draft
from kllm.config.dump import dump_yaml
from kllm.config.explain import explain, explain_links
from kllm.config.hints import with_article
from kllm.config.overrides import Override, as_overrides
from kllm.config.recipe import Recipe, link_errors, raw_links
from kllm.config.shipped import find_recipe, shown_path
from kllm.config.yamlfile import KeyPath, Tree, parse_yaml, read_text
from kllm.errors import UserError, UserErrors

__all__ = ["Loaded", "Override", "dump_yaml", "load_recipe", "make_recipe", "recipe_leaves"]

DEFAULT = "default"

Overrides = Mapping[str, Any] | Sequence[str | Override] | None


@dataclass(frozen=True)
class Loaded:
    """A checked recipe and what is known about how it came to be."""

    recipe: Recipe
    origins: dict[str, str]
    """For every option by its dotted key (`pretrain.optim.lr`): `file:line`, `flag --lr` or `default`."""
    text: str
    """The recipe file as given; for a single command, the recipe that it stands for."""
    path: Path | None = None
    stage: str | None = None
    """The stage that a single command was asked to run."""
    overrides: tuple[Override, ...] = field(default=())


def load_recipe(
    path: str | Path, overrides: Overrides = None, *, stage: str | None = None, kind: str | None = None
) -> Loaded:
    """Read, merge and check a recipe.

    Args:
        path: a YAML file or the name of a shipped recipe.
        overrides: `a.b=c` texts, a mapping, or `Override`s; keys start with a stage's name, or are relative
            to the stage chosen by `stage` or `kind`.
        stage: name of the stage that a single command runs.
        kind: or the kind of it, if only one stage is of that kind.

    Raises:
        UserError: unreadable, not YAML, or no such stage.
        UserErrors: all mistakes of the recipe and the overrides.
    """
    file = find_recipe(path)
    shown = str(path) if Path(path) == file else shown_path(file)
    text = read_text(file, shown)
    draft, errors = _read_layers(file, text, shown)
    if "name" not in draft.data:
        draft.data["name"] = re.sub(r"[^\w.\-]+", "-", file.stem).strip("-_.") or "recipe"
        draft.origins[("name",)] = "file name"
    target = _target(draft, stage, kind, shown)
    given = as_overrides(overrides)
    for item in given:
        try:
            draft.override(item, target)
        except UserError as error:
            errors.append(error)
    recipe, origins = check(draft, errors)
    return Loaded(recipe, origins, text, file, target, tuple(given))


def make_recipe(
    kind: str, overrides: Overrides = None, *, name: str | None = None, tokenizer_first: bool = False
) -> Loaded:
    """The recipe of a single command: one stage, after a tokenizer stage on the same data if asked for.

    Raises:
        UserErrors: all mistakes of the overrides.
    """
    stages: list[dict[str, Any]] = [{"stage": kind}]
    if tokenizer_first:
        stages.insert(0, {"stage": "tokenizer"})
    draft = Draft({"name": name or kind, "stages": stages})
    given = as_overrides(overrides)
    if tokenizer_first:
        given += [Override("tokenizer.data", o.value, o.origin) for o in given if o.key == "data"]
    errors: list[UserError] = []
    for item in given:
        try:
            draft.override(item, kind if item.key != "tokenizer.data" else None)
        except UserError as error:
            errors.append(error)
    recipe, origins = check(draft, errors)
    return Loaded(recipe, origins, dump_yaml(recipe), None, kind, tuple(given))


def _read_layers(file: Path, text: str, shown: str) -> tuple[Draft, list[UserError]]:
    draft, errors = Draft(), []
    tree = _mapping(parse_yaml(text, shown))
    errors += tree.errors
    base = tree.data.pop("extends", None)
    if base is not None:
        try:
            under = _base_layer(file, base, tree.where(("extends",)))
            errors += under.errors
            draft.overlay(under)
        except UserErrors as found:
            errors += found.errors
        except UserError as found:
            errors.append(found)
    draft.origins.pop((), None)
    draft.overlay(tree)
    return draft, errors


def _base_layer(file: Path, base: Any, where: str) -> Tree:
    if not isinstance(base, str):
        raise UserError("extends: expected one path", where=where)
    beside = file.parent / base
    try:
        path = beside if beside.exists() else find_recipe(base)
    except UserError as error:
        raise UserError(f"extends: no such recipe {base!r}", where=where, hint=error.hint) from None
    shown = shown_path(path)
    tree = _mapping(parse_yaml(read_text(path, shown), shown))
    if "extends" in tree.data:
        raise UserError(f"extends: {base} extends another recipe itself; one level is allowed", where=where)
    tree.data.pop("name", None)
    return tree


def _mapping(tree: Tree) -> Tree:
    if tree.data is None:
        raise UserError("is empty", where=tree.file, hint="a recipe has name: and stages:")
    if not isinstance(tree.data, dict):
        raise UserError("a recipe is a mapping with name: and stages:", where=tree.where(()))
    return tree


def _target(draft: Draft, stage: str | None, kind: str | None, shown: str) -> str | None:
    """Name of the stage that a single command means."""
    stages = draft.stages()
    if stage is not None:
        chosen = next(((k, n) for _, k, n in stages if n == stage), None)
        if chosen is None:
            known = ", ".join(n for _, k, n in stages if kind in (None, k)) or "none"
            raise UserError(f"has no stage {stage!r}", where=shown, hint=f"there: {known}")
        if kind is not None and chosen[0] != kind:
            raise UserError(f"stage {stage!r} is {with_article(chosen[0])} stage, not {kind}", where=shown)
        return stage
    if kind is None:
        return None
    names = [n for _, k, n in stages if k == kind]
    if not names:
        has = ", ".join(n for _, _, n in stages) or "none"
        raise UserError(f"has no {kind} stage", where=shown, hint=f"its stages: {has}")
    if len(names) > 1:
        hint = f"choose: --stage {'|'.join(names)}"
        raise UserError(f"has {len(names)} {kind} stages", where=shown, hint=hint)
    return names[0]


def check(draft: Draft, errors: Sequence[UserError] = ()) -> tuple[Recipe, dict[str, str]]:
    """Validate a draft.

    Raises:
        UserErrors: `errors` and all that is wrong with the draft, in the order of their lines.
    """
    found = list(errors)
    recipe = None
    try:
        recipe = Recipe.model_validate(draft.data)
    except ValidationError as failure:
        found += explain(failure.errors(), draft.data, draft.place)
    links = raw_links(draft.data.get("stages"))
    found += explain_links(link_errors(links), draft.data, draft.place)
    if found or recipe is None:
        raise UserErrors(sorted(found, key=_by_line))
    return recipe, _origins(recipe, draft)


def _by_line(error: UserError) -> tuple[str, int]:
    match = re.match(r"(.*?):(\d+)(?::|$)", error.where or "")
    return (match.group(1), int(match.group(2))) if match else ("", 0)


def _leaf_values(section: Section, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _leaf_values(value, (*path, name))
        else:
            yield (*path, name), value


def recipe_leaves(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every option of a checked recipe as (`pretrain.optim.lr`, value), in the order of the schema."""
    for key, _, value in _walk(recipe):
        yield key, value


def _walk(recipe: Recipe) -> Iterator[tuple[str, KeyPath, Any]]:
    for (name, *_), value in _leaf_values(recipe, ()):
        if name != "stages":
            yield str(name), (name,), value
    for index, stage in enumerate(recipe.stages):
        for path, value in _leaf_values(stage, ()):
            yield ".".join((stage.name, *map(str, path))), ("stages", index, *path), value


def _origins(recipe: Recipe, draft: Draft) -> dict[str, str]:
    return {key: _origin(path, value, draft) for key, path, value in _walk(recipe)}


def _origin(path: KeyPath, value: Any, draft: Draft) -> str:
    data: Any = draft.data
    for depth, part in enumerate(path):
        if isinstance(data, str) and part == "path":  # `tokenizer: PATH` stands for {path: PATH}
            return draft.place(path[:depth])
        if isinstance(data, dict) and str(part) in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part]
        else:
            return DEFAULT
    if (
        data is None and value is not None
    ):  # a null that the schema replaced (epochs: null) is a default after all
        return DEFAULT
    if path not in draft.origins:  # a mapping of which only single keys were given
        inside = {origin: None for known, origin in draft.origins.items() if known[: len(path)] == path}
        if inside:
            return ", ".join(inside)
    return draft.place(path) or DEFAULT
