"""A scripted server with tools of its own: what its model says, ask by ask."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from serve_scripted import Server, tokenizer

from kllm.serve.settings import Settings
from kllm.tools.registry import find_tools
from kllm.tools.tool import Tool, tool_of


def call(name: str = "calculator", **arguments: Any) -> str:
    """What a model says to call a tool."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def sums(expression: str) -> str:
    return call(expression=expression)


class Replies:
    """The model's answers, one for each round of a request; the last one for all that follow."""

    def __init__(self, *said: str) -> None:
        self.said = list(said)

    def __call__(self, prompt: list[int], params: Any) -> str:
        rounds = tokenizer().decode(prompt, skip_special_tokens=False).count("<|im_start|>assistant")
        return self.said[min(rounds, len(self.said)) - 1]


@contextmanager
def tool_server(
    *said: str,
    tools: Sequence[str | Callable[..., Any]] = ("calculator", "clock"),
    context: int = 8192,
    **settings: Any,
) -> Iterator[Server]:
    """A server whose model says `said`, with tools by name or as functions."""
    found: list[Tool] = [
        tool for one in tools for tool in (find_tools([one]) if isinstance(one, str) else [tool_of(one)])
    ]
    server = Server(Replies(*said), Settings(tools=tuple(found), **settings), context=context)
    try:
        yield server
    finally:
        server.close()


class Slow:
    """A tool that runs until it is told to stop, or is thrown out of its loop."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.let_go = threading.Event()
        self.left = threading.Event()

    def tool(self) -> Callable[[], str]:
        def wait() -> str:
            """Waits."""
            self.running.set()
            try:
                while not self.let_go.is_set():
                    time.sleep(0.005)
            finally:
                self.left.set()
            return "waited"

        return wait


def events_of(message: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A message's tool events in short: ("call", name, arguments), ("result", name, content, is_error)."""
    short: list[tuple[Any, ...]] = []
    for event in message.get("tool_events", []):
        if event["type"] == "call":
            short.append(("call", event["name"], json.loads(event["arguments"])))
        else:
            short.append(("result", event["name"], event["content"], event["is_error"]))
    return short
