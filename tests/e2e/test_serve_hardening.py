"""Requests that once took the server down, held it up or filled it."""

from __future__ import annotations

import json
import threading
import time

import pytest
from serve_client import CHAT, chat_body, server

DEEP = '{"a":' * 700 + "1" + "}" * 700
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": DEEP}}],
}


def post(path, body):
    return server().client.post(path, json=body, timeout=30)


@pytest.mark.parametrize("path", [CHAT, "/tokenize", f"{CHAT}/render"])
def test_deep_arguments_in_a_string_are_refused(path):
    answer = post(path, chat_body(messages=[{"role": "user", "content": "x"}, CALL]))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    "name", ["conversations", "messages", "tools", "self", "template", "documents", "kwargs", "prompt"]
)
@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
def test_no_template_variable_meets_a_parameter(name, more):
    answer = post(CHAT, chat_body(max_tokens=1, chat_template_kwargs={name: 1}, **more))
    assert answer.status_code in (200, 400)


def test_many_template_variables_are_not_remembered_for_ever():
    def ask(i):
        assert post(
            CHAT, chat_body(max_tokens=1, chat_template_kwargs={"x": f"{i}" + "a" * 500_000})
        ).is_success

    for i in range(20):
        ask(i)
    before = server().rss()
    for i in range(20, 100):
        ask(i)
    assert server().rss() - before < 25_000_000, "eighty of them were 40 MB"


def held_up(path, body):
    """Longest time that /health took while a request was under way, and the request's answer."""
    worst, over = [0.0], threading.Event()

    def watch():
        while not over.is_set():
            began = time.monotonic()
            server().client.get("/health", timeout=30)
            worst[0] = max(worst[0], time.monotonic() - began)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answer = post(path, body)
    finally:
        over.set()
        watcher.join()
    return worst[0], answer


def tool(i):
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?:a|b)" * 2000}}}
    return {"type": "function", "function": {"name": f"f{i}", "parameters": schema}}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, chat_body(max_tokens=1, tools=[tool(i) for i in range(100)]), (200, 400)),
        (
            CHAT,
            chat_body(
                max_tokens=1,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "[^a-c]" * 300_000}},
                },
            ),
            (400,),
        ),
        ("/detokenize", {"tokens": [1.5] * 400_000}, (400,)),
    ],
    ids=["tools", "schema", "detokenize"],
)
def test_heavy_requests_hold_nobody_up(path, body, status):
    wait, answer = held_up(path, body)
    assert answer.status_code in status, answer.text[:300]
    assert wait < 1.5, "six seconds once"


def test_a_stop_string_does_not_cut_a_forced_call():
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = chat_body(
        tools=tools,
        tool_choice="required",
        stop=["}", '"b"', "\n"],
        max_tokens=200,
        parallel_tool_calls=False,
    )
    choice = post(CHAT, body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["a"] == "x"


def test_an_absolute_target_is_understood():
    import http.client

    connection = http.client.HTTPConnection(server().url.removeprefix("http://"), timeout=10)
    connection.request("GET", f"{server().url}/v1/models")
    assert connection.getresponse().status == 200
