"""A teacher's server in a thread: whole chat answers, or whatever goes wrong, as a function says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

from bench_fake_server import Fake

Answer = Callable[[dict[str, Any], int], Any]


def said(content: str, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {
        "choices": [
            {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": len(content)},
    }


def question(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


class FakeTeacher(Fake):
    """Answers chat requests.

    Args:
        answer: of a request's body and how often this body was asked before: a completion, (status, body),
            (status, body, header lines), "silence", "cut" or text that is sent as it is.
        delay: seconds before each answer.
        key: what every request has to bring.
    """

    def __init__(
        self, answer: Answer, *, delay: float = 0.0, key: str | None = None, models: int = 1
    ) -> None:
        super().__init__()
        self.answer, self.delay, self.key, self.models = answer, delay, key, models
        self.running_now = self.most = 0
        self.seen: dict[str, int] = {}
        self.lock = threading.Lock()

    @property
    def questions(self) -> list[str]:
        return [question(body) for body in self.asked]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            path = head.split()[1]
            length = next((int(x.split(":")[1]) for x in head.split("\r\n") if x.startswith("Content-L")), 0)
            body = json.loads(await reader.readexactly(length)) if length else {}
            if self.key is not None and f"Authorization: Bearer {self.key}\r\n" not in head:
                error = {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}
                self._whole(writer, 401, error)
            elif path.endswith("/models"):
                self._whole(writer, 200, {"data": [{"id": f"fake-{i}"} for i in range(self.models)]})
            else:
                await self._chat(writer, body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left += 1
        finally:
            writer.close()

    async def _chat(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.asked.append(body)
        text = json.dumps(body, sort_keys=True)
        before = self.seen.get(text, 0)
        self.seen[text] = before + 1
        self.running_now += 1
        self.most = max(self.most, self.running_now)
        try:
            await asyncio.sleep(self.delay)
            found = self.answer(body, before)
        finally:
            self.running_now -= 1
        if found == "silence":
            await asyncio.sleep(30)
        elif found == "cut":
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices"')
        elif isinstance(found, str):
            self._whole(writer, 200, found)
        elif isinstance(found, tuple):
            self._whole(writer, *found)
        else:
            self._whole(writer, 200, found)
