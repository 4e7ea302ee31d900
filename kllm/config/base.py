"""The ground of the schema: the strict `Section` and the number types that people actually write.

`Section` refuses unknown keys and cannot be changed after it is made, so that what a run recorded is
what it used. `Count`, `Bytes` and `Duration` read `20M`, `4GiB` and `30m`; every numeric type refuses
`true` and `false`, which pydantic alone would take for 1 and 0.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import sys
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TIME_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_WITH_UNIT = re.compile(r"([-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)")
_DURATION_PIECE = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


class Section(BaseModel):
    """One group of options: a mapping in the recipe, a panel of `--section.field` flags in the help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        defer_build=True,  # the flags of --help need the fields only: half the start-up time
        regex_engine="python-re",
    )

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of fields that stand for one choice: setting one in a later layer (an extending recipe, a flag)
    drops the others of the earlier layers instead of contradicting them."""


@cache
def _docs_of_module(name: str) -> dict[str, dict[str, str]]:
    """{class: {field: the text under it}} of a module, from its source."""
    tree = ast.parse(inspect.getsource(sys.modules[name]))
    docs: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, text in pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(text):
                    found = docs.setdefault(node.name, {})
                    found[field.target.id] = inspect.cleandoc(text.value.value)  # type: ignore[attr-defined]
    return docs


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def field_docs(section: type[Section]) -> dict[str, str]:
    """The text under each field of a section: its help, its line in the docs, its JSON-schema description.

    Read when it is asked for, one parse for a module: pydantic's `use_attribute_docstrings` parses the
    module once for every class at import, which is a fifth of the start-up time.
    """
    docs: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if issubclass(owner, Section) and owner is not Section:
            docs |= _docs_of_module(owner.__module__).get(owner.__name__, {})
    return docs


def _split_number(value: str, expected: str) -> tuple[float | int, str]:
    match = _NUMBER_WITH_UNIT.fullmatch(value.strip())
    if not match:
        raise ValueError(f"expected {expected}, got {value!r}")
    digits = match.group(1).replace("_", "")
    number = int(digits) if re.fullmatch(r"[-+]?\d{1,30}", digits) else float(digits)
    return number, match.group(2).lower()


def _whole(number: float | int, written: Any) -> int:
    if isinstance(number, int):
        return number
    if not math.isfinite(number) or abs(number - round(number)) > 1e-6 * max(1.0, abs(number)):
        raise ValueError(f"expected a whole number, got {written}")
    return round(number)


def parse_count(value: Any) -> Any:
    """A whole number, with decimal units k, M, B (or G), T or binary ones Ki, Mi, Gi: `32k` is 32,000."""
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number, got {str(value).lower()}")
    if isinstance(value, (int, float)):
        return _whole(value, value)
    if not isinstance(value, str):
        return value
    number, unit = _split_number(value, "a whole number")
    factor = _COUNT_UNITS.get(unit) or _BINARY_UNITS.get(unit)
    if factor is None:
        raise ValueError(f"unknown unit {unit!r} in {value!r}, use k, M, B, T or Ki, Mi, Gi")
    return _whole(number * factor, value)


def parse_bytes(value: Any) -> Any:
    """A size in bytes: `4GiB` and `4Gi` are binary, `256MB` and `256M` decimal, a bare number is bytes."""
    if isinstance(value, bool):
        raise ValueError(f"expected a size like 4GiB, got {str(value).lower()}")
    if isinstance(value, (int, float)):
        return _whole(value, value)
    if not isinstance(value, str):
        return value
    number, unit = _split_number(value, "a size like 4GiB")
    short = unit.removesuffix("b")
    factor = _BINARY_UNITS.get(short) or {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}.get(short)
    if factor is None:
        raise ValueError(f"unknown unit {unit!r} in {value!r}, use KB, MB, GB or KiB, MiB, GiB")
    return round(number * factor)


def parse_duration(value: Any) -> Any:
    """Seconds from `90`, `90s`, `30m`, `1.5h`, `1h30m`, `2d` or `250ms`."""
    if isinstance(value, bool):
        raise ValueError(f"expected a time like 30m, got {str(value).lower()}")
    if not isinstance(value, (str, float)):
        return value
    text = str(value).strip().lower().replace(" ", "")
    pieces = _DURATION_PIECE.findall(text)
    try:
        if pieces and "".join(a + b for a, b in pieces) == text:
            seconds = sum(float(amount) * _TIME_UNITS[unit] for amount, unit in pieces)
        else:
            seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"expected a time like 90s, 30m or 1h30m, got {value!r}")
    return seconds


def parse_float(value: Any) -> Any:
    """A finite number; text such as `2e-5` counts, `true` does not."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    if isinstance(value, str):
        try:
            value = float(value.strip())
        except ValueError:
            raise ValueError(f"expected a number, got {value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return value


def without_key(address: str, instead: str) -> str:
    """An address that may be stored, logged and published with the run; what is no URL stays as it is.

    Raises:
        ValueError: an URL with a user, a password or a query. The text does not repeat it.
    """
    if address.startswith(("http://", "https://")) and any(sign in address for sign in "@?#"):
        raise ValueError(f"an address without a password or a query is wanted; a key belongs into {instead}")
    return address


def as_list(value: Any) -> Any:
    """One item stands for a list of one, so that `data: corpus.jsonl` needs no brackets."""
    return value if value is None or isinstance(value, (list, tuple)) else [value]


Count = Annotated[int, BeforeValidator(parse_count)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
Float = Annotated[float, BeforeValidator(parse_float)]
Positive = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
NotNegative = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(parse_float), Field(ge=0, le=1)]
NotNegativeFloat = Annotated[float, BeforeValidator(parse_float), Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(parse_float), Field(gt=0)]
StrList = Annotated[list[str], BeforeValidator(as_list)]
Name = Annotated[str, Field(pattern=r"^[^\W_][\w.\-]*\Z", max_length=80)]
"""A name that becomes a folder: letters, digits, `.`, `_`, `-`, not starting with a sign."""
StageName = Annotated[str, Field(pattern=r"^[^\W_][\w\-]*\Z", max_length=60)]
"""The same without `.`, which separates the parts of a key."""
