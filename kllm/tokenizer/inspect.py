"""How well a tokenizer fits a text: compression, round trip, use of the vocabulary, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kllm.tokenizer.tokenizer import Tokenizer

_COVERED = (10, 100, 1000)


def inspect(
    tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, Sequence[str]], *, longest: int = 12
) -> list[dict[str, Any]]:
    """Measures tokenizers on texts of several languages.

    Args:
        tokenizers: name -> tokenizer.
        texts: language -> texts.
        longest: how many of the longest tokens to name, of all and of those all in Han characters.

    Returns:
        One row per tokenizer: `name`, `vocab_size`, `added_tokens`, `fragments` (entries that are no whole
        characters), `longest` and `longest_han` (token texts), `vocab_used` (share of the vocabulary that
        occurs), `coverage` ({n: share of all tokens that the n most frequent make up}), and

        - `languages`: {language: texts, tokens, bytes_per_token, chars_per_token, round_trip (share of texts
          that come back exactly), failures (up to 3 that do not), vocab_used};
        - `versus`: {other: shared (entries in common), jaccard, tokens ({language: own / the other's})}.
    """
    rows = [_row(name, tokenizer, texts, longest) for name, tokenizer in tokenizers.items()]
    entries = {name: _entries(tokenizer) for name, tokenizer in tokenizers.items()}
    for row in rows:
        row["versus"] = {other["name"]: _versus(row, other, entries) for other in rows if other is not row}
    return rows


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as readable text; bytes that are no whole character show as <e4><bd>."""
    return [_readable(tokenizer.bytes_of(index)) for index in ids]


def _readable(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02x}>" for byte in data)


def _row(name: str, tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], longest: int) -> dict[str, Any]:
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    languages = {}
    for language, some in texts.items():
        languages[language], seen = _language(tokenizer, some)
        counts += seen
    pieces = [tokenizer.bytes_of(index) for index in range(tokenizer.vocab_size)]
    added = set(tokenizer.added_tokens.values())
    decoded = {i: _whole(piece) for i, piece in enumerate(pieces) if i not in added and piece}
    words = sorted({text for text in decoded.values() if text}, key=lambda text: (-len(text), text))
    total = max(int(counts.sum()), 1)
    ranked = np.sort(counts)[::-1]
    return {
        "name": name,
        "vocab_size": tokenizer.vocab_size,
        "added_tokens": len(added),
        "fragments": sum(text is None for text in decoded.values()),
        "longest": words[:longest],
        "longest_han": [text for text in words if all("\u4e00" <= char <= "\u9fff" for char in text)][
            :longest
        ],
        "vocab_used": float((counts > 0).mean()),
        "coverage": {n: float(ranked[:n].sum() / total) for n in _COVERED},
        "languages": languages,
    }


def _language(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[dict[str, Any], np.ndarray]:
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    failures: list[str] = []
    wrong = 0
    for start in range(0, len(texts), 256):  # ids of a whole corpus would not fit into memory
        batch = texts[start : start + 256]
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            counts += np.bincount(ids, minlength=len(counts)) if ids else 0
            if tokenizer.decode(ids, skip_special_tokens=False) != text:
                wrong += 1
                failures += [text[:200]] if len(failures) < 3 else []
    tokens = int(counts.sum())
    figures = {
        "texts": len(texts),
        "tokens": tokens,
        "bytes_per_token": sum(len(text.encode("utf-8", "replace")) for text in texts) / max(tokens, 1),
        "chars_per_token": sum(map(len, texts)) / max(tokens, 1),
        "round_trip": 1 - wrong / max(len(texts), 1),
        "failures": failures,
        "vocab_used": float((counts > 0).mean()),
    }
    return figures, counts


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _entries(tokenizer: Tokenizer) -> set[bytes]:
    added = set(tokenizer.added_tokens.values())
    return {tokenizer.bytes_of(i) for i in range(tokenizer.vocab_size) if i not in added} - {b""}


def _versus(row: dict[str, Any], other: dict[str, Any], entries: Mapping[str, set[bytes]]) -> dict[str, Any]:
    own, others = entries[row["name"]], entries[other["name"]]
    both = len(own & others)
    return {
        "shared": both,
        "jaccard": both / max(len(own | others), 1),
        "tokens": {
            language: figures["tokens"] / max(other["languages"][language]["tokens"], 1)
            for language, figures in row["languages"].items()
        },
    }
