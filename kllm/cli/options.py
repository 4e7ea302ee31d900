"""Flags from the schema, and flags back to overrides: the only code that knows both.

Every option of a stage has exactly one flag: the ones typed daily a short name, all others
`--section.field` as in the recipe. A flag that is not given changes nothing; one that is given takes the
same road as `--set`, so that the two cannot differ.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kllm.config import parts
from kllm.config.overrides import Override
from kllm.config.recipe import Recipe
from kllm.config.schema import Leaf, choices, leaves
from kllm.config.stages import STAGES
from kllm.errors import UserError

SHORT = {
    "data": "--data",
    "model.path": "--model",
    "model.preset": "--preset",
    "tokenizer.path": "--tokenizer",
    "teacher.path": "--teacher",
    "student_from": "--student-from",
    "from_endpoint": "--from-endpoint",
    "prompts": "--prompts",
    "model.num_hidden_layers": "--layers",
    "model.hidden_size": "--hidden-size",
    "preference.loss": "--loss",
    "online": "--online",
    "lora.rank": "--rank",
    "train.steps": "--steps",
    "train.tokens": "--tokens",
    "train.epochs": "--epochs",
    "optim.lr": "--lr",
    "train.batch_tokens": "--batch-tokens",
    "dataset.seq_len": "--seq-len",
    "train.save_every": "--save-every",
    "device": "--device",
    "seed": "--seed",
    "nproc": "--nproc",
}
NOT_FLAGS = ("stage", "name")
"""Stage fields without a flag: the command is the kind, and a single command's stage is called by it."""

EVERYDAY = "Everyday options"
_PATH_WORDS = ("path", "dir", "template")


@dataclass(frozen=True)
class Flag:
    """One option on the command line."""

    name: str
    key: str
    leaf: Leaf
    panel: str

    @property
    def parameter(self) -> str:
        """Python name of the callback's argument."""
        return self.name.lstrip("-").replace("-", "_").replace(".", "__")


def stage_flags(kind: str) -> list[Flag]:
    """All flags of a stage kind, everyday ones first, then section by section as in the schema."""
    own = [leaf for leaf in leaves(STAGES[kind]) if leaf.key not in NOT_FLAGS]
    top = [leaf for leaf in leaves(Recipe) if leaf.key in SHORT]
    flags = [_flag(leaf) for leaf in own + top]
    order = list(SHORT.values())
    daily = sorted((f for f in flags if f.panel == EVERYDAY), key=lambda f: _rank(f, order))
    return daily + [f for f in flags if f.panel != EVERYDAY]


def section_flags(name: str, panel: str) -> list[Flag]:
    """The flags `--field` of one section of `kllm.config.parts`, for a command that is no stage."""
    section = getattr(parts, name)
    return [Flag("--" + leaf.key.replace("_", "-"), leaf.key, leaf, panel) for leaf in leaves(section)]


def recipe_flags() -> list[Flag]:
    """The flags of the recipe itself: device, seed, nproc."""
    return [_flag(leaf) for leaf in leaves(Recipe) if leaf.key in SHORT]


def _rank(flag: Flag, order: list[str]) -> int:
    return order.index(flag.name) if flag.name in order else order.index("--data")


def _flag(leaf: Leaf) -> Flag:
    if leaf.key in SHORT:
        return Flag(SHORT[leaf.key], leaf.key, leaf, EVERYDAY)
    if len(leaf.path) == 1:
        return Flag("--" + leaf.key.replace("_", "-"), leaf.key, leaf, EVERYDAY)
    return Flag("--" + leaf.key, leaf.key, leaf, f"{leaf.path[0].capitalize()}: {_title(leaf)}")


def _title(leaf: Leaf) -> str:
    doc = (leaf.section.__doc__ or "").strip().splitlines()[0]
    return doc.rstrip(".")


def _metavar(leaf: Leaf) -> str | None:
    kind = leaf.type
    if typing.get_origin(kind) is dict:
        return "KEY=VALUE"
    if typing.get_origin(kind) is tuple:
        return "X,Y"
    if typing.get_origin(kind) is list or kind is str:
        last = leaf.path[-1]
        if leaf.default == "auto":
            return "NAME"
        return "PATH" if last.endswith("data") or any(word in last for word in _PATH_WORDS) else "TEXT"
    if kind is float:
        return "X"
    return "SIZE" if leaf.path[-1] == "max_bytes" else "N"


def _shown_default(leaf: Leaf) -> str | bool:
    value = leaf.default
    if value is None or value in ([], {}):
        return False
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and leaf.path[-1] == "max_bytes":
        return f"{value >> 20}MiB"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(getattr(item, "path", item)) for item in value)
    return str(value)


def _option(flag: Flag) -> Any:
    """`Annotated[T, typer.Option(...)]` of one flag."""
    leaf = flag.leaf
    settings: dict[str, Any] = {
        "help": leaf.help,
        "rich_help_panel": flag.panel,
        "show_default": _shown_default(leaf),
    }
    if leaf.type is bool:
        return Annotated[bool | None, typer.Option(f"{flag.name}/--no-{flag.name[2:]}", **settings)]
    if choices(leaf.type):
        words = "|".join(choices(leaf.type))
        return Annotated[leaf.type | None, typer.Option(flag.name, metavar=words, **settings)]
    many = typing.get_origin(leaf.type) in (list, dict)
    kind: Any = list[str] if many else str
    return Annotated[kind | None, typer.Option(flag.name, metavar=_metavar(leaf), **settings)]


