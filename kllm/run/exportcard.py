"""The model card of an export: where it comes from and what was checked."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

from kllm.export.resolve import resolve
from kllm.observe import units

CARD_MARK = "GGUF files written by kllm"
"""Stands in every card of a folder of GGUF files: such a README may be replaced."""


def export_card(name: str, source: str, report: dict[str, Any]) -> str:
    """README.md of an exported directory, from the conversion's report and the source's own card."""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [kllm]"]
    head += [f"license: {terms}"] if (terms := source_license(source)) else []
    lines = [
        *head,
        "---",
        "",
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


def gguf_card(name: str, source: str, license_name: str, report: dict[str, Any]) -> str:
    """README.md of a folder of GGUF files: types, sizes, and how each compared with the model."""
    head = ["---", "pipeline_tag: text-generation", "tags: [kllm, gguf]"]
    head += [f"license: {license_name}"] if license_name else []
    lines = [
        *head,
        "---",
        "",
        f"# {name}",
        "",
        f"{CARD_MARK} from `{Path(source).name}`: {report['parameters']:,} parameters, "
        f"llama.cpp architecture `{report['arch']}`{_with_adapter(report)}.",
        "",
        "| file | type | size | next token: same likeliest / KL (nats) | checked with |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file in report["files"]:
        checked = file.get("verified")
        damage = f"{checked['same_top']:.1%} / {checked['kl']:.1e}" if checked else ""
        cells = (Path(file["path"]).name, file["quant"], units.size(file["bytes"]), damage)
        lines.append(f"| {' | '.join(cells)} | {gguf_check(checked) if checked else 'not checked'} |")
    return "\n".join([*lines, "", *_own_card(source)]).rstrip() + "\n"


def _with_adapter(report: dict[str, Any]) -> str:
    merged = report.get("merged")
    return f", adapter `{merged['adapter']}` merged (rank {merged['rank']})" if merged else ""


def gguf_check(checked: dict[str, Any]) -> str:
    """What a check of a GGUF file found, in a line."""
    if "greedy_total" not in checked:
        return f"{checked['reader']}: tensors within {checked['rounding']:.1e}"
    greedy = f"greedy tokens {checked['greedy_equal']}/{checked['greedy_total']}"
    differ = f"within {checked['logprob_diff']:.1e} (allowed {checked['tolerance']:g})"
    return f"{checked['reader']}: log-probabilities {differ}, {greedy}"


def hf_check(checked: dict[str, Any]) -> str:
    """What a check of a Hugging Face folder found, in a line."""
    if "greedy_total" not in checked:
        return f"{checked['reader']}: {checked['tensors_equal']} tensors read back as they were packed"
    differ = f"logits differ by at most {checked['max_abs_diff']:.1e} (allowed {checked['tolerance']:.1e})"
    greedy = f"greedy tokens equal {checked['greedy_equal']}/{checked['greedy_total']}"
    return f"{checked['reader']}: {differ}, {greedy}"


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = [
        ("parameters", f"{report['parameters']:,}"),
        ("size", units.size(report["bytes"])),
        ("numbers", report["dtype"]),
    ]
    if report.get("quant"):
        group = f", groups of {report['group_size']}" if report.get("group_size") else ""
        facts.append(("quantised", f"{report['quant']}{group}"))
    if (cost := report.get("perplexity")) and cost["before"]:
        figures = f"{cost['before']:.3f} before, {cost['after']:.3f} after quantisation"
        facts.append((f"perplexity on {cost['texts']}", figures))
    if checked := report.get("verified"):
        facts.append(("checked with", hf_check(checked)))
    facts += [("adapter merged", merged_line(merged)) for merged in report.get("merged", ())]
    if change := report.get("vocabulary"):
        facts.append(("vocabulary", json.dumps(change)))
    return facts


def merged_line(merged: dict[str, Any]) -> str:
    """What one merged adapter was, in a line."""
    share = "" if merged["weight"] == 1 else f" times {merged['weight']:g}"
    return f"{merged['adapter']}{share}: {merged['modules']} modules, rank {merged['rank']}"


def source_license(source: str) -> str:
    """The licence that a model's own card or GGUF file names; "" if none does."""
    if not Path(source).exists():
        return ""
    place = resolve(source)
    if place.suffix == ".gguf":
        from kllm.export.gguf_read import open_gguf

        return str(open_gguf(place).fields.get("general.license") or "")
    card = place / "README.md"
    if not place.is_dir() or not card.is_file():
        return ""
    head = card.read_text(encoding="utf-8", errors="replace").partition("---\n")[2].partition("\n---\n")[0]
    with contextlib.suppress(yaml.YAMLError, AttributeError):
        found = yaml.safe_load(head).get("license")
        return found if isinstance(found, str) else ""
    return ""


def _own_card(source: str) -> list[str]:
    """The card of the trained model, under a heading, without its YAML head."""
    path = Path(source)
    place = resolve(path) if path.is_dir() else path
    card = place / "README.md"
    if not place.is_dir() or not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    return ["## Training", "", *(_deeper(line) for line in text.strip().splitlines())]


def _deeper(line: str) -> str:
    return f"##{line}" if line.startswith("# ") else f"#{line}" if line.startswith("## ") else line
