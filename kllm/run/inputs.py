"""Where a stage's model and tokenizer lie: in this run's folders, on disk, or on the hub. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kllm.config.recipe import REFERENCE, Recipe
from kllm.errors import UserError
from kllm.export.hub import is_hub_id
from kllm.export.resolve import resolve, resolve_tokenizer


@dataclass(frozen=True)
class Input:
    """One input of a stage: model, tokenizer, teacher or endpoint.

    `stage` names the stage of this run that it comes from; None for a path.
    """

    what: str
    reference: str
    stage: str | None
    directory: Path | None
    """None while it does not exist yet (or is a hub id that was not fetched)."""

    @property
    def source(self) -> str:
        """`stage:NAME` or the path, for people."""
        return f"{REFERENCE}{self.stage}" if self.stage else self.reference


def find_inputs(recipe: Recipe, name: str, run_dir: Path, *, fetch: bool = True) -> dict[str, Input]:
    """The inputs of stage `name`, by the rule of `Recipe.inputs`.

    Args:
        fetch: False leaves hub ids alone (a dry run downloads nothing).

    Raises:
        UserError: a path that does not exist or holds no model or tokenizer.
    """
    found = {}
    for what, reference in recipe.inputs(name).items():
        if reference.startswith(REFERENCE):
            producer = reference.removeprefix(REFERENCE)
            final = run_dir / recipe.dirname(producer) / "final"
            found[what] = Input(what, reference, producer, final if final.exists() else None)
        elif not fetch and not Path(reference).exists() and is_hub_id(reference):
            found[what] = Input(what, reference, None, None)
        elif what == "tokenizer" and (same := [i for i in found.values() if i.reference == reference]):
            found[what] = Input(what, reference, None, same[0].directory)
        else:
            found[what] = Input(what, reference, None, _locate(what, reference, name))
    return found


def _locate(what: str, reference: str, stage: str) -> Path:
    try:
        return resolve_tokenizer(reference) if what == "tokenizer" else resolve(reference)
    except UserError as e:
        key = "from_endpoint" if what == "endpoint" else f"{what}.path"
        raise UserError(f"{e.message} ({stage}.{key})", where=e.where, hint=e.hint) from None


def producers(recipe: Recipe, name: str) -> list[str]:
    """Stages of the recipe that stage `name` takes something from, in order."""
    names = {r.removeprefix(REFERENCE) for r in recipe.inputs(name).values() if r.startswith(REFERENCE)}
    return [s.name for s in recipe.stages if s.name in names]
