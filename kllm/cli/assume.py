"""`--assume KEY=VALUE`: what the tensors of a bare `.pth` cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from kllm.errors import UserError


def _switch(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _scaling(text: str) -> dict[str, Any]:
    """MiniMind's own stretch, the one that its `inference_rope_scaling` turns on."""
    from kllm.export.pth import MINIMIND_YARN

    return {"yarn": MINIMIND_YARN}[text]


KEYS: dict[str, Callable[[str], Any]] = {
    "num_attention_heads": int,
    "num_experts_per_tok": int,
    "norm_topk_prob": _switch,
    "rope_theta": float,
    "rope_scaling": _scaling,
    "rms_norm_eps": float,
    "max_position_embeddings": int,
}
ASSUME = Annotated[
    list[str] | None,
    typer.Option(
        "--assume",
        metavar="KEY=VALUE",
        help="For a .pth, what no tensor tells: "
        + ", ".join(KEYS).replace("rope_scaling", "rope_scaling (yarn: MiniMind's own)")
        + ". Repeat for several.",
    ),
]


def assumptions(given: list[str] | None) -> dict[str, Any]:
    """The values by name; UserError for an unknown name or a value of another type."""
    found: dict[str, Any] = {}
    for text in given or []:
        key, sign, value = text.partition("=")
        if not sign or key not in KEYS:
            raise UserError(f"{text!r}", where="flag --assume", hint=f"KEY=VALUE; keys: {', '.join(KEYS)}")
        try:
            found[key] = KEYS[key](value)
        except (ValueError, KeyError):
            raise UserError(f"{value!r} is no value of {key}", where="flag --assume") from None
    return found
