"""`kllm run`: a whole recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kllm.cli import options
from kllm.config.overrides import Override, as_overrides
from kllm.errors import UserError

_WHICH = "Which stages"


def _names(*flags: str, help: str) -> Any:
    return typer.Option(*flags, metavar="STAGE", help=help, rich_help_panel=_WHICH)


FROM_FLAG = ("from_", Annotated[str | None, _names("--from", help="Begin at this stage.")], None)
UNTIL_FLAG = ("until", Annotated[str | None, _names("--until", help="End after this stage.")], None)
ONLY_FLAG = (
    "only",
    Annotated[list[str] | None, _names("--only", help="Only this stage; repeat for more.")],
    None,
)
FORCE_FLAG = (
    "force",
    Annotated[
        list[str] | None, _names("--force", help="Run this stage again though it is done; repeat for more.")
    ],
    None,
)
SMOKE_FLAG: options.Extra = (
    "smoke",
    Annotated[
        bool,
        typer.Option("--smoke", help="Shrink every size so that the recipe runs through in a minute."),
    ],
    False,
)
IN_PROCESS_FLAG: options.Extra = (
    "in_process",
    Annotated[bool, typer.Option("--in-process", help="Run the stages inside this process, for debugging.")],
    False,
)


def build_run() -> Callable[..., Any]:
    """The callback of `kllm run`."""
    flags = options.recipe_flags()

    def command(**values: Any) -> int:
        return _run(flags, values)

    given = typer.Argument(
        help="Recipe file or name, the same as --recipe.", metavar="[RECIPE]", show_default=False
    )
    extras: list[options.Extra] = [
        ("given_recipe", Annotated[str | None, given], None),
        options.RECIPE_FLAG,
        options.OUT_FLAG,
    ]
    parameters = [options.extra_parameter(extra) for extra in extras]
    parameters += options.flag_parameters(flags)
    last = [*options.RUN_FLAGS, FROM_FLAG, UNTIL_FLAG, ONLY_FLAG, FORCE_FLAG, SMOKE_FLAG, IN_PROCESS_FLAG]
    parameters += [options.extra_parameter(extra) for extra in last]
    command.__doc__ = (
        "Run a whole recipe: every stage, in order. What is done and unchanged is skipped, what was "
        "interrupted continues.\n\nExample: kllm run --recipe quickstart"
    )
    return options.with_signature(command, parameters)


def _run(flags: list[options.Flag], values: dict[str, Any]) -> int:
    given, recipe = values.get("given_recipe"), values.get("recipe")
    if given is not None and recipe is not None:
        raise UserError("the recipe is given twice", where="RECIPE and --recipe")
    path = given or recipe
    if path is None:
        raise UserError(
            "which recipe?", hint="kllm run --recipe FILE; `kllm recipe ls` lists the shipped ones"
        )
    from kllm.config.load import load_recipe

    overrides: list[Override] = [*as_overrides(values.get("set")), *options.overrides_of(flags, values)]
    loaded = load_recipe(path, overrides)
    from kllm.run.pipeline import run_recipe

    out = values.get("out")
    return run_recipe(
        loaded,
        out=None if out is None else Path(out),
        from_=values.get("from_"),
        until=values.get("until"),
        only=values.get("only") or None,
        force=values.get("force") or None,
        dry_run=values["dry_run"],
        smoke=values["smoke"],
        fresh=values["fresh"],
        in_process=values["in_process"],
        reporter_mode=options.reporter_mode(values),
    )
