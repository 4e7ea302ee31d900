"""Results of a stage as tables: printed at its end, and written into its card and the run's report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kllm.observe import units

_COUNTED = (
    "task",
    "accuracy",
    "correct",
    "total",
    "by_language",
    "by_category",
    "measure",
    "style",
    "samples",
)


@dataclass(frozen=True)
class Table:
    """title, columns and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(result: Mapping[str, Any] | None) -> list[Table]:
    """The tables of a stage's `result`: one for each evaluation task, one for all single figures."""
    found: list[Table] = []
    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]]
    for name, value in (result or {}).items():
        if name == "files":
            rows = [tuple(f[key] for key in ("file", "type", "size", "check")) for f in value]
            found.append(Table("", ("file", "type", "size", "checked with"), rows))
        elif isinstance(value, Mapping) and "by_category" in value:
            found += _of_task(name, value)
        elif isinstance(value, Mapping) and "ppl" in value:
            found.append(Table(name, ("figure", "value"), flat_numbers(value)))
        else:
            figures[name] = value
    rows = flat_numbers(figures)
    return [Table("", ("figure", "value"), rows), *found] if rows else found


def _of_task(name: str, result: Mapping[str, Any]) -> list[Table]:
    """Shares by category and language, of the task and of what it counts besides; then its other figures."""
    parts = {key: part for key, part in result.items() if isinstance(part, Mapping) and "by_category" in part}
    found = [_by_category(name, result)]
    found += [_by_category(f"{name} / {key}", part) for key, part in parts.items()]
    rest = {key: value for key, value in result.items() if key not in (*_COUNTED, *parts)}
    rows = flat_numbers(rest)
    return [*found, Table(f"{name}: figures", ("figure", "value"), rows)] if rows else found


def sample_answers(result: Mapping[str, Any] | None, limit: int = 12) -> list[Table]:
    """What the model answered, and what was expected, for each task that kept samples."""
    found = []
    for name, value in (result or {}).items():
        samples = value.get("samples") if isinstance(value, Mapping) else None
        if samples:
            rows: list[tuple[str, ...]] = [
                (s["question"], s["answer"], s["expected"], "yes" if s["correct"] else "no")
                for s in samples[:limit]
            ]
            verdict = "exact" if "measure" not in value else "right"
            found.append(Table(f"{name}: answers", ("question", "answer", "expected", verdict), rows))
    return found


def _by_category(name: str, result: Mapping[str, Any]) -> Table:
    """Counts by category (rows) and language (columns)."""
    languages = list(result["by_language"])
    categories = dict.fromkeys(c for lang in languages for c in result["by_category"][lang])
    rows = [
        (category, *(_share(result["by_category"][lang].get(category)) for lang in languages))
        for category in categories
    ]
    rows.append(("all", *(_share(result["by_language"][lang]) for lang in languages)))
    measure = result.get("measure", "exact answers")
    return Table(f"{name}: {measure} {_share(result)}", ("category", *languages), rows)


def _share(row: Mapping[str, Any] | None) -> str:
    return f"{100 * row['accuracy']:.1f}% ({row['correct']}/{row['total']})" if row else ""


def flat_numbers(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, ...]]:
    """Every number and short text of nested results as (name, text)."""
    rows: list[tuple[str, ...]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            rows += flat_numbers(item, f"{name} / ")
        elif isinstance(item, bool) or item is None:
            continue
        elif name == "mem/peak":
            rows.append((name, units.size(item)))
        elif isinstance(item, float):
            rows.append((name, f"{item:,.0f}" if item.is_integer() and item else f"{item:.6g}"))
        elif isinstance(item, int):
            rows.append((name, f"{item:,}"))
        elif isinstance(item, str) and len(item) <= 60:
            rows.append((name, item))
    return rows
