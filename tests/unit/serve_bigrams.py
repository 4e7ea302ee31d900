"""A bigram table in the place of the engine, behind the real runtime: what it must answer is known exactly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from torch import Tensor

from kllm.engine.params import EngineStats, Event, SamplingParams, TokenLogprob
from kllm.engine.stops import StopMatcher
from kllm.errors import UserError
from kllm.serve.app import create_app
from kllm.serve.registry import Registry, Served
from kllm.serve.runtime import EngineRuntime
from kllm.serve.settings import Settings
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.source import Source
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

CONTEXT, WIDTH = 64, 8
TEXT = ["the cat sat on the mat and ate the fish", "你好，世界。猫在哪里？"]


@cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE: most Chinese characters are several tokens."""
    return train_tokenizer(TEXT * 5, 300, max_bytes=100_000, min_frequency=1)[0]


@cache
def sentencepiece() -> Tokenizer:
    """A SentencePiece-like vocabulary: a byte token beside the same letter, and a control token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "<0xE4>": 4, "A": 5, "▁": 6, "▁A": 7}
    vocab |= {"<0xBD>": 8, "<0xA0>": 9}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": t, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for t, i in vocab.items() if t in ("<unk>", "<s>", "</s>")
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "A"]], "unk_token": "<unk>",
                  "byte_fallback": True, "fuse_unk": True},
    }  # fmt: skip
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(Source(where="test", spec=json.dumps(spec), config=config, chat_template=None))


@dataclass
class _Running:
    prompt: list[int]
    params: SamplingParams
    decoder: Any
    stops: StopMatcher
    noise: torch.Generator
    output: list[int]


class Bigrams:
    """The engine's interface over log-probabilities that depend on the last token alone.

    Args:
        follows: for some tokens, the one that comes next for certain.
    """

    def __init__(self, follows: dict[int, int] | None = None, max_context: int = CONTEXT) -> None:
        self.tokenizer = tokenizer()
        vocab = self.tokenizer.vocab_size
        scores = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(5)) * 3
        scores[:, list(self.tokenizer.special_tokens.values())] = -9.0
        for token, after in (follows or {}).items():
            scores[token, after] = 50.0
        self.table: Tensor = scores.log_softmax(-1)
        self.max_context = max_context
        self.shape = SimpleNamespace(vocab_size=vocab, hidden_size=WIDTH)
        self.requests: dict[int, _Running] = {}
        self.count = 0
        self.cancelled: list[int] = []
        self.embedded: list[tuple[list[int], str]] = []

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        if not prompt or max(prompt) >= self.shape.vocab_size:
            raise UserError("a bad prompt came as far as the engine", where="prompt")

    def submit(self, prompt: list[int], params: SamplingParams) -> int:
        self.count += 1
        noise = torch.Generator().manual_seed(params.seed if params.seed is not None else self.count)
        decoder = self.tokenizer.stream_decoder(prompt=prompt)
        self.requests[self.count] = _Running(prompt, params, decoder, StopMatcher(params.stop), noise, [])
        return self.count

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self.requests.pop(number, None)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Event]:
        return [self._advance(number, one) for number, one in list(self.requests.items())]

    def fail_all(self, message: str) -> list[Event]:
        numbers, self.requests = list(self.requests), {}
        return [Event(number, (), "", "error", message=message) for number in numbers]

    def embed(self, prompt: list[int], pooling: str, adapter: str | None = None) -> Tensor:
        self.embedded.append((prompt, pooling))
        rows = self.table[prompt, :WIDTH]
        return rows.mean(0) if pooling == "mean" else rows[-1]

    def stats(self) -> EngineStats:
        return EngineStats(len(self.requests), 0, 100, 100, 0, 0, 0, 0, 0, 0, 0)

    def _advance(self, number: int, one: _Running) -> Event:
        params, first, shown = one.params, not one.output, None
        if first and params.prompt_logprobs is not None:
            pairs = zip(one.prompt, one.prompt[1:], strict=False)
            shown = (None, *(self.logprob(a, b, params.prompt_logprobs) for a, b in pairs))
        tokens: tuple[int, ...] = ()
        text, reason, logprobs = "", None, ()
        limit = min(params.max_tokens, self.max_context - len(one.prompt))
        if len(one.output) < limit:
            last = (one.prompt + one.output)[-1]
            token = self.draw(last, one)
            one.output.append(token)
            tokens = (token,)
            if params.logprobs is not None:
                logprobs = (self.logprob(last, token, params.logprobs),)
            if token in self.tokenizer.stop_token_ids and not params.ignore_eos:
                reason = "stop"
            else:
                text = one.stops.feed(one.decoder.put(token))
                reason = "stop" if one.stops.stopped else None
        if reason is None and len(one.output) >= limit:
            reason = "length"
        if reason is not None:
            del self.requests[number]
            if not one.stops.stopped:
                text += one.stops.feed(one.decoder.flush()) + one.stops.flush()
        return Event(number, tokens, text, reason, logprobs, shown, cached_tokens=3 if first else 0)

    def draw(self, last: int, one: _Running) -> int:
        if one.params.greedy:
            return int(self.table[last].argmax())
        return int(torch.multinomial(self.table[last].exp(), 1, generator=one.noise))

    def logprob(self, last: int, token: int, best: int) -> TokenLogprob:
        values, ids = self.table[last].topk(best)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(self.table[last, token]), top)

    def greedy(self, prompt: list[int], length: int) -> list[int]:
        """What a greedy answer must be."""
        ids = list(prompt)
        for _ in range(length):
            ids.append(int(self.table[ids[-1]].argmax()))
        return ids[len(prompt) :]


class Scripted(Bigrams):
    """Says `text` and ends, whatever it is asked; `params` are those of all requests."""

    def __init__(self, text: str, max_context: int = 4096) -> None:
        super().__init__(max_context=max_context)
        self.script = [*tokenizer().encode_raw(text), tokenizer().eos_token_id]
        self.params: list[SamplingParams] = []

    def submit(self, prompt: list[int], params: SamplingParams) -> int:
        self.params.append(params)
        return super().submit(prompt, params)

    def draw(self, last: int, one: _Running) -> int:
        return self.script[len(one.output)]


class Client:
    """Requests to the routes of this part, without a socket."""

    def __init__(
        self, engine: Any, settings: Settings | None = None, generation: dict[str, Any] | None = None
    ) -> None:
        self.engine = engine
        self.settings = settings or Settings(max_n=4)
        self.generation = generation or {}

    def app(self, runtime: EngineRuntime) -> FastAPI:
        served = Served("tiny", runtime, "tiny", "kllm-test", generation=self.generation)
        other = Served("other", runtime, "tiny", "kllm-other")
        return create_app(Registry([served, other]), self.settings)

    def run(self, talk: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        """Runs `talk(client)` against a fresh runtime."""

        async def session() -> Any:
            encoder = ChatEncoder(self.engine.tokenizer)
            runtime = EngineRuntime(self.engine, encoder=encoder, settings=self.settings)
            transport = httpx.ASGITransport(app=self.app(runtime))
            try:
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                    return await asyncio.wait_for(talk(client), 30)
            finally:
                runtime.stop()

        return asyncio.run(session())

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.run(lambda client: client.post(path, json=body))

    def get(self, path: str) -> httpx.Response:
        return self.run(lambda client: client.get(path))

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end with [DONE]."""
        answer = self.post(path, **body, stream=True)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.text)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object of a refusal."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
