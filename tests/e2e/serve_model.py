"""The small random model that the server's tests serve, and its tokenizer. No torch."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

REPO = Path(__file__).parents[2]
KIT = Path(os.environ.get("KLLM_DATA_KIT", REPO.parent / "shared" / "data"))
CONTEXT = 2048
HIDDEN = 64
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\nTools:\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if not (enable_thinking or open_thinking) %}{{- '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""  # where the data kit is absent; it opens and closes the thinking as MiniMind's does


def scratch() -> Path:
    """A directory that is gone when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="kllm-serve-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@functools.cache
def model_dir(name: str = "tiny", context: int = CONTEXT, greedy: bool = False) -> Path:
    """A Qwen3-shaped model whose random logits never choose a control token by themselves.

    `greedy` writes a generation_config.json that makes every answer greedy.
    """
    directory = scratch() / name
    directory.mkdir()
    kit = KIT / "tokenizers" / "minimind"
    if kit.exists():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(kit / file, directory / file)
    else:
        _train_tokenizer(directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size(with_added_tokens=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    (directory / "config.json").write_text(json.dumps(config))
    if greedy:
        (directory / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 1}))
    save_file(_weights(config, tokenizer), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _train_tokenizer(directory: Path) -> None:
    from kllm.tokenizer.train import train_tokenizer

    texts = ["the cat sat on the mat and ate the fish", "where is the cat?", "你好，世界。猫在哪里？"]
    trained, _ = train_tokenizer(texts * 5, 400, max_bytes=1_000_000, min_frequency=1)
    trained.with_chat_template(TEMPLATE).save(directory)


def _weights(config: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = 4 * 16, 2 * 16

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.3).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(vocab, hidden), "lm_head.weight": normal(vocab, hidden)}
    tensors["lm_head.weight"][list(tokenizer.get_added_tokens_decoder())] = 0
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors[at + "self_attn.q_proj.weight"] = normal(queries, hidden)
        tensors[at + "self_attn.k_proj.weight"] = normal(keys, hidden)
        tensors[at + "self_attn.v_proj.weight"] = normal(keys, hidden)
        tensors[at + "self_attn.o_proj.weight"] = normal(hidden, queries)
        tensors[at + "mlp.gate_proj.weight"] = normal(inner, hidden)
        tensors[at + "mlp.up_proj.weight"] = normal(inner, hidden)
        tensors[at + "mlp.down_proj.weight"] = normal(hidden, inner)
        for norm, size in (("self_attn.q_norm", 16), ("self_attn.k_norm", 16), ("input_layernorm", hidden)):
            tensors[f"{at}{norm}.weight"] = np.ones(size, np.float32)
        tensors[at + "post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    return tensors


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    """The model's tokenizer as the `tokenizers` package reads it."""
    return tokenizers.Tokenizer.from_file(str(model_dir() / "tokenizer.json"))


@functools.cache
def added_tokens() -> dict[str, int]:
    return {token.content: index for index, token in tokenizer().get_added_tokens_decoder().items()}


def token_id(text: str) -> int:
    """The id of an added token; of a text that is one token otherwise."""
    if text in added_tokens():
        return added_tokens()[text]
    ids = encode(text)
    assert len(ids) == 1, f"{text!r} is {len(ids)} tokens"
    return ids[0]


def end_of_turn() -> str:
    """The id of the token that ends a message, as a key of JSON."""
    return str(added_tokens()["<|im_end|>"])


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def decode(ids: Iterable[int]) -> str:
    return tokenizer().decode(list(ids), skip_special_tokens=False)


def chat_template() -> str:
    """The template's source, from the file or from the tokenizer's configuration."""
    file = model_dir() / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    return json.loads((model_dir() / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
