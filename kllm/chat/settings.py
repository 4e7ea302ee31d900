"""Sampling options that can be changed while talking, from their texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kllm.chat.model import Settings
from kllm.engine import SamplingParams
from kllm.errors import UserError

OPTIONS: dict[str, Callable[[str], Any]] = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
_NONE = ("none", "-", "", "default")


def set_option(settings: Settings, key: str, value: str) -> Settings:
    """`settings` with one option changed from its text; `none` gives it back to the model.

    Raises:
        UserError: unknown option, not a number, or out of range.
    """
    key = key.replace("-", "_")
    if key not in OPTIONS:
        raise UserError("unknown option", where=key, hint=f"known: {', '.join(OPTIONS)}")
    sampling = dict(settings.sampling)
    if value.lower() in _NONE and (value or key == "seed"):
        sampling.pop(key, None)
        return replace(settings, sampling=sampling)
    try:
        sampling[key] = OPTIONS[key](value)
    except ValueError:
        raise UserError(f"must be a number, not {value!r}", where=key) from None
    SamplingParams(**{key: sampling[key]})  # says what is out of range
    return replace(settings, sampling=sampling)


def shown(sampling: Mapping[str, Any]) -> str:
    """The options that are set, in a line."""
    return "  ".join(f"{name}={value}" for name, value in sampling.items()) or "the model's defaults"
