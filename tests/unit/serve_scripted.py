"""A server over an engine that says what a test wants: real tokenizer, template, runtime and routes.

`ScriptedEngine` has the engine's interface and no model. What it says is given by `script(prompt, params)`:
a text (control tokens spelt out become tokens) or token ids; the end token follows by itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from kllm.engine.params import Event, SamplingParams, TokenLogprob
from kllm.engine.stops import StopMatcher
from kllm.errors import UserError
from kllm.serve.app import create_app
from kllm.serve.registry import Registry, Served
from kllm.serve.runtime import EngineRuntime
from kllm.serve.settings import Settings
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

TEXT = [
    "the cat sat on the mat",
    "where is the cat? here.",
    "你好，世界。猫在哪里？",
    '{"name": "f", "arguments": {"x": 1}}',
]
TEMPLATE = r"""{%- for tool in tools or [] %}{{ tool | tojson + '\n' }}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if open_thinking is defined and open_thinking is true %}{{ '<think>\n' }}
{%- else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

Script = Callable[[list[int], SamplingParams], "str | Sequence[int]"]


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with the think and tool marks as tokens."""
    trained, _ = train_tokenizer(TEXT * 5, 360, max_bytes=1_000_000, min_frequency=1)
    return trained.with_chat_template(TEMPLATE)


class _Running:
    def __init__(self, number: int, params: SamplingParams, ids: list[int], tok: Tokenizer) -> None:
        self.number, self.params = number, params
        own = () if params.ignore_eos else tok.stop_token_ids
        special = [tok.special_tokens[s] for s in params.stop if s in tok.special_tokens]
        self.stop_ids = {*own, *params.stop_token_ids, *special}
        self.ids = [*ids, tok.eos_token_id]
        self.decoder, self.stops = tok.stream_decoder(), StopMatcher(params.stop)
        self.drawn = 0

    def step(self) -> Event:
        token = self.ids[min(self.drawn, len(self.ids) - 1)]
        self.drawn += 1
        reason: Any = None
        text = ""
        if token in self.stop_ids:
            reason = "stop"
        else:
            text = self.stops.feed(self.decoder.put(token))
            if self.stops.stopped:
                reason = "stop"
            elif self.drawn >= self.params.max_tokens:
                reason = "length"
        if reason and not self.stops.stopped:
            text += self.stops.feed(self.decoder.flush()) + self.stops.flush()
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.params.logprobs is not None:
            best = tuple((token + i, -0.5 - i) for i in range(self.params.logprobs))
            logprobs = (TokenLogprob(token, -0.5, best),)
        cached = 3 if self.drawn == 1 else 0
        return Event(self.number, (token,), text, reason, logprobs=logprobs, cached_tokens=cached)


class ScriptedEngine:
    """Says what `script` says, one token a step."""

    device = "cpu"

    def __init__(self, script: Script, *, context: int = 512, tok: Tokenizer | None = None) -> None:
        self.tokenizer = tok or tokenizer()
        self.max_context = context
        self.shape = SimpleNamespace(vocab_size=self.tokenizer.vocab_size)
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.break_at: int | None = None
        self._script = script
        self._running: dict[int, _Running] = {}
        self._cancelled: list[int] = []
        self._number = 0

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        if not prompt:
            raise UserError("the prompt has no tokens", where="prompt")

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        self.asked.append((list(prompt), params))
        said = self._script(list(prompt), params)
        ids = self.tokenizer.encode_raw(said) if isinstance(said, str) else list(said)
        self._number += 1
        self._running[self._number] = _Running(self._number, params, ids, self.tokenizer)
        return self._number

    def cancel(self, number: int) -> None:
        if self._running.pop(number, None) is not None:
            self._cancelled.append(number)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._cancelled)

    def step(self) -> list[Event]:
        events = [Event(number, (), "", "cancelled") for number in self._cancelled]
        self._cancelled.clear()
        for one in list(self._running.values()):
            if one.drawn == self.break_at:
                raise RuntimeError("broken on purpose")
            events.append(one.step())
            if events[-1].finish_reason:
                del self._running[one.number]
        return events

    def fail_all(self, message: str) -> list[Event]:
        numbers = list(self._running)
        self._running.clear()
        return [Event(number, (), "", "error", message=message) for number in numbers]

    def stats(self) -> Any:
        names = ("kv_pages_cached", "preemptions", "prefix_queries", "prefix_hits", "prompt_tokens")
        zeros = dict.fromkeys((*names, "generation_tokens", "waiting"), 0)
        return SimpleNamespace(running=len(self._running), kv_pages_total=8, kv_pages_free=8, **zeros)


class FakeCompiler:
    """Notes what is compiled; its constraints are what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def compile_(*args: Any, **kwargs: Any) -> Any:
            self.asked.append((name, args, kwargs))
            if args and args[0] == "(":
                raise UserError("broken", where="grammar")
            return (name, *args)

        return compile_


class Server:
    """The application over a scripted engine."""

    def __init__(
        self,
        script: Script | str = "the cat sat.",
        settings: Settings | None = None,
        *,
        template: bool = True,
        context: int = 512,
    ) -> None:
        said: Script = (lambda prompt, params: script) if isinstance(script, str) else script
        self.engine = ScriptedEngine(said, context=context)
        self.settings = settings or Settings()
        encoder = ChatEncoder(self.engine.tokenizer) if template else None
        self.runtime = EngineRuntime(self.engine, encoder=encoder, settings=self.settings)  # type: ignore[arg-type]
        self.compiler = FakeCompiler()
        self.runtime.__dict__["_compiler"] = self.compiler
        self.served = Served("tiny", self.runtime, "root", "kllm-test")
        self.app = create_app(Registry([self.served]), self.settings)

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return asyncio.run(self.apost(path, body, **kwargs))

    async def apost(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(path, json=body, **kwargs)

    def chat(self, *messages: Any, **body: Any) -> httpx.Response:
        """A chat request; plain strings are user messages."""
        listed = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages or ("hi",)]
        return self.post("/v1/chat/completions", {"messages": listed, **body})

    def message(self, *messages: Any, **body: Any) -> dict[str, Any]:
        """The first choice of a whole answer."""
        response = self.chat(*messages, **body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def refusal(self, *messages: Any, **body: Any) -> dict[str, Any]:
        """The error object of a 400."""
        response = self.chat(*messages, **body)
        assert response.status_code == 400, response.text
        return response.json()["error"]

    def prompt(self) -> str:
        """What the engine was asked last."""
        return self.engine.tokenizer.decode(self.engine.asked[-1][0], skip_special_tokens=False)

    def close(self) -> None:
        self.runtime.stop()


def fresh_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """For a fixture named `server`; what its engine says is the parameter, see `says`."""
    one = Server(getattr(request, "param", "the cat sat."))
    yield one
    one.close()


def says(text: str) -> Any:
    return pytest.mark.parametrize("server", [text], indirect=True)


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; it must be one that ends with [DONE]."""
    assert response.status_code == 200, response.text
    events = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert events[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in events[:-1]]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What the chunks of one choice add up to."""
    out: dict[str, Any] = {
        "content": "",
        "reasoning_content": "",
        "calls": [],
        "reason": None,
        "logprobs": [],
    }
    for choice in (c for chunk in chunks for c in chunk.get("choices", []) if c["index"] == index):
        delta = choice["delta"]
        for key in ("content", "reasoning_content"):
            out[key] += delta.get(key) or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                out["calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            out["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        out["logprobs"] += (choice["logprobs"] or {}).get("content", [])
        out["reason"] = choice["finish_reason"] or out["reason"]
    return out
