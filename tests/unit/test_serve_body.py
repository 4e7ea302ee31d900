"""Request bodies: strict JSON in, a checked model or one clear 400 out."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator
from serve_support import client
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from kllm.serve.body import MAX_DEPTH, parse_object, parsed, validated
from kllm.serve.errors import ApiError


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: str
    content: str | list[Part]


class Body(BaseModel):
    messages: list[Message]
    n: int = Field(1, ge=1, le=16)
    temperature: float | None = None
    name: str = "default"

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value == "bad":
            raise ValueError("not that name")
        return value


OK = {"messages": [{"role": "user", "content": "hi"}]}


def refused(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_object(body)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"hello",
        b"[1]",
        b'"x"',
        b"null",
        b"1",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"x": {"b": 1, "b": 1}}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b"\xef\xbb\xbf{}",
        b'{"a": 1} trailing',
        b"{'a': 1}",
        b'{"a": "tab\there"}',
        b'{"a": 01}',
        b'{"a": 1,}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": "' + b"[" * 10,
    ],
    ids=lambda b: repr(b[:20]),
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    refused(body)


def test_brackets_in_strings_are_text() -> None:
    text = "[{" * 5000 + '\\"[' * 500
    assert parse_object(json.dumps({"a": text}).encode())["a"] == text


def test_depth_has_a_limit() -> None:
    inside = MAX_DEPTH - 1
    assert parse_object(b'{"a":' + b"[" * inside + b"]" * inside + b"}")
    refused(b'{"a":' + b"[" * (inside + 1) + b"]" * (inside + 1) + b"}")


def test_a_large_body_is_checked_quickly() -> None:
    body = b'{"a": "' + b"\\n" * 1_000_000 + b'"}'
    began = time.perf_counter()
    assert len(parse_object(body)["a"]) == 1_000_000
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (rb'{"a": "x\ud800y"}', "x\ufffdy"),
        (rb'{"a": "\udc00\ud800"}', "\ufffd\ufffd"),
        (rb'{"a": "\ud83d\ude00"}', "😀"),
        (rb'{"a": "\\ud800"}', "\\ud800"),
    ],
)
def test_lone_surrogates_are_replaced(body: bytes, text: str) -> None:
    assert parse_object(body) == {"a": text}


def test_lone_surrogates_anywhere() -> None:
    value = parse_object(rb'{"m": [{"\ud800": ["\udfff", 1, null]}]}')
    json.dumps(value, ensure_ascii=False).encode()
    assert value == {"m": [{"\ufffd": ["\ufffd", 1, None]}]}


def test_null_is_absent() -> None:
    body = validated({**OK, "n": None, "name": None, "temperature": None}, Body)
    assert (body.n, body.name, body.temperature) == (1, "default", None)


def test_unknown_fields_are_ignored() -> None:
    assert validated({**OK, "whatever": {"x": 1}}, Body).n == 1


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": None}, "messages", "Missing required parameter"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
        ({"messages": [OK["messages"][0], {"role": "user", "content": 5}]}, "messages[1].content", "string"),
        ({"messages": [OK["messages"][0], {"role": 5, "content": "x"}]}, "messages[1].role", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "Missing",
        ),
        ({"n": 17}, "n", "16"),
        ({"n": "many"}, "n", '"many"'),
        ({"temperature": [1]}, "temperature", "number"),
        ({"name": "bad"}, "name", "not that name"),
    ],
)
def test_the_wrong_field_is_named(change: dict, param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        validated({**OK, **change}, Body)
    error = caught.value
    assert (error.status, error.param, error.type) == (400, param, "invalid_request_error")
    assert words in error.message


def test_long_values_are_not_repeated() -> None:
    with pytest.raises(ApiError) as caught:
        validated({**OK, "n": "z" * 100_000}, Body)
    assert len(caught.value.message) < 400


def post(content: bytes, kind: str | None) -> tuple[int, dict]:
    async def route(request):
        try:
            body = await parsed(request, Body)
        except ApiError as e:
            return e.response()
        return JSONResponse({"n": body.n, "messages": len(body.messages)})

    async def call():
        async with client(Starlette(routes=[Route("/", route, methods=["POST"])])) as c:
            answer = await c.post(
                "/", content=content, headers={} if kind is None else {"content-type": kind}
            )
            return answer.status_code, answer.json()

    return asyncio.run(call())


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None, ""]
)
def test_other_content_types_are_415(kind: str | None) -> None:
    status, body = post(json.dumps(OK).encode(), kind)
    assert status == 415 and body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_passes(kind: str) -> None:
    assert post(json.dumps(OK).encode(), kind) == (200, {"n": 1, "messages": 1})


def test_a_large_body_passes_through_a_thread() -> None:
    many = {"messages": OK["messages"] * 5000}
    assert post(json.dumps(many).encode(), "application/json")[1]["messages"] == 5000
