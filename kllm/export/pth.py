"""Reads and writes `.pth` state dicts: MiniMind's three generations and their kin.

A `.pth` file has no config. Sizes come from its tensors, the rest from what its family publishes or
from the caller, and is reported as assumed; files that kllm wrote carry theirs as plain data in the
state dict's `_metadata`. Nothing but tensors and plain containers is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.export.hf import DTYPES
from kllm.export.pth_names import (
    MINIMIND1,
    MINIMIND2,
    Generation,
    file_tensors,
    half_rows,
    is_dropped,
    lora_module,
    recognise,
    strip,
)
from kllm.export.pth_shape import Inferred, check_assume, infer_shape, parse_config
from kllm.files import new_file
from kllm.model.presets import ModelShape, hf_model_type
from kllm.model.transformer import Transformer

MINIMIND_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 1.0,
}
"""MiniMind's `inference_rope_scaling`, for `assume`."""

_CONTAINERS = ("model", "state_dict", "model_state_dict", "state", "weights")
"""Where training checkpoints keep their weights: MiniMind, Lightning, QiChat (state, then weights)."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class PthModel:
    """A `.pth` file as kllm's own weights.

    `state` has the names of `Transformer.state_dict()` and the file's dtype, `generation` the family
    (minimind-3, minimind2, minimind-1, minimind-v1, qichat; kllm for our own files), `assumed` a line
    for everything that no tensor told.
    """

    state: dict[str, Tensor]
    shape: ModelShape
    generation: str
    assumed: list[str]


def read_pth(path: Path, assume: Mapping[str, Any] | None = None) -> PthModel:
    """Weights, shape and family of a `.pth` file.

    Args:
        path: a state dict of MiniMind (any generation), YuanMeng, MiniLLM, QiChat or kllm, alone or
            inside a training checkpoint.
        assume: goes before what the family publishes (`ASSUMABLE`).

    Raises:
        UserError: code in the file, no such model, tensors that do not fit together, NaN or Inf.
        KllmError: the file is damaged.
    """
    tensors, inferred, generation, name = _identify(path, assume)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"tensor {key} holds NaN or Inf", where=str(path))
    shape = inferred.shape
    return PthModel(_state(tensors, shape, inferred, generation), shape, name, inferred.assumed)


def peek_shape(path: Path, assume: Mapping[str, Any] | None = None) -> ModelShape:
    """The shape alone; weights stay on the disk. Errors as in `read_pth`, but for NaN."""
    return _identify(path, assume)[1].shape


def _identify(
    path: Path, assume: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], Inferred, Generation, str]:
    """Tensors under Hugging Face's names, checked against the shape they make."""
    where = str(path)
    said = check_assume(assume or {})
    found, text = _weights(_load(path), where)
    generation = recognise(found, said.get("num_attention_heads"), where)
    tensors = {}
    for name, tensor in found.items():
        if not is_dropped(name):
            module, dot, kind = name.rpartition(".")
            tensors[f"{generation.rename(module)}{dot}{kind}"] = tensor
    config = None if text is None else parse_config(text, where)
    inferred = infer_shape(tensors, generation, said, config, where)
    _check(tensors, file_tensors(inferred.shape, inferred.shared_widths), where)
    try:
        hf_model_type(inferred.shape)
    except UserError as e:
        raise UserError(e.message, where=where, hint=e.hint) from None
    if any(lora_module(name) for name in found):
        inferred.assumed.append("its LoRA matrices are not wanted (give it as --adapter too to merge them)")
    return tensors, inferred, generation, "kllm" if config is not None else generation.name


