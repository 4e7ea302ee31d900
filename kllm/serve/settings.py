"""What `kllm serve` was told, as far as requests are concerned; loading has its own options."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kllm.tools.tool import Tool

ReasoningField = Literal["reasoning_content", "reasoning", "none"]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Settings:
    """Limits and switches of the server. Times in seconds, sizes in bytes; None is no limit."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[bytes, ...] = field(default=(), repr=False)
    """SHA-256 digests of the API keys (`digest`); none lets everybody in."""
    cors: tuple[str, ...] = ()
    """Origins of web pages that may call, exactly as browsers send them; "*" is all."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header beside loopback and `host`; "*" is all."""
    max_body: int = 2 << 20
    max_queue: int = 256
    max_running: int = 64
    request_timeout: float | None = None
    """From admission to the last token."""
    queue_timeout: float | None = None
    """From admission to the start of the prefill."""
    body_timeout: float = 10.0
    drain: float = 30.0
    max_n: int = 16
    reasoning_field: ReasoningField = "reasoning_content"
    """Where thinking goes; "none" leaves it in the content, tags and all."""
    pooling: Pooling = "mean"
    metrics_public: bool = False
    log_requests: bool = False
    allow_request_template: bool = False
    exit_on_error: bool = False
    tools: tuple[Tool, ...] = ()
    """What the server runs for models that call it; none is off."""
    unsafe_python: bool = False
    max_sandboxes: int = 4
    """Requests that have a sandbox for `python` at once; others wait."""


def digest(key: str | bytes) -> bytes:
    """SHA-256 of an API key: what is kept and compared."""
    return hashlib.sha256(key.encode("utf-8") if isinstance(key, str) else key).digest()
