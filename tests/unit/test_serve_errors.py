"""Error objects: OpenAI's shape, honest codes, nothing private."""

from __future__ import annotations

import json

import pytest

from kllm.errors import UserError
from kllm.serve.errors import ApiError, context_error, from_user_error, internal_error, shown


def test_the_body_is_openais() -> None:
    error = ApiError(400, "no", param="n", code="unsupported_value")
    assert error.body() == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "unsupported_value"}
    }
    assert error.response().status_code == 400
    assert json.loads(error.response().body) == error.body()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (405, "invalid_request_error"),
        (408, "timeout_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_types_go_with_the_status(status: int, kind: str) -> None:
    assert ApiError(status, "x").type == kind


def test_the_event_is_one_line_of_utf8() -> None:
    data = ApiError(500, "坏\nline").sse()
    assert data.startswith(b"data: {") and data.endswith(b"}\n\n") and data.count(b"\n") == 2
    assert "坏" in data.decode()


def test_a_lone_surrogate_in_a_message_does_no_harm() -> None:
    assert b"\\ud800" not in ApiError(400, "a\ud800b").sse()


def test_user_errors_lose_their_paths() -> None:
    error = from_user_error(
        UserError("no file /home/me/models/x.json", where="prompt", hint="see /etc/kllm/a")
    )
    assert (error.status, error.param) == (400, "prompt")
    assert "/home" not in error.message and "/etc" not in error.message and "no file" in error.message


def test_a_fraction_is_no_path() -> None:
    assert (
        from_user_error(UserError("at 12 tokens/s or more, text/plain")).message
        == "at 12 tokens/s or more, text/plain"
    )


def test_the_context_message_is_what_clients_look_for() -> None:
    error = context_error(2048, 3000)
    assert "maximum context length is 2048 tokens" in error.message and "3000" in error.message
    assert error.code == "context_length_exceeded" and error.status == 400


def test_a_500_asks_not_to_be_tried_again() -> None:
    assert internal_error().headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "value", ["x" * 10_000, ["y" * 5_000] * 3, {"k": "z" * 900}, list(range(10_000)), 10**300]
)
def test_values_are_shown_shortly(value: object) -> None:
    assert len(shown(value)) <= 200


def test_long_messages_are_cut() -> None:
    assert len(ApiError(400, "x" * 10_000).message) == 1000