def load_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of torch.save by name, from wherever a training checkpoint keeps them.

    Raises:
        UserError: no such file, or code in it.
        KllmError: the file is damaged.
    """
    return _weights(_load(path), str(path))[0]


def _load(path: Path) -> Any:
    where = str(path)
    try:
        with path.open("rb") as f:
            start = f.read(4)
    except FileNotFoundError:
        raise UserError("no such file", where=where) from None
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror}", where=where) from None
    if not start:
        raise KllmError("the file is empty", where=where)
    zipped = start == b"PK\x03\x04"
    if not zipped and start[:1] != b"\x80":  # the first byte of every pickle since protocol 2
        raise UserError("not a file of torch.save", where=where)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # torch raises many kinds; the message tells which of two it is
        raise _refusal(e, where) from None


def _refusal(error: Exception, where: str) -> KllmError:
    message = str(error)
    if match := re.search(r"GLOBAL (\S+)", message):
        return UserError(
            f"contains code ({match.group(1)}); refused, none of it was run",
            where=where,
            hint="where it was made, save the tensors alone: torch.save(model.state_dict(), file)",
        )
    if type(error).__name__ == "UnpicklingError":
        return UserError(
            "holds more than tensors and plain containers, or is no file of torch.save", where=where
        )
    line = message.strip().splitlines()[0].split(". This is")[0] if message.strip() else type(error).__name__
    return KllmError(f"damaged or cut off: {line[:160]}", where=where, hint="copy it again")


def _weights(loaded: Any, where: str) -> tuple[dict[str, Tensor], str | None]:
    """The tensors by stripped name, and the config that kllm may have put beside them."""
    for _ in range(4):  # a crafted file can hold itself
        if isinstance(loaded, Mapping):
            loaded = next((loaded[k] for k in _CONTAINERS if isinstance(loaded.get(k), Mapping)), loaded)
    if not isinstance(loaded, Mapping):
        raise UserError(f"holds a {type(loaded).__name__}, not a state dict", where=where)
    metadata = getattr(loaded, "_metadata", None)
    text = metadata.get("kllm") if isinstance(metadata, Mapping) else None
    named = ((k, v) for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor))
    return {strip(name): tensor for name, tensor in named}, text


def _check(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """One line about the first tensor that is missing, of another shape or kind, or unknown."""
    for name, size in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            if name == "lm_head.weight":  # tied
                continue
            raise UserError(f"tensor {name} is missing", where=where)
        if tuple(tensor.shape) != size:
            raise UserError(
                f"tensor {name} has shape {tuple(tensor.shape)}, the others ask for {size}", where=where
            )
        if tensor.dtype not in _FLOATS or tensor.layout is not torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"tensor {name} is {kind}, not plain floats", where=where)
    if extra := sorted(set(tensors) - set(expected)):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"unknown tensor {extra[0]}{more}", where=where, hint="not an architecture kllm knows"
        )


def _state(
    tensors: dict[str, Tensor], shape: ModelShape, inferred: Inferred, generation: Generation
) -> dict[str, Tensor]:
    """Our names and forms, in memory of its own: the file may be overwritten while we work."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." in name or ".mlp.shared_experts." in name:
            continue
        if generation.pairwise and re.search(r"\.[qk]_proj\.", name):
            state[name] = half_rows(tensor, shape.head_dim)
        else:
            state[name] = tensor.clone()
    if shape.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for n in range(shape.num_hidden_layers if shape.is_moe else 0):
        mlp = f"model.layers.{n}.mlp"
        for part in _PARTS:
            each = [tensors[f"{mlp}.experts.{e}.{part}.weight"] for e in range(shape.num_experts)]
            state[f"{mlp}.experts.{part}"] = torch.stack(each)
            if inferred.shared_widths:  # several are one wider MLP: rows of gate and up, columns of down
                count = range(len(inferred.shared_widths))
                each = [tensors[f"{mlp}.shared_experts.{s}.{part}.weight"] for s in count]
                state[f"{mlp}.shared_expert.{part}.weight"] = torch.cat(each, int(part == "down_proj"))
    return state


