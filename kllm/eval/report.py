"""The result of an evaluation as a markdown table and as flat numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(result: Mapping[str, Any]) -> str:
    """A table of one task's result (`run_task`); ends without a newline."""
    return _world(result) if "by_category" in result else _perplexity(result)


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers for logs: "world/accuracy", "world/zh", "world/zh/person", "perplexity/nll" ..."""
    if "by_category" not in result:
        return {f"perplexity/{k}": float(result[k]) for k in ("nll", "ppl", "bits_per_byte") if result.get(k)}
    flat = {"world/accuracy": float(result["accuracy"])}
    for lang, row in result["by_language"].items():
        flat[f"world/{lang}"] = float(row["accuracy"])
    for lang, names in result["by_category"].items():
        flat |= {f"world/{lang}/{name}": float(row["accuracy"]) for name, row in names.items()}
    return flat


def _world(result: Mapping[str, Any]) -> str:
    langs = list(result["by_language"])
    names = list(dict.fromkeys(name for lang in langs for name in result["by_category"][lang]))
    lines = [
        f"| {'category'} | {' | '.join(langs)} |",
        f"| --- | {' | '.join('---:' for _ in langs)} |",
    ]
    for name in names:
        cells = [_cell(result["by_category"][lang].get(name)) for lang in langs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| **all** | {' | '.join(_cell(result['by_language'][lang]) for lang in langs)} |")
    style = "asked in chat turns" if result.get("style") == "chat" else "asked in text style"
    lines += ["", f"exact answers: {_cell(result)}, {style}"]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    return f"{row['accuracy']:.1%} ({row['correct']}/{row['total']})" if row else "-"


def _perplexity(result: Mapping[str, Any]) -> str:
    bits = result.get("bits_per_byte")
    return "\n".join(
        [
            "| loss (nats/token) | perplexity | bits per byte | tokens | bytes | documents |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
            f"| {result['nll']:.4f} | {result['ppl']:.2f} | {'-' if bits is None else f'{bits:.4f}'} | "
            f"{result['tokens']:,} | {result['bytes']:,} | {result['documents']:,} |",
        ]
    )
