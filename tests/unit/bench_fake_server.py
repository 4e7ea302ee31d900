"""A small server in a thread that streams what it is told, rightly or with one fault."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])


class Fake:
    """An OpenAI server that answers a prompt with its characters, one an event, `max_tokens` of them.

    Args:
        fault: what goes wrong with the streams after the first `spared`: "wrong" (one character), "cut" (the
            connection ends), "done" (no [DONE]), "finish" (no finish_reason), "event" (an error event),
            "silent" (nothing more comes), "busy" (429), "broken" (500), "junk" (no JSON).
        running: what the gauge says.
        step: bytes written at once, to tear events apart; 0 writes them whole.
    """

    def __init__(self, fault: str = "", *, spared: int = 0, running: int = 0, step: int = 0) -> None:
        self.fault, self.spared, self.running, self.step = fault, spared, running, step
        self.asked: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.left = 0
        self.url = ""
        self.tls: ssl.SSLContext | None = None

    @contextmanager
    def listening(self) -> Iterator[Fake]:
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start() -> None:
            self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
            scheme = "https" if self.tls else "http"
            self.url = f"{scheme}://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(start())
            loop.run_forever()

        async def stop() -> None:
            self.server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        thread = threading.Thread(target=run)
        thread.start()
        ready.wait()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            path = head.split()[1]
            length = next((int(x.split(":")[1]) for x in head.split("\r\n") if x.startswith("Content-L")), 0)
            body = json.loads(await reader.readexactly(length)) if length else {}
            if path == "/v1/models":
                self._whole(writer, 200, {"data": [{"id": "fake"}]})
            elif path == "/metrics":
                text = f'kllm:num_requests_running{{model_name="a b"}} {self.running}\nkllm:num_requests_waiting 0\n'
                self._whole(writer, 200, text)
            elif path == "/health":
                self._whole(writer, 200, {})
            else:
                self.asked.append(body)
                await self._stream(writer, body, len(self.asked) > self.spared and self.fault)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left += 1
        finally:
            writer.close()

    def _whole(self, writer: asyncio.StreamWriter, status: int, content: Any, more: str = "") -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n{more}\r\n".encode() + data)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], fault: str | bool) -> None:
        if fault in ("busy", "broken"):
            error = {"error": {"message": "not now", "code": "queue_full" if fault == "busy" else None}}
            self._whole(writer, 429 if fault == "busy" else 500, error, "Retry-After: 0.05\r\n")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        prompt = body.get("prompt") or body["messages"][0]["content"]
        text = (prompt * 400)[: body["max_tokens"]]
        for i, letter in enumerate(text):
            if fault and i == 2:
                if fault == "cut":
                    return
                if fault == "silent":
                    await asyncio.sleep(30)
                if fault == "junk":
                    await self._write(writer, b"data: {oh\n\n")
                if fault == "event":
                    await self._write(writer, event(error={"message": "x", "type": "server_error"}))
                if fault == "wrong":
                    letter = "\N{SNOWMAN}"
            await self._write(writer, piece(letter))
            await asyncio.sleep(0.0005)
        if fault != "finish":
            await self._write(writer, piece("", "length"))
        await self._write(
            writer, b": keep-alive\n\n" + event(choices=[], usage={"completion_tokens": len(text)})
        )
        if fault != "done":
            await self._write(writer, b"data: [DONE]\n\n")
        await self._write(writer, b"", last=True)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes, last: bool = False) -> None:
        size = self.step or len(data)
        for at in range(0, len(data), size or 1):
            part = data[at : at + size]
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        if last:
            writer.write(b"0\r\n\r\n")
