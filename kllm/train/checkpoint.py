"""Checkpoints: a Hugging Face directory plus `state/`, written whole or not at all.

What is kept: weights (float32), optimiser moments, the step and counters, the data cursor, the
half-added metrics. Randomness is a function of (seed, step), so there is none to keep. When an adapter is
trained, it alone is kept: as a PEFT directory `adapter/`, and bit for bit in `state/`; the frozen weights
are where the stage found them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kllm.errors import KllmError, UserError
from kllm.export.adapter import save_adapter
from kllm.export.hf import check_state, read_shape, read_tensors, write_model_files
from kllm.export.mapping import hf_to_state
from kllm.export.resolve import COMPLETE, complete_checkpoints
from kllm.files import new_directory, remove_leftovers, write_json
from kllm.model.lora import is_adapted, load_lora_state, lora_state
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.train.objective import TrainState

_FULL = ("No space left", "os error 28", "ENOSPC", "file write failed", "unexpected pos")


def checkpoint_dir(stage_dir: Path, step: int) -> Path:
    return stage_dir / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    stage_dir: Path,
    model: Any,
    tokenizer: Tokenizer | None,
    optimizers: Any,
    state: TrainState,
    extra: dict[str, Any],
    objective: torch.nn.Module | None = None,
    base: str = "",
) -> Path:
    """Writes checkpoints/step-N; a crash or a full disk leaves the earlier ones as they were.

    Args:
        stage_dir: of the stage.
        model, tokenizer: saved as a model directory.
        optimizers: its state_dict goes to state/optimizer.pt.
        state: counters.
        extra: JSON-able states of the source and the meters.
        objective: its parameters go to state/objective.pt, where it has any.
        base: name of the model that an adapter belongs to.
    """
    path = checkpoint_dir(stage_dir, state.step)
    _check_space(path.parent, model)
    try:
        with new_directory(path) as aside:
            (aside / "state").mkdir()
            if is_adapted(model):
                save_adapter(model, aside / "adapter", base=base)
                torch.save(lora_state(model), aside / "state" / "lora.pt")
            else:
                write_model_files(model, tokenizer, aside)
            if objective is not None:
                torch.save(objective.state_dict(), aside / "state" / "objective.pt")
            torch.save(optimizers.state_dict(), aside / "state" / "optimizer.pt")
            write_json(aside / "state" / "trainer.json", {"train": state.state_dict(), **extra})
            (aside / COMPLETE).write_text(f"{state.step}\n", encoding="utf-8")
    except (RuntimeError, SafetensorError) as e:
        if not any(sign in str(e) for sign in _FULL):
            raise
        raise KllmError(
            "cannot write: no space left on the device",
            where=str(path),
            hint="the earlier checkpoint is intact; free some space, then run the same command again",
        ) from e
    return path


def _check_space(directory: Path, model: Any) -> None:
    """Weights and two moments in float32; refused before a byte is written."""
    directory.mkdir(parents=True, exist_ok=True)
    need = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    free = shutil.disk_usage(directory).free
    if free < need:
        raise KllmError(
            f"cannot write: no space left on the device ({need >> 20} MiB needed, {free >> 20} MiB free)",
            where=str(directory),
            hint="the earlier checkpoint is intact; free some space, then run the same command again",
        )


def load_weights(path: Path, model: Any) -> None:
    """Takes over the weights of a checkpoint, or, in an adapted model, its adapter.

    Raises:
        UserError: the checkpoint belongs to a model of another shape.
        KllmError: it is damaged.
    """
    if is_adapted(model):
        load_lora_state(model, _read_state(path, "lora.pt"))
        return
    tensors, _ = hf_to_state(read_tensors(path), read_shape(path), str(path))
    check_state(tensors, model, str(path))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[name])


def _read_state(path: Path, name: str) -> dict[str, Any]:
    """A file of `state/`: a JSON object, or a dictionary that torch wrote."""
    file = path / "state" / name
    try:
        if name.endswith(".json"):
            found = json.loads(file.read_text(encoding="utf-8"))
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(found, dict):
            return found
        reason = "not a dictionary"
    except (PermissionError, MemoryError):
        raise
    except Exception as e:  # torch raises many kinds
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
    hint = f"delete {path} to continue from the one before"
    raise KllmError(f"damaged checkpoint: {reason}", where=str(file), hint=hint)


def load_checkpoint(
    path: Path, model: Any, optimizers: Any, state: TrainState, objective: torch.nn.Module | None = None
) -> dict[str, Any]:
    """Restores model, optimisers, counters and the objective's parameters; returns the extra states.

    Raises:
        UserError: the checkpoint belongs to a model of another shape.
        KllmError: it is damaged.
    """
    load_weights(path, model)
    if objective is not None:
        objective.load_state_dict(_read_state(path, "objective.pt"))
    saved = _read_state(path, "optimizer.pt")
    try:
        optimizers.load_state_dict(saved)
    except (KeyError, ValueError) as e:
        file = str(path / "state" / "optimizer.pt")
        message = f"the optimiser's state does not fit: {e}"
        raise UserError(message, where=file, hint="start again with --fresh") from None
    extra = _read_state(path, "trainer.json")
    state.load_state_dict(extra.pop("train"))
    return extra


def latest_checkpoint(stage_dir: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and torn leftovers (removed) to tell the user about."""
    directory = stage_dir / "checkpoints"
    torn = remove_leftovers(directory) if directory.exists() else []
    found = complete_checkpoints(stage_dir)
    return (found[-1] if found else None), torn


def prune_checkpoints(stage_dir: Path, keep_last: int, keep_step: int | None) -> None:
    """Deletes all but the newest `keep_last` and the best."""
    found = complete_checkpoints(stage_dir)
    for path in found[:-keep_last]:
        if keep_step is not None and path == checkpoint_dir(stage_dir, keep_step):
            continue
        # renamed first: a half-deleted folder must not look like a checkpoint
        doomed = path.with_name(f".{path.name}.old-pruned")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
