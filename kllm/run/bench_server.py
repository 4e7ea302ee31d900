"""The server that a load is put on: a process of our own for the time of the bench, and its gauges."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kllm.errors import EXIT_USAGE, KllmError, UserError
from kllm.http_client import Target, fetch

_URL = re.compile(r"https?://([\w.\-]+|\[[0-9a-fA-F:]+\]):([1-9]\d*)")

_REFUSALS = {
    401: ("the server wants a key", "--api-key KEY"),
    403: ("the server wants another key", "--api-key KEY"),
    404: ("no OpenAI server", "GET /v1/models: 404"),
    503: ("the model is still being loaded", "try again"),
}  # what /v1/models answers, in words and a hint


class OwnServer:
    """`kllm serve MODEL --port 0` as a child, ready when the block begins and gone after it.

    Args:
        model: what to serve.
        options: further words for `kllm serve`.
        patience: seconds until it must answer.

    Raises:
        KllmError: it ends at once (its own error, with its exit code) or does not answer, with its last
            words.
    """

    def __init__(self, model: str, options: Sequence[str] = (), patience: float = 180.0) -> None:
        self._command = [sys.executable, "-m", "kllm", "serve", model, "--port", "0", *options]
        self._patience = patience
        self.url = ""
        self.exit_code: int | None = None

    def __enter__(self) -> OwnServer:
        self._log = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        try:
            self.url = self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ask in (signal.SIGTERM, signal.SIGKILL):
            if self._child.poll() is not None:
                break
            self._child.send_signal(ask)
            try:
                self._child.wait(30)
            except subprocess.TimeoutExpired:
                continue
        self.exit_code = self._child.returncode
        self._log.close()

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._child.pid

    def output(self) -> str:
        """What it said so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _wait(self) -> str:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            if self._child.poll() is not None:
                break
            if found := _URL.search(self.output()):
                url = f"http://127.0.0.1:{found[2]}"
                if asyncio.run(_healthy(Target.parse(url))):
                    return url
            time.sleep(0.1)
        code = self._child.poll()
        errors = [line[7:] for line in self.output().splitlines() if line.startswith("error: ")]
        if code and errors:
            failure = UserError(errors[-1]) if code == EXIT_USAGE else KllmError(errors[-1])
            raise failure
        lines = [line for line in self.output().splitlines() if line.strip()] or ["without a word"]
        what = "ended" if code is not None else "does not answer"
        raise KllmError(f"the server {what}: {lines[-1][-300:]}", where=" ".join(self._command[2:5]))


async def _healthy(target: Target) -> bool:
    try:
        return (await fetch(target, "GET", "/health", timeout=5))[0] == 200
    except KllmError:
        return False


async def first_model(target: Target) -> str:
    """The name of the first model that the server lists.

    Raises:
        KllmError: it lists none, wants a key, is still loading, or is none.
    """
    status, raw = await fetch(target, "GET", "/v1/models")
    if status in _REFUSALS:
        raise KllmError(_REFUSALS[status][0], target.url, _REFUSALS[status][1])
    try:
        return str(json.loads(raw)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        what = f"/v1/models names no model (status {status})"
        raise KllmError(what, target.url, "--name NAME") from None


async def gauges(target: Target) -> dict[str, Any]:
    """Requests that run and wait, and the share of KV memory in use; None where the server does not say."""
    try:
        status, raw = await fetch(target, "GET", "/metrics", timeout=10)
    except KllmError:
        status, raw = 0, b""
    text = raw.decode(errors="replace") if status == 200 else ""
    names = {
        "running": "num_requests_running",
        "waiting": "num_requests_waiting",
        "kv": "kv_cache_usage_perc",
    }
    return {key: _sum(text, name) for key, name in names.items()}


def _sum(text: str, name: str) -> float | None:
    """All samples of a metric added up, whatever is before its name (`kllm:`, `vllm:`)."""
    found = re.findall(rf"^(?:\w+:)?{name}(?:\{{[^\n]*\}})? +([^\s]+)", text, re.MULTILINE)
    try:
        return sum(map(float, found)) if found else None
    except ValueError:
        return None


async def work_done(target: Target, pid: int | None) -> tuple[float | None, float | None]:
    """Tokens that the server has generated and processor seconds of its process `pid`, as far as known."""
    try:
        status, raw = await fetch(target, "GET", "/metrics", timeout=10)
    except KllmError:
        return None, None
    tokens = _sum(raw.decode(errors="replace") if status == 200 else "", "generation_tokens_total")
    return tokens, None if pid is None else _cpu_seconds(pid)


def _cpu_seconds(pid: int) -> float | None:
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        user, system = line.rpartition(")")[2].split()[11:13]  # the name before may hold anything
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


async def settled(target: Target, patience: float = 10.0) -> dict[str, Any]:
    """The gauges once nothing runs any more, at the latest after `patience` seconds; `seconds` it took."""
    began = time.monotonic()
    while True:
        found = await gauges(target)
        passed = time.monotonic() - began
        if not any(found.values()) or passed > patience:
            return {**found, "seconds": round(passed, 3), "idle": not any(found.values())}
        await asyncio.sleep(0.05)
