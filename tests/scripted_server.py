"""An OpenAI-compatible server in a thread whose answers are scripted, for the tests of the chat."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Delta = dict[str, Any]
Script = Callable[[dict[str, Any]], Any]
"""Request -> texts and deltas to stream, or (status, body) for a refusal, or bytes to send as they are."""


def words(*texts: str, **last: Any) -> list[Any]:
    """Texts, and what the last chunk says."""
    return [*texts, last] if last else list(texts)


def calls(*named: tuple[str, dict[str, Any]]) -> list[Delta]:
    """Tool calls, their arguments in two pieces each."""
    deltas: list[Delta] = []
    for i, (name, arguments) in enumerate(named):
        text = json.dumps(arguments, ensure_ascii=False)
        head = {
            "index": i,
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": name, "arguments": text[:3]},
        }
        deltas.append({"tool_calls": [head]})
        deltas.append({"tool_calls": [{"index": i, "function": {"arguments": text[3:]}}]})
    return deltas


class Scripted:
    """The server; `requests` are the bodies it got, `heads` their headers, `left` how many readers left early."""

    def __init__(
        self,
        script: Script,
        *,
        models: tuple[str, ...] = ("scripted",),
        key: str = "",
        pause: float = 0,
        owner: str = "somebody",
    ) -> None:
        self.script, self.models, self.key, self.pause, self.owner = script, models, key, pause, owner
        self.requests: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.left = 0
        self.url = ""

    @property
    def asked(self) -> list[str]:
        """The last message of every request."""
        return [request["messages"][-1]["content"] for request in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scripted: Scripted

    def log_message(self, *words: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        if self._refused():
            return
        row = {"object": "model", "max_model_len": 4096, "owned_by": self.scripted.owner}
        rows = [{"id": name, **row} for name in self.scripted.models]
        self._json(200, {"object": "list", "data": rows})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self._refused():
            return
        self.scripted.requests.append(body)
        self.scripted.heads.append({k.lower(): v for k, v in self.headers.items()})
        answer = self.scripted.script(body)
        if isinstance(answer, tuple):
            self._json(*answer)
        else:
            self._stream(answer)

    def _refused(self) -> bool:
        key = self.scripted.key
        if not key or self.headers.get("authorization") == f"Bearer {key}":
            return False
        self._json(401, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}})
        return True

    def _json(self, status: int, body: Any) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _stream(self, items: Any) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            self._events(items)
            self._chunk(b"")
        except (BrokenPipeError, ConnectionResetError):
            self.scripted.left += 1
        self.close_connection = True

    def _events(self, items: Any) -> None:
        if isinstance(items, bytes):
            self._chunk(items)
            return
        count, reason = 0, "stop"
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        self._chunk(b": keep-alive\n\n")
        for item in items:
            if isinstance(item, dict) and "finish_reason" in item:
                reason = item["finish_reason"]
                continue
            delta = {"content": item} if isinstance(item, str) else item
            reason = "tool_calls" if "tool_calls" in delta else reason
            count += 1
            self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            time.sleep(self.scripted.pause)
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
        self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@contextmanager
def serving(script: Script, **options: Any) -> Iterator[Scripted]:
    """The server, listening on loopback."""
    scripted = Scripted(script, **options)
    handler = type("Handler", (_Handler,), {"scripted": scripted})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    scripted.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield scripted
    finally:
        server.shutdown()
        server.server_close()
