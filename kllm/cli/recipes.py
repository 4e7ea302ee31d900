"""`kllm recipe ls|show|cp|check|schema`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kllm.config.overrides import as_overrides
from kllm.errors import KllmError, UserError, UserErrors

_JSON = Annotated[bool, typer.Option("--json", help="JSON on stdout, for scripts.")]
_SET = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set an option; repeat for several.")
]


def title_of(text: str) -> str:
    """The first sentence of a recipe's header comment."""
    words: list[str] = []
    for line in text.splitlines():
        if line.startswith("# yaml-language-server"):
            continue
        if not line.startswith("#") or (words and not line.strip("# ")):
            break
        words.append(line.lstrip("# ").strip())
    return re.split(r"(?<=\.)\s", " ".join(words), maxsplit=1)[0].rstrip(".")


def build_ls() -> Callable[..., Any]:
    """The callback of `kllm recipe ls`."""

    def command(as_json: _JSON = False) -> None:
        """List the shipped recipes.

        Run one with `kllm run --recipe NAME`; copy it to edit it with `kllm recipe cp NAME`.
        """
        from kllm.config.load import load_recipe
        from kllm.config.shipped import shipped_recipes
        from kllm.observe.console import make_reporter

        found = []
        for name, path in shipped_recipes().items():
            loaded = load_recipe(path)
            stages = [stage.name for stage in loaded.recipe.stages]
            found.append({"name": name, "stages": stages, "title": title_of(loaded.text), "path": str(path)})
        if as_json:
            typer.echo(json.dumps(found, ensure_ascii=False))
            return
        rows = [(r["name"], " ".join(r["stages"]), r["title"]) for r in found]
        make_reporter().table("", ("recipe", "stages", "about"), rows)

    return command


def build_show() -> Callable[..., Any]:
    """The callback of `kllm recipe show`."""

    def command(
        recipe: Annotated[
            str, typer.Argument(metavar="RECIPE", help="Recipe file or name of a shipped one.")
        ],
        sets: _SET = None,
        changed: Annotated[bool, typer.Option("--changed", help="Only what is not a default.")] = False,
        source: Annotated[bool, typer.Option("--source", help="The file itself, with its comments.")] = False,
        as_yaml: Annotated[
            bool, typer.Option("--yaml", help="As a recipe again, origins in comments.")
        ] = False,
        as_json: _JSON = False,
    ) -> None:
        """Print a recipe resolved: every option, its value, and where the value came from."""
        from kllm.cli.resolved import resolved_json, resolved_text
        from kllm.config.load import dump_yaml, load_recipe

        loaded = load_recipe(recipe, as_overrides(sets))
        if as_yaml:
            typer.echo(dump_yaml(loaded.recipe, loaded.origins), nl=False)
        elif source:
            typer.echo(loaded.text, nl=not loaded.text.endswith("\n"))
        elif as_json:
            typer.echo(json.dumps(resolved_json(loaded, changed), ensure_ascii=False))
        else:
            typer.echo(resolved_text(loaded, changed), nl=False)

    return command


def build_cp() -> Callable[..., Any]:
    """The callback of `kllm recipe cp`."""

    def command(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a file.")],
        target: Annotated[
            str | None, typer.Argument(metavar="[TO]", help="File or folder.", show_default=False)
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    ) -> None:
        """Copy a recipe to edit it."""
        from kllm.config.shipped import find_recipe
        from kllm.files import write_text

        source = find_recipe(recipe)
        path = Path(target) if target is not None else Path(source.name)
        if path.is_dir():
            path = path / source.name
        if path.exists() and not force:
            raise UserError("exists", where=str(path), hint="give another name, or --force")
        if not path.parent.is_dir():
            raise UserError("no such folder", where=str(path.parent))
        text = source.read_text(encoding="utf-8")
        schema = source.with_name("schema.json")
        if schema.exists():  # the editor must find it from the copy, too
            text = text.replace("$schema=schema.json", f"$schema={schema.resolve().as_posix()}")
        write_text(path, text)
        typer.echo(f"{path}: edit it, then `kllm run --recipe {path}`")

    return command


def build_check() -> Callable[..., Any]:
    """The callback of `kllm recipe check`."""

    def command(
        recipes: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[RECIPE]...", help="Files or folders; none = the shipped ones.", show_default=False
            ),
        ] = None,
        sets: _SET = None,
        as_json: _JSON = False,
    ) -> None:
        """Check recipes: keys, types, references between stages, presets; every mistake with its line."""
        paths = _recipe_paths(recipes)
        results = []
        for path in paths:
            errors = _check(path, as_overrides(sets))
            results.append({"recipe": path, "ok": not errors, "errors": [str(e) for e in errors]})
            if as_json:
                continue
            for error in errors:
                typer.echo(f"error: {error}", err=True)
            if not errors:
                typer.echo(f"{path}: ok")
        if as_json:
            typer.echo(json.dumps(results, ensure_ascii=False))
        if not all(result["ok"] for result in results):
            raise typer.Exit(2)

    return command


def _recipe_paths(given: list[str] | None) -> list[str]:
    from kllm.config.shipped import shipped_recipes

    if not given:
        return [str(path) for path in shipped_recipes().values()]
    paths: list[str] = []
    for text in given:
        if Path(text).is_dir():
            inside = sorted(str(p) for p in Path(text).rglob("*") if p.suffix in (".yaml", ".yml"))
            if not inside:
                raise UserError("holds no recipe (*.yaml)", where=text)
            paths += inside
        else:
            paths.append(text)
    return paths


def _check(path: str, overrides: Any) -> list[KllmError]:
    from kllm.cli.resolved import preset_errors
    from kllm.config.load import load_recipe

    try:
        return list(preset_errors(load_recipe(path, overrides)))
    except UserErrors as error:
        return list(error.errors)
    except UserError as error:
        return [error]


def build_schema() -> Callable[..., Any]:
    """The callback of `kllm recipe schema`."""

    def command(
        out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write it to a file.")] = None,
    ) -> None:
        """Print the JSON schema of recipes, with which editors complete and check them.

        A recipe names it in its first line: `# yaml-language-server: $schema=schema.json`.
        """
        from kllm.config.jsonschema import recipe_schema
        from kllm.files import write_text

        text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
        if out is None:
            typer.echo(text, nl=False)
        else:
            write_text(Path(out), text)
            typer.echo(out)

    return command
