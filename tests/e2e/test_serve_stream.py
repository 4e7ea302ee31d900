"""Streaming: framing, order, and that a stream adds up to the whole answer."""

from __future__ import annotations

import json
import time

import pytest
from serve_client import (
    CHAT,
    THINK,
    chat_body,
    close_thinking,
    content_of,
    events,
    eventually,
    forced,
    locked_server,
    read_all,
    refused,
    server,
    texts_of,
    whole_message,
    without_ids,
)
from serve_model import added_tokens

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "北京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def test_headers():
    headers = server().stream_chat().headers
    assert headers["content-type"].replace(" ", "").lower() == "text/event-stream;charset=utf-8"
    assert headers["cache-control"] == "no-cache, no-transform"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"]


def test_framing_is_exact():
    raw = server().stream_chat(max_tokens=5).raw
    assert raw.endswith(b"\n\ndata: [DONE]\n\n") and b"\r" not in raw
    for block in raw.removesuffix(b"\n\n").split(b"\n\n"):
        assert block.startswith(b"data: ") and b"\n" not in block


def test_text_is_not_escaped():
    raw = server().stream_chat(**forced("囍🤖é")).raw
    assert "囍".encode() in raw and b"\\u" not in raw


def test_order_of_the_chunks():
    stream = server().stream_chat(max_tokens=6)
    choices = stream.of(0)
    first, last = choices[0], choices[-1]
    assert first["delta"]["role"] == "assistant" and first["delta"].get("content") == ""
    assert first["finish_reason"] is None
    assert last["delta"] == {} and last["finish_reason"] == "length"
    assert all(c["finish_reason"] is None and "role" not in c["delta"] for c in choices[1:-1])


def test_chunks_share_their_head():
    chunks = server().stream_chat(n=2).chunks
    for name in ("id", "created", "model", "object", "system_fingerprint"):
        assert len({chunk[name] for chunk in chunks}) == 1, name
    assert chunks[0]["object"] == "chat.completion.chunk" and chunks[0]["id"].startswith("chatcmpl-")


def test_no_empty_deltas_in_between():
    for choice in server().stream_chat(max_tokens=40, temperature=1, seed=3).of(0)[1:-1]:
        assert choice["delta"]["content"]


