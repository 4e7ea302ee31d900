"""A model directory with random weights and a real, quickly trained tokenizer, for the chat tests."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from kllm.export.hf import save_model
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

TEXT = [
    "the cat sat on the mat and ate the fish",
    "where is the cat? the cat is here.",
    "你好，世界。猫在哪里？",
]


@functools.cache
def chat_tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT * 5, 320, max_bytes=1_000_000, min_frequency=1)[0]


def chat_model(directory: Path, *, context: int = 8192, template: bool = True) -> Path:
    """Writes the model; its greedy answers never end by themselves."""
    trained = chat_tokenizer()
    shape = ModelShape(
        vocab_size=trained.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = Transformer(shape)
    model.init_weights(1)
    with torch.no_grad():  # 0 is never the highest of 320 random logits: no control token is chosen
        model.lm_head.weight[list(trained.added_tokens.values())] = 0
    save_model(model, trained, directory)
    if not template:
        strip_template(directory)
    return directory


def strip_template(directory: Path) -> None:
    """Turns a chat model's tokenizer into a bare one, as of a model that was only pretrained elsewhere."""
    import json

    (directory / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        file = directory / name
        text = file.read_text(encoding="utf-8")
        text = text.replace("<|im_start|>", "<|a|>").replace("<|im_end|>", "<|b|>")
        config = json.loads(text)
        config.pop("chat_template", None)
        file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    assert Tokenizer.load(directory).chat_template is None
