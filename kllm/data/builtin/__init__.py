"""The built-in small world: bilingual data for every stage, the same for a seed on every platform."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kllm.data.builtin.splits import SPLITS
from kllm.data.builtin.world import world
from kllm.errors import UserError


def generate(split: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of one split: pretrain, sft, preference, rl, tools or eval.

    Raises:
        UserError: there is no such split.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r} in builtin:world", hint=f"splits: {', '.join(SPLITS)}")
    return SPLITS[split](world(seed))
