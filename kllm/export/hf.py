"""A model on disk is a Hugging Face directory: the one mapping table, saving, loading, resolving.

Names in memory are Hugging Face's but for experts (stacked in memory, one tensor each on disk) and
the gateless shared expert, which Qwen2-MoE runs exactly with a zero gate (sigmoid = 1/2) and a
doubled down projection.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kllm.errors import KllmError, UserError
from kllm.export.config import config_to_shape, generation_config, shape_to_config
from kllm.export.shards import save_tensors
from kllm.files import new_directory, write_json
from kllm.model.presets import ModelShape, hf_model_type
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = re.compile(r"(.*)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")
_FUSED = re.compile(r"(.*)\.mlp\.experts\.(gate_up|gate|up|down)_proj$")


def state_to_hf(state: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Tensors of a Transformer under the names and forms of its Hugging Face architecture."""
    model_type = hf_model_type(shape)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and shape.tie_word_embeddings and not shape.is_moe:
            continue
        if fused := _FUSED.match(name):
            prefix, part = fused.group(1), f"{fused.group(2)}_proj"
            for e in range(shape.num_experts):
                if model_type == "mixtral":
                    out[f"{prefix}.block_sparse_moe.experts.{e}.{_MIXTRAL[part]}.weight"] = tensor[e]
                else:
                    out[f"{prefix}.mlp.experts.{e}.{part}.weight"] = tensor[e]
        elif name.endswith(".mlp.gate.weight") and model_type == "mixtral":
            out[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
        elif name.endswith(".mlp.shared_expert.down_proj.weight") and not shape.shared_expert_gate:
            out[name] = tensor * 2
        else:
            out[name] = tensor
    _add_neutral(out, state, shape, model_type)
    return out


def _add_neutral(
    out: dict[str, Tensor], state: dict[str, Tensor], shape: ModelShape, model_type: str
) -> None:
    """Zero tensors that an architecture's readers expect and that change nothing."""
    embedding = state["model.embed_tokens.weight"]
    if shape.is_moe and shape.tie_word_embeddings:
        out["lm_head.weight"] = embedding.clone()
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        if model_type == "qwen2_moe":
            if not shape.attention_bias:
                for part, size in (("q", shape.q_size), ("k", shape.kv_size), ("v", shape.kv_size)):
                    out[f"{layer}.self_attn.{part}_proj.bias"] = embedding.new_zeros(size)
            if not shape.shared_expert_gate:
                out[f"{layer}.mlp.shared_expert_gate.weight"] = embedding.new_zeros(1, shape.hidden_size)
        elif model_type == "llama" and shape.attention_bias:
            out[f"{layer}.self_attn.o_proj.bias"] = embedding.new_zeros(shape.hidden_size)


def hf_to_state(
    tensors: dict[str, Tensor], shape: ModelShape, where: str
) -> tuple[dict[str, Tensor], ModelShape]:
    """The inverse of `state_to_hf`; also says what the tensors reveal (tying, gates, biases)."""
    tensors = {_canonical(n): t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    state: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.match(name):
            key = (match.group(1), f"{match.group(3)}_proj")
            experts.setdefault(key, {})[int(match.group(2))] = tensor
        elif name.endswith(".mlp.experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            state[stem + "gate_proj"], state[stem + "up_proj"] = tensor.chunk(2, dim=1)
        else:
            state[name] = tensor
    for (prefix, part), by_number in experts.items():
        stacked = [by_number[e] for e in sorted(by_number)]
        state[f"{prefix}.mlp.experts.{part}"] = torch.stack(stacked)
    shape = _drop_neutral(state, shape, where)
    return state, shape


def _canonical(name: str) -> str:
    for old, new in (("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w3.", ".up_proj.")):
        name = name.replace(old, new)
    name = name.replace(".w2.", ".down_proj.")
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _drop_neutral(state: dict[str, Tensor], shape: ModelShape, where: str) -> ModelShape:
    for name in [n for n in state if n.endswith("o_proj.bias")]:
        if state.pop(name).any():
            raise UserError("a bias on o_proj that is not zero cannot be represented", where=where)
    gates = [n for n in state if n.endswith("shared_expert_gate.weight")]
    if gates and not any(state[n].any() for n in gates):  # kllm's own gateless shared expert
        for name in gates:
            del state[name]
        for name in [n for n in state if n.endswith("shared_expert.down_proj.weight")]:
            state[name] = state[name] / 2
    elif gates:
        shape = shape.with_(shared_expert_gate=True)
    biases = [n for n in state if n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    if shape.is_moe and biases and not any(state[n].any() for n in biases):
        for name in biases:
            del state[name]
        biases = []
    shape = shape.with_(attention_bias=bool(biases))
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    tied = head is None or shape.tie_word_embeddings
    if head is not None and embedding is not None and shape.is_moe:
        tied = torch.equal(head, embedding)
    if tied and embedding is not None:
        state["lm_head.weight"] = embedding
    return shape.with_(tie_word_embeddings=tied)


def save_model(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: Path,
    *,
    dtype: str = "float32",
    files: dict[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a directory that transformers and vLLM load with no custom code; whole or not at all.

    Args:
        model: the model (any device).
        tokenizer: saved beside it; its special ids go into the configs.
        directory: replaced if it exists.
        dtype: of the file, float32, bfloat16 or float16.
        files: further text files by name (README.md).
        max_shard_bytes: weights above this size are split into several files with an index.
    """
    with new_directory(directory) as aside:
        write_model_files(model, tokenizer, aside, dtype=dtype, max_shard_bytes=max_shard_bytes)
        for name, text in (files or {}).items():
            (aside / name).write_text(text, encoding="utf-8")


def write_model_files(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> None:
    """`save_model` into a directory that somebody else makes atomic (a checkpoint)."""
    shape = model.shape
    tensors = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in state_to_hf(model.state_dict(), shape).items()
    }
    save_tensors(tensors, directory, max_shard_bytes)
    stops = list(tokenizer.stop_token_ids) if tokenizer else [2, 0]
    pad = tokenizer.pad_token_id if tokenizer else 0
    bos = tokenizer.bos_token_id if tokenizer else None
    eos = tokenizer.eos_token_id if tokenizer else 2
    write_json(
        directory / "config.json",
        shape_to_config(shape, dtype=dtype, eos_token_id=eos, pad_token_id=pad, bos_token_id=bos),
    )
    write_json(directory / "generation_config.json", generation_config(stops, pad, bos))
    if tokenizer is not None:
        tokenizer.save(directory)


def read_shape(directory: Path) -> ModelShape:
    """The shape that config.json declares (tensors may refine it at load)."""
    file = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no config.json: not a model directory", where=str(directory)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"broken JSON: {e}", where=str(file)) from None
    return config_to_shape(config, where=str(file))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, its shards, or pytorch_model*.bin (weights only)."""
    files = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise UserError("no model.safetensors: not a model directory", where=str(directory))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".bin":
            tensors.update(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
            continue
        try:
            with safe_open(file, framework="pt") as f:
                tensors.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise KllmError(f"damaged weights: {e}", where=str(file)) from None
    return tensors


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer, Tokenizer | None]:
    """The model in `path` (anything `resolve` takes) and its tokenizer, if it has one."""
    from kllm.export.resolve import resolve

    directory = resolve(path)
    state, shape = hf_to_state(read_tensors(directory), read_shape(directory), str(directory))
    with torch.device("meta"):
        model = Transformer(shape)
    check_state(state, model, str(directory))
    model.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    if shape.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").exists() else None
    model = model.to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, tokenizer


def check_state(state: dict[str, Tensor], model: Transformer, where: str) -> None:
    """One line about the first missing, extra or misshapen tensor; never a partial load."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"tensor {name} is missing", where=where)
        if tuple(state[name].shape) != tuple(tensor.shape):
            raise UserError(
                f"tensor {name} has shape {tuple(state[name].shape)}, the config says {tuple(tensor.shape)}",
                where=where,
            )
    if extra := sorted(set(state) - set(expected)):
        raise UserError(f"unknown tensor {extra[0]}", where=where, hint="not an architecture kllm knows")
