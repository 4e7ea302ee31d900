"""Where the shipped recipes are: beside the package in a clone, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from kllm.config.hints import nearest
from kllm.errors import UserError


def recipes_dir() -> Path | None:
    """Folder of the shipped recipes, or None if this installation has none."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if any(folder.glob("*.yaml")):
            return folder
    return None


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by its name (`quickstart`; one in a subfolder as `folder/name`)."""
    root = recipes_dir()
    if root is None:
        return {}
    paths = sorted(root.rglob("*.yaml"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}


def shown_path(path: Path) -> str:
    """A path as errors and origins name it: short where it lies below the current folder."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def find_recipe(text: str | Path) -> Path:
    """A recipe by path, or by the name of a shipped one. Files win over names.

    Raises:
        UserError: neither, with the nearest shipped name.
    """
    path = Path(text)
    if path.exists():
        return path
    known = shipped_recipes()
    name = path.with_suffix("").as_posix().removeprefix("recipes/")
    if name in known:
        return known[name]
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else "`kllm recipe ls` lists the shipped ones"
    raise UserError("no such recipe file", where=str(text), hint=hint)
