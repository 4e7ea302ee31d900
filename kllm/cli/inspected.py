"""What `kllm data inspect` and `kllm tokenizer inspect` show: gathering, and laying out for a person."""

from __future__ import annotations

import json
from typing import Any

from kllm.observe import units
from kllm.observe.console import make_reporter

_BAR = 40
_BAD_SHOWN = 20


def load_tokenizer(path: str) -> Any:
    """The tokenizer behind a folder, a run, a model or a hub id."""
    from kllm.export import tokenizers

    return tokenizers.load_tokenizer(path)


def inspect_data(source: str, tokenizer: str | None, rows: int, row: int) -> dict[str, Any]:
    """Facts about a data file; see `kllm.data.inspect.inspect_file`. `row` counts from 1."""
    from kllm.data.inspect import inspect_file

    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    return inspect_file(source, loaded, rows=rows, sample=row - 1)


def print_data(found: dict[str, Any]) -> None:
    """The page of one data source."""
    reporter = make_reporter()
    dialects = ", ".join(f"{name} ({count:,} rows)" for name, count in found["dialects"].items())
    rows = f"{found['rows']:,} good, {found['bad_rows']:,} bad"
    if not found["complete"]:
        rows += ", not all read (--rows)"
    facts = [
        ("files", ", ".join(found["files"][:3]) + (" ..." if len(found["files"]) > 3 else "") or "-"),
        ("dialect", dialects),
        ("kind", found["kind"]),
        (
            "rows",
            rows,
        ),
    ]
    if found["pairs"] and found["tokens"]:
        facts.append(("tokens", f"{found['trained_tokens']:,} trained, in both sides of the pairs"))
    elif found["tokens"]:
        total, trained = found["tokens"]["total"], found["trained_tokens"]
        per_token = found["chars"]["total"] / max(total, 1)
        facts.append(
            (
                "tokens",
                f"{total:,} ({per_token:.2f} chars each), {units.percent(trained / max(total, 1))} trained",
            )
        )
    if found["good"] is not None:
        facts.append(("good", f"{units.percent(found['good'])} of the answers"))
    facts.append(("chars", f"{found['chars']['total']:,}"))
    reporter.table(found["path"], ("", ""), facts)
    spread = found[found["unit"]]
    names = ("mean", "min", "p50", "p90", "p99", "max")
    reporter.table(f"length of a row in {found['unit']}", names, [[f"{spread[name]:,.0f}" for name in names]])
    if found["pairs"]:
        _print_pairs(found["pairs"], found["unit"], reporter)
    columns = (f"{found['unit']} in a row", "rows", "no longer", "")
    reporter.table("", columns, _histogram(found["histogram"]))
    _print_sample(found, reporter)
    if found["bad"]:
        shown = [(bad["where"], bad["reason"]) for bad in found["bad"][:_BAD_SHOWN]]
        reporter.table(f"bad rows: {found['bad_rows']:,}, the first {len(shown)}", ("where", "why"), shown)
    if not found["tokens"]:
        reporter.message("with --tokenizer PATH: tokens instead of characters, and what is trained")
    reporter.close()


def _histogram(bins: list[dict[str, int]]) -> list[tuple[str, str, str, str]]:
    """Rows of a table: bin, rows in it, share of the rows up to its end, bar."""
    most = max((b["rows"] for b in bins), default=0) or 1
    total, so_far, table = sum(b["rows"] for b in bins) or 1, 0, []
    for b in bins:
        so_far += b["rows"]
        bar = "█" * -(-b["rows"] * _BAR // most)
        table.append((f"{b['low']:,}-{b['high']:,}", f"{b['rows']:,}", units.percent(so_far / total), bar))
    return table


def _print_sample(found: dict[str, Any], reporter: Any) -> None:
    sample = found["sample"]
    if sample is None:
        return
    title = f"sample: {sample['where']} ({sample['dialect']})"
    if sample["sections"]:
        spans = _pair_spans(sample["sections"])
    elif sample["pieces"]:
        spans = list(zip(sample["pieces"], sample["mask"], strict=True))
    elif sample["messages"]:
        spans = _message_spans(sample["messages"])
    else:
        spans = [(sample["text"], True)]
    if sample["truncated"]:
        spans.append((" ...", False))
    reporter.spans(title, spans)


def _message_spans(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    spans = []
    for message in messages:
        spans.append((f"{message['role']}: ", False))
        calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
        said = "\n".join(filter(None, [message.get("content"), *calls]))
        spans.append((f"{said}\n", message["role"] == "assistant"))
    return spans


def _pair_spans(sections: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """A preference pair: the prompt once, then both answers, each under its name."""
    spans = []
    for section in sections:
        spans.append((f"\n[{section['name']}]\n", False))
        if section["pieces"]:
            spans += list(zip(section["pieces"], section["mask"], strict=True))
        else:
            spans += _message_spans(section["messages"])
    return spans


def _print_pairs(pairs: dict[str, Any], unit: str, reporter: Any) -> None:
    names = ("mean", "p50", "p90", "p99", "max")
    parts = ("prompt", "chosen", "rejected")
    rows = [(part, *(f"{pairs[part][name]:,.0f}" for name in names)) for part in parts]
    reporter.table(f"parts of a pair in {unit}", ("", *names), rows)
    facts = [("chosen is the longer", units.percent(pairs["chosen_longer"]))]
    if pairs["saved"] is not None:
        facts.append(("computed once for both sides", f"{units.percent(pairs['saved'])} of the tokens"))
    reporter.table("", ("", ""), facts)
