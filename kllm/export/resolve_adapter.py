"""One resolver for everything that can stand where an adapter is expected. No torch: paths only."""

from __future__ import annotations

import json
from pathlib import Path

from kllm.errors import UserError
from kllm.export.resolve import ADAPTER_CONFIG, find_adapter, resolve

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


def check_unmerged(model: str | Path, adapter: str | Path) -> None:
    """An adapter goes on its base, not on the `final` of its own stage, which has it merged in already.

    Args:
        model, adapter: whatever `resolve` and `resolve_adapter` take; what is on the hub has no stages.

    Raises:
        UserError: it is the same stage's, or one of them cannot be found.
    """
    places = Path(model).expanduser(), Path(adapter).expanduser()
    if not all(place.exists() for place in places):
        return
    final, own = resolve(places[0]).resolve(), resolve_adapter(places[1]).resolve()
    stage = final.parent
    if final.name != "final" or final in own.parents or stage not in own.parents:
        return
    if (stage / "status.json").is_file():
        message = f"it is merged into {model} already"
        raise UserError(message, where=str(adapter), hint=f"name its base instead: {_named_base(own)}")


def _named_base(folder: Path) -> str:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"] or "MODEL")
    except (OSError, ValueError, TypeError, KeyError):
        return "MODEL"
