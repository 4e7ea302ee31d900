"""Values given on the command line, before any recipe is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kllm.errors import UserError


@dataclass(frozen=True)
class Override:
    """One value given on the command line. `key` is dotted; text values are typed by the schema."""

    key: str
    value: Any
    origin: str = "flag --set"


def as_overrides(given: Mapping[str, Any] | Sequence[str | Override] | None) -> list[Override]:
    """Overrides from `{"optim.lr": "1e-3"}` or `["optim.lr=1e-3"]`; only the first `=` separates."""
    if not given:
        return []
    if isinstance(given, Mapping):
        return [Override(key, value) for key, value in given.items()]
    result = []
    for item in given:
        if isinstance(item, Override):
            result.append(item)
            continue
        key, sign, value = item.partition("=")
        if not sign or not key.strip():
            hint = "e.g. --set optim.lr=1e-3"
            raise UserError(f"expected KEY=VALUE, got {item!r}", where="flag --set", hint=hint)
        result.append(Override(key.strip(), value))
    return result
