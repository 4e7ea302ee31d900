"""A real `kllm serve` process on a small random model, and a strict client for it.

The tests that use it are black-box: they know the serving specification, a tokenizer's file and HTTP, and
nothing of the server's code. Servers are shared by all tests of a test process (`server()`), since a start
costs more than a hundred requests.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from serve_model import REPO, model_dir, scratch, token_id
from support import Command

ERROR_TYPES = {
    400: {"invalid_request_error"},
    401: {"authentication_error"},
    404: {"invalid_request_error", "not_found_error"},
    405: {"invalid_request_error"},
    408: {"timeout_error"},
    413: {"invalid_request_error"},
    415: {"invalid_request_error"},
    429: {"rate_limit_error"},
    500: {"server_error"},
    503: {"server_error"},
}
ANY: Any = object()
CHAT = "/v1/chat/completions"
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


# --------------------------------------------------------------------------------------------- the server


class Server:
    """One `kllm serve` process."""

    def __init__(self, *flags: str, models: tuple[Path, ...] = (), env: dict[str, str] | None = None) -> None:
        self.log = scratch() / "log"
        with self.log.open("wb") as log:
            self.process = Command(
                *["serve", *(models or (model_dir(),)), "--port", "0", *flags],
                cwd=Path.cwd(),
                stdout=log.fileno(),
                stderr=log.fileno(),
                env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **(env or {})},
            )
        atexit.register(self.kill)
        self.url = self._wait()
        self.port = int(self.url.rpartition(":")[2])
        self.key: str | None = None
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _wait(self, seconds: float = 120) -> str:
        deadline = time.monotonic() + seconds
        url = None
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended:\n" + self.output()
            found = re.search(r"http://[\w.\-\[\]:]*?:(\d+)", self.output())
            url = f"http://127.0.0.1:{found[1]}" if found and found[1] != "0" else url
            if url:
                try:
                    if httpx.get(url + "/health", timeout=5, trust_env=False).status_code == 200:
                        return url
                except httpx.TransportError:
                    pass
            time.sleep(0.05)
        raise AssertionError("the server does not answer:\n" + self.output())

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None and self.get("/health").status_code == 200

    def rss(self) -> int:
        """Resident bytes of the process."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    # ----------------------------------------------------------------------------------------- requests

    def headers(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {**key, **(extra or {})}

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, headers=self.headers(headers))

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        """Posts `body`: bytes as they are, anything else as ASCII JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(
            path,
            content=content,
            headers=self.headers({"Content-Type": "application/json", **(headers or {})}),
        )

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON of a request that must succeed."""
        response = self.post(path, body)
        assert response.status_code == 200, f"{response.status_code}: {response.text[:500]}"
        return response.json()

    def chat(self, content: Any = "hello", **fields: Any) -> dict[str, Any]:
        return self.answer(CHAT, chat_body(content, **fields))

    def complete(self, prompt: Any = "the cat", **fields: Any) -> dict[str, Any]:
        return self.answer("/v1/completions", completion_body(prompt, **fields))

    def stream(self, path: str, body: dict[str, Any]) -> Stream:
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, f"{response.status_code}: {response.text[:500]}"
        return Stream(response.headers, response.content, events(response.content))

    def stream_chat(self, content: Any = "hello", **fields: Any) -> Stream:
        return self.stream(CHAT, chat_body(content, **fields))

    def stream_complete(self, prompt: Any = "the cat", **fields: Any) -> Stream:
        return self.stream("/v1/completions", completion_body(prompt, **fields))

    def prompt_ids(self, messages: list[dict[str, Any]], **fields: Any) -> list[int]:
        return self.answer("/tokenize", {"messages": messages, **fields})["tokens"]

    def open_stream(self, body: dict[str, Any], path: str = CHAT) -> socket.socket:
        """Sends a streaming request over a raw socket and returns it unread."""
        return self.raw(http_post(path, json.dumps({**body, "stream": True}).encode(), self.headers()))

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection

    def raw_answer(self, data: bytes) -> bytes:
        """Everything that comes back until the server closes or is silent for two seconds."""
        with self.raw(data) as connection:
            return read_all(connection, 2)

    # ------------------------------------------------------------------------------------------ metrics

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples `kllm:NAME` that have `labels`."""
        found = []
        for line in self.get("/metrics").text.splitlines():
            match = re.fullmatch(r"kllm:(\w+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name:
                own = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if labels.items() <= own.items():
                    found.append(float(match[3]))
        return sum(found)

    def idle(self) -> bool:
        """Whether nothing runs, waits or holds KV memory."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(self.metric(name) == 0 for name in names)


@functools.cache
def server() -> Server:
    """The one with default settings that nearly all tests share."""
    return Server()


KEYS = ("sk-first-0123456789", "sk-second-abcdefgh", "sk-third-ijklmnop", "sk-fourth-qrstuvwx")
ORIGIN = "https://app.example.org"


@functools.cache
def locked_server() -> Server:
    """With keys from every source, one allowed origin, small limits, `reasoning` as the thinking field and
    two models (the first is greedy by its generation_config.json, the second is small)."""
    file = scratch() / "keys.txt"
    file.write_text(f"{KEYS[1]}\n{KEYS[2]}\n")
    flags = ["--api-key", KEYS[0], "--api-key-file", str(file), "--cors", ORIGIN, "--max-body", "20000"]
    flags += ["--max-n", "3", "--reasoning-field", "reasoning", "--pooling", "last"]
    models = (model_dir("first", 512, True), model_dir("second", 64))
    running = Server(*flags, models=models, env={"KLLM_API_KEY": KEYS[3]})
    running.key = KEYS[0]
    return running


