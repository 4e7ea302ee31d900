"""Every refusal in OpenAI's shape: {"error": {"message", "type", "param", "code"}} and its status."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from kllm.errors import UserError

_SHOWN = 200  # characters of a caller's value that a message repeats
_MESSAGE = 1000
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_PATH = re.compile(r"(?<![\w.<])(?:/[\w.@+-]+){2,}/?")


class ApiError(Exception):
    """A refusal to send to the client.

    Args:
        status: HTTP status; inside a running stream only the body counts.
        message: for people; no paths, prompts or keys. Cut when it is very long.
        type: OpenAI's error type; None takes the one that goes with the status.
        param: the field that is wrong, e.g. `messages[1].content`.
        code: a word for programs, or None.
        headers: sent along, e.g. Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MESSAGE else message[: _MESSAGE - 1] + "…"
        self.type = type or _TYPES.get(status, "invalid_request_error")
        self.param, self.code = param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": {...}}"""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def json_bytes(self) -> bytes:
        """`body` as UTF-8; what is no character in it is replaced."""
        return json.dumps(self.body(), ensure_ascii=False).encode("utf-8", "replace")

    def sse(self) -> bytes:
        """The event that tells a running stream: `data: {...}` and a blank line."""
        return b"data: " + self.json_bytes() + b"\n\n"

    def response(self) -> Response:
        """The whole HTTP answer."""
        return Response(self.json_bytes(), self.status, self.headers, media_type="application/json")


class ClientGone(Exception):
    """The client closed the connection: nobody is there to be answered."""


def from_user_error(error: UserError) -> ApiError:
    """400 with the same words; the error's `where` becomes `param`."""
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return ApiError(400, _PATH.sub("<path>", message), param=error.where)


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400 for one field."""
    return ApiError(400, message, param=param, code=code)


def context_error(limit: int, tokens: int, param: str = "messages") -> ApiError:
    """400 for a prompt that does not fit, in the words that clients look for."""
    message = (
        f"This model's maximum context length is {limit} tokens. "
        f"However, your {param} resulted in {tokens} tokens."
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def internal_error(message: str = "The server failed on this request.") -> ApiError:
    """500; would happen again, so the official client is told not to retry."""
    return ApiError(500, message, code="internal_error", headers={"x-should-retry": "false"})


def shown(value: Any) -> str:
    """A caller's value as JSON for a message, at most 200 characters of it."""
    if isinstance(value, (list, dict)) and len(value) > 50:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
