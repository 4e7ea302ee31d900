"""Built-in data: bilingual, for every stage, the same for a seed on every platform.

`world` is a small closed world, told and asked about; `identity` a persona to teach to a model of it;
`reasoning` problems of it that are thought through; `tools` conversations with tools to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kllm.data.builtin import identity, reasoning, tools
from kllm.data.builtin.splits import SPLITS
from kllm.data.builtin.world import World, world
from kllm.errors import UserError

SUBJECTS: dict[str, Mapping[str, Callable[[World], Iterator[dict[str, Any]]]]] = {
    "world": SPLITS,
    "identity": identity.SPLITS,
    "reasoning": reasoning.SPLITS,
    "tools": tools.SPLITS,
}


def generate(split: str, seed: int = 0, subject: str = "world") -> Iterator[dict[str, Any]]:
    """Records of one split of a subject: `pretrain`, `sft`, `preference`, `rl`, `tools`, `eval` of the world.

    Raises:
        UserError: there is no such subject or split.
    """
    splits = SUBJECTS.get(subject)
    if splits is None:
        raise UserError(f"no built-in data {subject!r}", hint=f"known: {', '.join(SUBJECTS)}")
    if split not in splits:
        raise UserError(f"no split {split!r} in builtin:{subject}", hint=f"splits: {', '.join(splits)}")
    return splits[split](world(seed))
