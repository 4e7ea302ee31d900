"""What the MODEL and --adapter arguments of the command line mean. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kllm.errors import UserError

_NAME = re.compile(r"[\w.@:+-]+(?:/[\w.@:+-]+)*")


@dataclass(frozen=True)
class Source:
    """A model to serve: its name in requests and where it is; or an adapter beside the model `parent`."""

    name: str
    path: str
    adapter: str | None = None
    parent: str | None = None


def sources_of(models: Sequence[str], adapters: Sequence[str] = ()) -> list[Source]:
    """The sources that MODEL and --adapter arguments mean; adapters go onto the first model.

    Raises:
        UserError: no name in front of an adapter, a strange name, one name twice.
    """
    sources = [_source(text) for text in models]
    for text in adapters:
        name, sign, path = text.partition("=")
        if not sign or not path:
            raise UserError(f"expected NAME=DIR, got {text!r}", where="flag --adapter")
        sources.append(Source(name, sources[0].path, path, sources[0].name))
    names = [source.name for source in sources]
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name for a model", hint="NAME=PATH gives it one")
        if names.count(name) > 1:
            raise UserError(f"two models are called {name!r}", hint="NAME=PATH gives one another name")
    return sources


def _source(text: str) -> Source:
    name, sign, path = text.partition("=")
    if sign and path and _NAME.fullmatch(name) and not Path(text).expanduser().exists():
        return Source(name, path)
    return Source(default_name(text), text)


def default_name(path: str) -> str:
    """The run's name for what is in a run, else the last part of the path or hub id."""
    place = Path(path).expanduser()
    if place.exists():
        place = place.resolve()
        run = next((p for p in (place, *place.parents) if (p / "run.json").is_file()), None)
        if run is not None:
            return run.name
        return place.stem if place.is_file() else place.name
    return path.rstrip("/").rpartition("/")[2].partition("@")[0]
