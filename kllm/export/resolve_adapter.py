"""One resolver for everything that can stand where an adapter is expected. No torch: paths only."""

from __future__ import annotations

from pathlib import Path

from kllm.errors import UserError
from kllm.export.resolve import ADAPTER_CONFIG, find_adapter

KINDS = "an adapter is a PEFT folder, a LoRA run or stage, a MiniMind LoRA .pth or a hub id"


def resolve_adapter(reference: str | Path) -> Path:
    """What holds the adapter behind a PEFT directory, a run, a stage, a file or a hub id.

    Returns:
        A PEFT directory, or a `.pth` file of MiniMind's.

    Raises:
        UserError: nothing there, or no adapter in it.
    """
    place = Path(reference).expanduser()
    if not place.exists():
        from kllm.export.hub import fetch, is_hub_id

        if not is_hub_id(str(reference)):
            raise UserError("no such adapter", where=str(reference), hint=KINDS)
        return fetch(str(reference), "adapter")
    if place.is_file():
        return place.parent if place.name == ADAPTER_CONFIG else place
    found = find_adapter(place)
    if found is None:
        raise UserError("no adapter in it", where=str(reference), hint=KINDS)
    return found