def test_usage_only_when_asked_for():
    assert all(not chunk.get("usage") for chunk in server().stream_chat().chunks)
    asked = server().stream_chat(stream_options={"include_usage": True})
    assert all(not chunk.get("usage") for chunk in asked.chunks[:-1])
    assert asked.chunks[-1]["choices"] == []
    whole = server().chat()["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert asked.usage[name] == whole[name]
    assert not server().stream_chat(stream_options={"include_usage": False}).usage


def test_chunks_come_as_they_are_made():
    body = chat_body(max_tokens=400, stream=True, ignore_eos=True)
    server()
    started = time.monotonic()
    with server().client.stream("POST", CHAT, json=body) as response:
        times = [time.monotonic() - started for _ in response.iter_raw()]
    assert len(times) >= 20 and times[2] < times[-1] / 2


CASES = {
    "greedy": {"max_tokens": 40},
    "seeded": {"max_tokens": 40, "temperature": 1, "seed": 1},
    "hot": {"max_tokens": 60, "temperature": 2, "seed": 2},
    "filtered": {"max_tokens": 24, "temperature": 0.9, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "seed": 3},
    "penalised": {"max_tokens": 24, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.2},
    "n": {"max_tokens": 12, "n": 3, "temperature": 1, "seed": 4},
    "one token": {"max_tokens": 1},
    "nothing": {"logit_bias": {str(added_tokens()["<|im_end|>"]): 100}},
    "thinking": {**THINK, "max_tokens": 24},
    "thinking, then an answer": {**THINK, **close_thinking(), **forced("blue sky")},
    "thinking seeded": {**THINK, "max_tokens": 24, "temperature": 1, "seed": 5},
    "forced": forced("囍🤖龘𠮷é한"),
    "forced with newlines": forced("\n\n two\n\nlines \n"),
    "stop": forced("alpha beta gamma", stop="gam"),
    "logprobs": {"max_tokens": 12, "logprobs": True, "top_logprobs": 2},
    "logprobs of wide characters": {"logprobs": True, **forced("囍🤖é")},
    "schema": {
        "max_tokens": 80,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "a",
                "schema": {
                    "type": "object",
                    "properties": {"k": {"enum": ["v"]}},
                    "required": ["k"],
                    "additionalProperties": False,
                },
            },
        },
    },
    "tool": {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 120, "parallel_tool_calls": False},
    "named tool": {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 120,
    },
    "tool not called": {"tools": [WEATHER], "max_tokens": 12},
    "marker without a call": {
        "tools": [WEATHER],
        "max_tokens": 3,
        "logit_bias": {str(added_tokens()["<tool_call>"]): 100},
    },
    "continued": {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_stream_equals_whole(case):
    fields = CASES[case]
    whole, stream = server().chat(**fields), server().stream_chat(**fields)
    for index in range(fields.get("n", 1)):
        assert without_ids(stream.message(index)) == without_ids(whole_message(whole, index))


def test_stream_of_the_other_reasoning_field():
    deltas = [choice["delta"] for choice in locked_server().stream_chat(**THINK, max_tokens=5).of(0)]
    assert any(delta.get("reasoning") for delta in deltas)
    assert not any("reasoning_content" in delta for delta in deltas)


def test_thinking_deltas_are_never_mixed():
    for choice in server().stream_chat(**CASES["thinking, then an answer"]).of(0)[1:]:
        delta = choice["delta"]
        assert not (delta.get("content") and delta.get("reasoning_content"))


def test_choices_of_a_stream_are_complete():
    stream = server().stream_chat(
        n=4, temperature=1, seed=8, max_tokens=10, stream_options={"include_usage": True}
    )
    for index in range(4):
        assert stream.of(index)[0]["delta"]["role"] == "assistant"
        assert [c["finish_reason"] for c in stream.of(index)].count("length") == 1
    assert stream.usage["completion_tokens"] == 40
    assert stream.chunks[-2]["choices"][0]["finish_reason"]


REFUSED = {
    "temperature": 3,
    "stop": 5,
    "n": 99,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}},
    "structured_outputs": {"regex": "("},
    "logit_bias": {"x": 1},
    "tool_choice": "required",
    "top_logprobs": 3,
    "stream_options": {"include_usage": "perhaps"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_errors_before_the_first_token_are_plain(field):
    refused(server().post(CHAT, chat_body(stream=True, **{field: REFUSED[field]})))


def test_unknown_model_before_the_first_token_is_plain():
    refused(server().post(CHAT, chat_body(stream=True, model="nobody")), 404, code="model_not_found")


def test_two_streams_on_one_connection():
    body = json.dumps({**chat_body(), "stream": True}).encode()
    with server().open_stream(chat_body()) as connection:
        first = read_all(connection, 1)
        assert b"[DONE]" in first
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"[DONE]" in read_all(connection, 1)


def test_http_1_0_client_gets_the_stream_too():
    body = json.dumps({**chat_body(), "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = server().raw_answer(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.split(b"\r\n", 1)[0].endswith(b"200 OK") and b"data: [DONE]\n\n" in answer


@pytest.mark.parametrize("n", [1, 3])
def test_disconnect_of_a_stream_frees_the_row(n):
    with server().open_stream(chat_body(max_tokens=2000, ignore_eos=True, n=n)) as connection:
        connection.recv(500)
        assert server().metric("num_requests_running") >= 1
    started = time.monotonic()
    assert eventually(server().idle, 5)
    assert time.monotonic() - started < 3


def test_stream_of_completions_framing():
    stream = server().stream_complete(n=2, max_tokens=10, temperature=1, seed=1)
    assert {chunk["object"] for chunk in stream.chunks} == {"text_completion"}
    whole = server().complete(n=2, max_tokens=10, temperature=1, seed=1)
    assert [stream.text(0), stream.text(1)] == texts_of(whole)
    assert stream.of(1)[-1]["finish_reason"] == "length"


def test_late_grammar_error_ends_only_its_own_request():
    schema = {"type": "string", "pattern": "^(([a-z]{1,50}){1,50}){1,50}$"}
    fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    server()
    started = time.monotonic()
    response = server().post(CHAT, chat_body(stream=True, max_tokens=60, **fields))
    assert time.monotonic() - started < 15
    if response.status_code == 200:
        chunks = events(response.content)
        assert "error" in chunks[-1] or chunks[-1]["choices"][0]["finish_reason"]
    else:
        assert response.status_code in (400, 500)
        refused(response, response.status_code)
    assert content_of(server().chat())
