"""`--assume KEY=VALUE`: what the tensors of a bare `.pth` cannot tell."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kllm.errors import UserError

KEYS = {
    "num_attention_heads": int,
    "num_experts_per_tok": int,
    "norm_topk_prob": bool,
    "rope_theta": float,
    "rms_norm_eps": float,
    "max_position_embeddings": int,
}
ASSUME = Annotated[
    list[str] | None,
    typer.Option(
        "--assume",
        metavar="KEY=VALUE",
        help=f"For a .pth, what no tensor tells: {', '.join(KEYS)}. Repeat for several.",
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
            if KEYS[key] is bool:
                found[key] = {"true": True, "false": False}[value.lower()]
            else:
                found[key] = KEYS[key](value)
        except (ValueError, KeyError):
            raise UserError(f"{value!r} is no value of {key}", where="flag --assume") from None
    return found
