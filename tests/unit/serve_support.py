"""A server without a model, for the tests of the HTTP side: its engine counts instead of computing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx

from kllm.engine.params import EngineStats, Event, SamplingParams
from kllm.errors import UserError
from kllm.serve.app import create_app
from kllm.serve.registry import Registry, Served
from kllm.serve.runtime import EngineRuntime
from kllm.serve.settings import Settings


class CountingEngine:
    """Request i gets the tokens 0, 1, 2, ...; `rows` run at once. `gate` holds up steps while it is clear."""

    tokenizer = None
    max_context = 100

    def __init__(self, rows: int = 4) -> None:
        self.rows = rows
        self.shape = SimpleNamespace(vocab_size=1000)
        self.gate = threading.Event()
        self.gate.set()
        self.broken = 0  # so many steps raise
        self.wreck = False  # and fail_all too
        self.steps = 0
        self.cancelled: list[int] = []
        self._next = 0
        self._running: dict[int, list[Any]] = {}
        self._waiting: dict[int, list[Any]] = {}
        self._early: list[Event] = []

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        if not prompt:
            raise UserError("the prompt has no tokens", where="prompt")

    def submit(self, prompt: list[int], params: SamplingParams) -> int:
        if prompt[0] == 666:
            raise UserError("not this one", where="prompt")
        self._next += 1
        self._waiting[self._next] = [0, params.max_tokens]
        return self._next

    def cancel(self, number: int) -> None:
        if self._running.pop(number, None) or self._waiting.pop(number, None):
            self.cancelled.append(number)
            self._early.append(Event(number, (), "", "cancelled"))

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._early)

    def step(self) -> list[Event]:
        self.gate.wait(10)
        self.steps += 1
        while self._waiting and len(self._running) < self.rows:
            number = next(iter(self._waiting))
            self._running[number] = self._waiting.pop(number)
        if self.broken:
            self.broken -= 1
            raise RuntimeError("boom in /secret/path.py")
        events, self._early = self._early, []
        for number, state in list(self._running.items()):
            token = state[0]
            state[0] += 1
            last = state[0] >= state[1]
            events.append(Event(number, (token,), f"{token} ", "length" if last else None))
            if last:
                del self._running[number]
        return events

    def fail_all(self, message: str) -> list[Event]:
        if self.wreck:
            raise RuntimeError("boom again")
        numbers = [*self._running, *self._waiting]
        self._running, self._waiting, self._early = {}, {}, []
        return [Event(number, (), "", "error", message=message) for number in numbers]

    def embed(self, prompt: list[int], pooling: str, adapter: str | None = None) -> Any:
        if prompt[0] == 666:
            raise RuntimeError("boom")
        return SimpleNamespace(tolist=lambda: [float(len(prompt)), float(pooling == "last")])

    def stats(self) -> EngineStats:
        return EngineStats(len(self._running), len(self._waiting), 10, 9, 0, 3, 7, 5, 11, 11, 13)


def runtime(engine: CountingEngine | None = None, **settings: Any) -> EngineRuntime:
    return EngineRuntime(engine or CountingEngine(), settings=Settings(**settings))  # type: ignore[arg-type]


def registry(**settings: Any) -> Registry:
    """Two models over one counting engine."""
    running = runtime(**settings)
    base = Served("base", running, root="base", fingerprint="f-1", created=5)
    tuned = Served(
        "tuned", running, root="base", fingerprint="f-2", parent="base", adapter="tuned", created=6
    )
    return Registry([base, tuned])


def client(app: Any, **headers: str) -> httpx.AsyncClient:
    """For an app in this process; a crash of it is the 500 that a caller would see."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers)


def ask(
    method: str, path: str, *, app: Any = None, settings: dict[str, Any] | None = None, **request: Any
) -> httpx.Response:
    """One request to `app`, or to the counting server with `settings`."""

    async def run() -> httpx.Response:
        async with client(app or server(**settings or {})) as c:
            return await c.request(method, path, **request)

    return asyncio.run(run())


def server(**settings: Any) -> Any:
    return create_app(registry(**settings), Settings(**settings))


async def settled(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits for what another thread is about to do."""
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true in time")


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """`asyncio.run` with a limit, so that a hang is a failure."""
    return asyncio.run(asyncio.wait_for(work(), 20))  # type: ignore[arg-type]