def overrides_of(flags: list[Flag], values: dict[str, Any]) -> list[Override]:
    """The overrides that the given flags stand for; absent flags are None or empty."""
    result = []
    for flag in flags:
        value = values.get(flag.parameter)
        if value is None or value == [] or value == ():
            continue
        result.append(Override(flag.key, _value(flag, value), f"flag {flag.name}"))
    return result


def _value(flag: Flag, value: Any) -> Any:
    kind = flag.leaf.type
    if typing.get_origin(kind) is not dict:
        return list(value) if isinstance(value, tuple) else value
    from kllm.config.yamlfile import scalar

    pairs = {}
    for item in value:
        if item.startswith("{") and len(value) == 1:
            return item
        key, sign, amount = item.rpartition("=")
        if not sign:
            raise UserError(f"expected KEY=VALUE, got {item!r}", where=f"flag {flag.name}")
        pairs[key] = scalar(amount)
    return pairs


Extra = tuple[str, Any, Any]
"""A parameter that is not in the schema: (name, annotation, default)."""


def _daily(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=EVERYDAY)


RECIPE_FLAG: Extra = (
    "recipe",
    Annotated[
        str | None, _daily("--recipe", metavar="FILE", help="Recipe file, or the name of a shipped one.")
    ],
    None,
)
STAGE_FLAG: Extra = (
    "stage",
    Annotated[
        str | None, _daily("--stage", metavar="NAME", help="Which stage of the recipe, if several fit.")
    ],
    None,
)
OUT_FLAG: Extra = (
    "out",
    Annotated[str | None, _daily("--out", metavar="DIR", help="Run folder. [default: runs/NAME]")],
    None,
)
SET_FLAG: Extra = (
    "set",
    Annotated[
        list[str] | None,
        _daily("--set", metavar="KEY=VALUE", help="Set any option of the recipe; repeat for several."),
    ],
    None,
)
DRY_RUN_FLAG: Extra = (
    "dry_run",
    Annotated[bool, _daily("--dry-run", help="Check everything and print the plan; touch nothing.")],
    False,
)
FRESH_FLAG: Extra = (
    "fresh",
    Annotated[bool, _daily("--fresh", help="Move an older run folder aside and start anew.")],
    False,
)
JSON_FLAG: Extra = (
    "json",
    Annotated[bool, _daily("--json", help="JSON lines on stdout, for scripts.")],
    False,
)
QUIET_FLAG: Extra = (
    "quiet",
    Annotated[bool, _daily("--quiet", "-q", help="Only results and errors.")],
    False,
)

RUN_FLAGS = (SET_FLAG, DRY_RUN_FLAG, FRESH_FLAG, JSON_FLAG, QUIET_FLAG)


REQUIRED = inspect.Parameter.empty
"""Default of a parameter that must be given."""


def extra_parameter(extra: Extra) -> inspect.Parameter:
    """A keyword parameter of a callback."""
    name, annotation, default = extra
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def flag_parameters(flags: list[Flag]) -> Iterator[inspect.Parameter]:
    """The callback's parameters for flags of the schema."""
    for flag in flags:
        yield extra_parameter((flag.parameter, _option(flag), None))


def with_signature(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """Give a `**values` function the signature that Typer builds its options from."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def reporter_mode(values: dict[str, Any]) -> str | None:
    """`json`, `quiet`, or None for what fits the terminal."""
    return "json" if values.get("json") else "quiet" if values.get("quiet") else None


def spelling_of(kind: str, arguments: list[str]) -> list[str]:
    """Arguments with other spellings of known flags replaced: `--train.steps`, `--optim.weight-decay`."""
    known: dict[str, str] = {}
    for flag in stage_flags(kind):
        known[flag.key.replace("-", "_")] = flag.name
        known[flag.name[2:].replace("-", "_")] = flag.name
    result, plain = [], True
    for argument in arguments:
        plain = plain and argument != "--"
        name, sign, value = argument.partition("=")
        word = name[2:].replace("-", "_")
        if plain and name.startswith("--") and word in known:
            name = known[word]
        elif plain and name.startswith("--no-") and word.removeprefix("no_") in known:
            name = f"--no-{known[word.removeprefix('no_')][2:]}"
        result.append(f"{name}{sign}{value}")
    return result


def suggestion(kind: str, option: str) -> str | None:
    """What to type instead of an unknown option, if the schema or another tool's name tells."""
    from kllm.config.hints import ALIASES

    word = option.lstrip("-").replace("-", "_")
    last = word.rpartition(".")[2]
    flags = {flag.key: flag.name for flag in stage_flags(kind)}
    target, remark = ALIASES.get(word) or ALIASES.get(last) or ("", "")
    if target in flags:
        return f"kllm calls it {flags[target]}" + (f" ({remark})" if remark else "")
    same = [name for key, name in flags.items() if key.rpartition(".")[2] == last]
    return f"did you mean {same[0]}?" if same else None