def write_pth(model: Transformer, path: Path, dtype: str = "float32") -> None:
    """Writes a state dict under MiniMind's names, the file whole or not at all.

    `minimind_config` says whether MiniMind's own code runs it and with which config; `read_pth` gives
    every model back exactly, its config included.

    Args:
        model: any device.
        path: replaced if it exists; its directory is made.
        dtype: of the file, float32, bfloat16 or float16.

    Raises:
        UserError: `path` is a directory, or `dtype` is unknown.
        KllmError: no space, or a weight too large for `dtype`.
    """
    where = str(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown", where=where, hint=f"known: {', '.join(DTYPES)}")
    if path.is_dir():
        raise UserError("is a directory; a file is written", where=where)
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in _named(model):
        state[name] = tensor.detach().to("cpu", DTYPES[dtype], copy=True).contiguous()
        if not torch.isfinite(state[name]).all():
            message = f"tensor {name} has values that {dtype} cannot hold"
            raise KllmError(message, where=where, hint="--dtype bfloat16")
    # torch unpickles an OrderedDict's attributes; load_state_dict looks up only modules' paths in this one
    vars(state)["_metadata"] = {"": {"version": 1}, "kllm": json.dumps(model.shape.to_dict())}
    with new_file(path) as aside:
        _save(state, aside)


def _save(state: dict[str, Tensor], path: Path) -> None:
    try:
        with path.open("wb") as file:  # given a name, torch hides why it failed
            torch.save(state, file)
    except RuntimeError as e:  # its writer stumbles over what the file had said
        if isinstance(e.__context__, OSError):
            raise e.__context__ from None
        raise


def _named(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as MiniMind has them: experts one by one, shared experts of the same width."""
    shape = model.shape
    width = shape.moe_intermediate_size
    for name, tensor in model.state_dict().items():
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        if stem.endswith(".mlp.experts"):
            yield from ((f"{stem}.{e}.{part}.weight", tensor[e]) for e in range(shape.num_experts))
        elif stem.endswith(".mlp.shared_expert"):
            step = shape.shared_size if shape.shared_size % width else width
            for s, piece in enumerate(tensor.split(step, int(part == "down_proj"))):
                yield f"{stem}s.{s}.{part}.weight", piece
        else:
            yield name, tensor


def minimind_config(shape: ModelShape) -> tuple[str, dict[str, Any]]:
    """Which generation of MiniMind's code runs `write_pth`'s file exactly, and its config's arguments.

    Raises:
        UserError: none does; the message says why.
    """
    scaling = None if shape.rope_scaling is None else {"rope_type": "yarn", **shape.rope_scaling}
    generation = "minimind-3" if shape.qk_norm else "minimind2"
    k, narrow = shape.num_experts_per_tok, shape.head_dim * shape.num_attention_heads != shape.hidden_size
    shared = shape.shared_size // shape.moe_intermediate_size if shape.is_moe else 0
    for fault, reason in (
        (shape.attention_bias, "its projections have no biases"),
        (shape.no_rope_layers, "it uses RoPE in every layer"),
        (shape.shared_expert_gate, "its shared experts have no gate"),
        (shape.is_moe and shared * shape.moe_intermediate_size != shape.shared_size, "its experts are alike"),
        (scaling not in (None, MINIMIND_YARN), "its only RoPE scaling is YaRN, 16 times 2048"),
        (not shape.qk_norm and narrow, "its heads are hidden_size / num_attention_heads wide"),
        (not shape.qk_norm and not shape.tie_word_embeddings, "its head is tied"),
        (not shape.qk_norm and k == 1 and shape.norm_topk_prob, "it does not renormalise a lone expert"),
        (shape.qk_norm and shared, "it has no shared experts"),
    ):
        if fault:
            raise UserError(f"MiniMind's code cannot run this model: {reason} ({generation})")
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = {name: getattr(shape, name) for name in (*same, "rms_norm_eps", "rope_theta")}
    config |= {"max_position_embeddings": shape.max_position_embeddings, "use_moe": shape.is_moe}
    config |= {"inference_rope_scaling": scaling is not None, "intermediate_size": shape.intermediate_size}
    if shape.qk_norm:
        config |= {"head_dim": shape.head_dim, "tie_word_embeddings": shape.tie_word_embeddings}
    if shape.is_moe:
        config |= {"num_experts_per_tok": k, "norm_topk_prob": shape.norm_topk_prob}
        config["intermediate_size"] = shape.moe_intermediate_size
        config["num_experts" if shape.qk_norm else "n_routed_experts"] = shape.num_experts
        config |= {} if shape.qk_norm else {"n_shared_experts": shared}
    return generation, config


def read_lora_pth(path: Path, head_dim: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices of a MiniMind LoRA file: module name -> (A [r, in], B [out, r]), float32.

    The change of a weight is B A with no further scale (seed catalogue 3.4).

    Args:
        path: the file; a whole model with LoRA beside its weights serves too.
        head_dim: of the base; only files of the first generation need it (8 heads if None).

    Raises:
        UserError: code in the file, no LoRA in it, halves missing or not fitting, NaN or Inf.
        KllmError: the file is damaged.
    """
    where = str(path)
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_weights(path).items():
        if found := lora_module(name):
            halves.setdefault(found[0], {})[found[1]] = tensor
    if not halves:
        raise UserError(
            "no LoRA matrices in it", where=where, hint="keys end in .lora.A.weight, .lora.B.weight"
        )
    generation = MINIMIND1 if any(".attention.w" in module for module in halves) else MINIMIND2
    pairs = {}
    for module, parts in halves.items():
        if set(parts) != {"A", "B"}:
            raise UserError(f"{module} has only one of lora.A and lora.B", where=where)
        a, b = parts["A"].float(), parts["B"].float()
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise UserError(
                f"{module}: B {tuple(b.shape)} times A {tuple(a.shape)} is no product", where=where
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise UserError(f"{module}: its LoRA holds NaN or Inf", where=where)
        name = generation.rename(module)
        if generation.pairwise and name.endswith(("q_proj", "k_proj")):
            dim = head_dim or b.shape[0] // MINIMIND1.num_attention_heads
            if not dim or dim % 2 or b.shape[0] % dim:
                raise UserError(f"{module}: {b.shape[0]} rows are no heads of {dim}", where=where)
            b = half_rows(b, dim)
        pairs[name] = (a, b)
    return pairs
