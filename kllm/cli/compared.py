"""What `kllm tokenizer inspect` shows: texts sorted by language, tokenizers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kllm.cli.inspected import load_tokenizer
from kllm.errors import UserError
from kllm.observe import units
from kllm.observe.console import make_reporter

_MAX_TEXTS = 20_000


def language_of(text: str) -> str:
    """`zh`, `en` or `other`, by the letters alone."""
    letters = [char for char in text[:2000] if char.isalpha()]
    if not letters:
        return "other"
    if sum("\u4e00" <= char <= "\u9fff" for char in letters) > 0.2 * len(letters):
        return "zh"
    return "en" if sum(char.isascii() for char in letters) > 0.8 * len(letters) else "other"


def texts_by_language(sources: list[str], max_bytes: int) -> dict[str, list[str]]:
    """Texts of all sources, at most `max_bytes` of each.

    Raises:
        UserError: no text in them.
    """
    from kllm.data.sources import iter_records
    from kllm.data.texts import all_texts

    found: dict[str, list[str]] = {}
    for source in sources:
        for _, record in iter_records(source, max_bytes=max_bytes):
            for text in all_texts(record):
                group = found.setdefault(language_of(text), [])
                if text.strip() and len(group) < _MAX_TEXTS:
                    group.append(text)
    found = {language: texts for language, texts in sorted(found.items()) if texts}
    if not found:
        raise UserError("no text to measure on", where=", ".join(sources))
    return found


def inspect_tokenizers(
    paths: list[str], sources: list[str], max_bytes: int, text: str | None
) -> list[dict[str, Any]]:
    """Facts about each tokenizer (`kllm.tokenizer.inspect`), and how it cuts `text` (key `cut`)."""
    from kllm.tokenizer.inspect import inspect, token_texts

    repeated = {path for path in paths if paths.count(path) > 1}
    if repeated:
        raise UserError(f"given twice: {', '.join(sorted(repeated))}")
    short = [Path(path).name for path in paths]
    names = short if len(set(short)) == len(paths) else paths
    tokenizers = {name: load_tokenizer(path) for name, path in zip(names, paths, strict=True)}
    rows = inspect(tokenizers, texts_by_language(sources, max_bytes))
    if text is not None:
        for row in rows:
            ids = tokenizers[row["name"]].encode(text)
            row["cut"] = {"ids": ids, "pieces": token_texts(tokenizers[row["name"]], ids)}
    return rows


def print_tokenizers(rows: list[dict[str, Any]]) -> None:
    """The page of one or several tokenizers."""
    reporter = make_reporter()
    facts = [
        (r["name"], f"{r['vocab_size']:,}", r["added_tokens"], r["fragments"], units.percent(r["vocab_used"]))
        for r in rows
    ]
    reporter.table("", ("tokenizer", "entries", "added", "part characters", "used here"), facts)
    columns = ("language", "tokenizer", "tokens", "bytes/token", "chars/token", "come back exactly")
    reporter.table("", columns, [line for row in rows for line in _languages(row)])
    if len(rows) > 1:
        versus = [
            (row["name"], other, f"{with_['shared']:,}", _ratios(with_["tokens"]))
            for row in rows
            for other, with_ in row["versus"].items()
        ]
        reporter.table("", ("tokenizer", "against", "entries in common", "tokens needed, as a ratio"), versus)
    for row in rows:
        longest = [("all", " ".join(_clipped(word) for word in row["longest"]))]
        if row["longest_han"]:
            longest.append(("Chinese", " ".join(row["longest_han"])))
        reporter.table(f"{row['name']}: longest entries", ("", ""), longest)
        failed = [text for figures in row["languages"].values() for text in figures["failures"]]
        if failed:
            reporter.warn(f"{row['name']} does not give back {failed[0]!r} exactly")
        if "cut" in row:
            cut = " | ".join(row["cut"]["pieces"])
            reporter.table(f"{row['name']}: {len(row['cut']['ids'])} tokens", ("cut",), [(cut,)])
    reporter.close()


def _clipped(word: str) -> str:
    shown = repr(word)
    return shown if len(shown) <= 28 else f"{shown[:20]}...' ({len(word)} characters)"


def _languages(row: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            language,
            row["name"],
            f"{f['tokens']:,}",
            f"{f['bytes_per_token']:.2f}",
            f"{f['chars_per_token']:.2f}",
            units.percent(f["round_trip"]),
        )
        for language, f in row["languages"].items()
    ]


def _ratios(tokens: dict[str, float]) -> str:
    return "  ".join(f"{language} {ratio:.2f}" for language, ratio in tokens.items())
