"""The model card of an export: where it comes from and what was checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kllm.export.resolve import resolve
from kllm.observe import units


def export_card(name: str, source: str, report: dict[str, Any]) -> str:
    """README.md of an exported directory, from the conversion's report and the source's own card."""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [kllm]", "---", ""]
    lines = [
        *head,
        f"# {name}",
        "",
        f"Written by kllm from `{Path(source).name}`.",
        "",
        "| | |",
        "| --- | --- |",
    ]
    lines += [f"| {key} | {value} |" for key, value in _facts(report)]
    lines += ["", *_own_card(source)]
    return "\n".join(lines).rstrip() + "\n"


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("parameters", f"{report['parameters']:,}"), ("size", units.size(report["bytes"]))]
    if checked := report.get("verified"):
        agreed = f"{checked['greedy_equal']} of {checked['greedy_total']} greedy tokens equal"
        differ = f"largest logit difference {checked['max_abs_diff']:.1e}"
        facts.append((f"checked with {checked['reader']}", f"{differ}, {agreed}"))
    if change := report.get("vocabulary"):
        facts.append(("vocabulary", json.dumps(change)))
    return facts


def _own_card(source: str) -> list[str]:
    """The card of the trained model, under a heading, without its YAML head."""
    path = Path(source)
    card = resolve(path) / "README.md" if path.is_dir() else None
    if card is None or not card.is_file():
        return []
    text = card.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    return ["## Training", "", *(_deeper(line) for line in text.strip().splitlines())]


def _deeper(line: str) -> str:
    return f"##{line}" if line.startswith("# ") else f"#{line}" if line.startswith("## ") else line