@functools.cache
def narrow_server() -> Server:
    """One running request, one waiting, two seconds each; no prefix cache, thinking left in the text, prompts
    in the log, templates from requests."""
    flags = ["--max-running", "1", "--max-queue", "1", "--request-timeout", "2", "--queue-timeout", "1"]
    flags += ["--no-prefix-cache", "--reasoning-field", "none", "--log-requests", "--allow-request-template"]
    return Server(*flags, models=(model_dir("narrow", 32768),))


def http_post(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in (headers or {}).items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(connection: socket.socket, silence: float) -> bytes:
    connection.settimeout(silence)
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except (TimeoutError, ConnectionResetError):
        pass
    return data


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


# ---------------------------------------------------------------------------------------- bodies, answers


def chat_body(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}


def messages_of(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def post(**fields: Any) -> httpx.Response:
    """A chat request to the shared server."""
    return server().post(CHAT, chat_body(**fields))


def close_thinking() -> dict[str, Any]:
    """Fields that make the model end its thinking at once."""
    return {"logit_bias": {str(token_id("</think>")): 100}}


def completion_body(prompt: Any = "the cat", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}


def forced(text: str, **fields: Any) -> dict[str, Any]:
    """Fields that make the answer `text`, whatever the model."""
    return {"structured_outputs": {"choice": [text]}, "max_tokens": 200, **fields}


def content_of(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["message"]["content"]


def texts_of(answer: dict[str, Any]) -> list[str]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


def refused(
    response: httpx.Response, status: int = 400, *, code: Any = ANY, param: Any = ANY, type: str | None = None
) -> dict[str, Any]:
    """Checks a refusal's whole form and returns the error object."""
    assert response.status_code == status, (
        f"{response.status_code} instead of {status}: {response.text[:500]}"
    )
    assert response.headers["content-type"].split(";")[0] == "application/json"
    body = response.json()
    assert set(body) == {"error"}, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str) and error["message"].strip()
    assert "Traceback" not in error["message"] and str(REPO) not in error["message"]
    assert len(error["message"]) <= 600
    assert error["code"] is None or isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    if type:
        assert error["type"] == type
    elif status in ERROR_TYPES:
        assert error["type"] in ERROR_TYPES[status]
    if code is not ANY:
        assert error["code"] == code, error
    if param is not ANY:
        assert error["param"] == param, error
    return error


@dataclass
class Stream:
    """A finished event stream: headers, raw bytes, the events' JSON."""

    headers: httpx.Headers
    raw: bytes
    chunks: list[dict[str, Any]]

    def of(self, index: int = 0) -> list[dict[str, Any]]:
        """The choice objects of one choice, in order."""
        return [c for chunk in self.chunks for c in chunk.get("choices", []) if c["index"] == index]

    @property
    def usage(self) -> dict[str, Any] | None:
        return self.chunks[-1].get("usage")

    def message(self, index: int = 0) -> dict[str, Any]:
        """What the deltas add up to: role, content, reasoning, tool_calls, finish_reason, logprobs."""
        content, reasoning, role, finish = "", "", "", None
        calls: dict[int, dict[str, str]] = {}
        logprobs: list[Any] = []
        for choice in self.of(index):
            delta = choice["delta"]
            role += delta.get("role") or ""
            content += delta.get("content") or ""
            reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
            for part in delta.get("tool_calls") or []:
                call = calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
                call["id"] += part.get("id") or ""
                call["name"] += part.get("function", {}).get("name") or ""
                call["arguments"] += part.get("function", {}).get("arguments") or ""
            logprobs += (choice.get("logprobs") or {}).get("content") or []
            finish = choice["finish_reason"] or finish
        ordered = [calls[k] for k in sorted(calls)]
        return {
            "role": role,
            "content": content,
            "reasoning": reasoning,
            "calls": ordered,
            "finish": finish,
            "logprobs": logprobs,
        }

    def text(self, index: int = 0) -> str:
        """The text of a completion."""
        return "".join(choice["text"] for choice in self.of(index))


def whole_message(answer: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """A whole answer in the form of `Stream.message`."""
    choice = next(c for c in answer["choices"] if c["index"] == index)
    message = choice["message"]
    calls = [
        {"id": c["id"], "name": c["function"]["name"], "arguments": c["function"]["arguments"]}
        for c in message.get("tool_calls") or []
    ]
    return {
        "role": message["role"],
        "content": message["content"] or "",
        "reasoning": message.get("reasoning_content") or message.get("reasoning") or "",
        "calls": calls,
        "finish": choice["finish_reason"],
        "logprobs": (choice.get("logprobs") or {}).get("content") or [],
    }


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "calls": [{**call, "id": ""} for call in message["calls"]]}


def events(raw: bytes) -> list[dict[str, Any]]:
    """The JSON of every event; the framing must be exact."""
    return list(_events(raw.decode("utf-8")))


def _events(text: str) -> Iterator[dict[str, Any]]:
    assert text.endswith("data: [DONE]\n\n"), text[-200:]
    assert text.count("[DONE]") == 1
    for block in text.split("\n\n")[:-2]:
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        assert "\n" not in block and "\r" not in block, block
        event = json.loads(block[6:])
        assert isinstance(event, dict)
        yield event
