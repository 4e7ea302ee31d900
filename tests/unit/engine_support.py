"""A random little model and a tokenizer whose tokens are bytes, for the engine's tests."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

import torch

from kllm.engine import Completion, Engine, SamplingParams
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer

EOS = 256
SHAPE = ModelShape(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=640,
    initializer_range=0.3,
)


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tiny_model(seed: int = 0, **changes: object) -> Transformer:
    model = Transformer(SHAPE.with_(**changes))
    model.init_weights(seed)
    return model.eval()


def ids(count: int, seed: int = 0) -> list[int]:
    """A random prompt."""
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def tokens_of(completions: Iterable[Completion]) -> list[list[int]]:
    return [c.token_ids for c in completions]


def small(model: Transformer, tokens: int, **options: Any) -> Engine:
    """An engine with room for so many tokens."""
    bytes_per_token = Engine(model, None).scheduler.rows.token_bytes
    return Engine(model, None, kv_memory=tokens * bytes_per_token, **options)


class ByteTokenizer:
    """Token i is byte i; 256 ends the text."""

    stop_token_ids = (EOS,)
    special_tokens = {"<end>": EOS}  # noqa: RUF012

    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def stream_decoder(self, prompt=(), shown=()) -> ByteDecoder:
        decoder = ByteDecoder()
        for token in prompt:
            decoder.put(token)
        return decoder


class ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token: int) -> str:
        return self._utf8.decode(bytes([token])) if token < 256 else ""

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class Scripted:
    """A prepared model that always says `text`, whatever it is asked, then ends: the engine without weights."""

    shape = SHAPE
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, text: bytes, prompt_length: int = 3) -> None:
        self.script = [*text, EOS]
        self.prompt_length = prompt_length

    def ensure_context(self, length: int) -> None:
        pass

    def __call__(self, tokens, positions, cache):
        for layer in range(self.shape.num_hidden_layers):
            kv = torch.zeros(len(tokens), 2, 8)
            cache.attend(layer, torch.zeros(len(tokens), 4, 8), kv, kv)
        return positions[:, None].float()

    def logits(self, hidden):
        said = (hidden[..., 0].long() - self.prompt_length + 1).clamp(0, len(self.script) - 1)
        return torch.nn.functional.one_hot(torch.tensor(self.script)[said], 257).float() * 50
