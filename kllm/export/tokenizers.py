"""The tokenizer of anything that has one: a folder, a run, a model, a GGUF file. No torch unless GGUF."""

from __future__ import annotations

from pathlib import Path

from kllm.export.resolve import resolve_tokenizer, tokenizer_beside
from kllm.tokenizer.source import template_text
from kllm.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer behind a run, a stage, a model, a GGUF file, a tokenizer directory or a hub id.

    Args:
        chat_template: template text, or the path of a .jinja file, instead of its own.
    """
    place = resolve_tokenizer(path)
    if place.suffix != ".gguf":
        return Tokenizer.load(place, chat_template=chat_template)
    from kllm.export.gguf_read import open_gguf

    found = open_gguf(place).tokenizer()
    if chat_template is not None:
        found = found.with_chat_template(template_text(chat_template)[0])
    return found


def tokenizer_of(place: Path) -> Tokenizer | None:
    """The tokenizer of what `resolve` found, None if it has none."""
    if place.suffix == ".gguf":
        return load_tokenizer(place)
    beside = tokenizer_beside(place)
    return Tokenizer.load(beside) if beside is not None else None
