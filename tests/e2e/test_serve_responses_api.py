"""The stateless subset of the Responses API."""

from __future__ import annotations

import json

import pytest
from serve_client import refused, server

PATH = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"k": {"enum": ["v"]}},
    "required": ["k"],
    "additionalProperties": False,
}


def body(**fields):
    return {"input": "hello", "max_output_tokens": 8, "temperature": 0, **fields}


def respond(**fields):
    return server().answer(PATH, body(**fields))


def text_of(answer):
    parts = [part for item in answer["output"] if item["type"] == "message" for part in item["content"]]
    return "".join(part["text"] for part in parts if part["type"] == "output_text")


def stream(**fields):
    response = server().post(PATH, body(stream=True, **fields))
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.content.decode("utf-8").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if lines.get("data", "[DONE]") != "[DONE]":
            events.append(json.loads(lines["data"]))
            assert lines.get("event", events[-1]["type"]) == events[-1]["type"]
    return events


def test_answer():
    answer = respond()
    assert answer["object"] == "response" and answer["id"].startswith("resp") and answer["model"] == "tiny"
    assert answer["status"] == "incomplete" and answer["incomplete_details"]["reason"] == "max_output_tokens"
    assert text_of(answer)
    assert answer["usage"]["output_tokens"] == 8
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + 8


def test_same_text_as_chat():
    assert text_of(respond()) == server().chat("hello")["choices"][0]["message"]["content"]


def test_instructions_are_a_system_message():
    plain, instructed = respond(), respond(instructions="be brief")
    assert instructed["usage"]["input_tokens"] > plain["usage"]["input_tokens"]


def test_input_as_messages():
    for content in ("hello", [{"type": "input_text", "text": "hello"}]):
        assert text_of(respond(input=[{"role": "user", "content": content}])) == text_of(respond())


def test_json_schema():
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    answer = respond(text=form, max_output_tokens=60)
    assert json.loads(text_of(answer)) == {"k": "v"} and answer["status"] == "completed"


def test_tools_round_trip():
    answer = respond(tools=[TOOL], tool_choice="required", max_output_tokens=200, parallel_tool_calls=False)
    (call,) = [item for item in answer["output"] if item["type"] == "function_call"]
    assert call["name"] == "weather" and json.loads(call["arguments"])["city"] in ("Paris", "Rome")
    items = [
        {"role": "user", "content": "x"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"},
    ]
    assert text_of(respond(input=items, tools=[TOOL], tool_choice="none"))


def test_stream_order():
    events = stream()
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == text_of(respond()) == events[kinds.index("response.output_text.done")]["text"]


def test_stream_that_completes():
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    events = stream(text=form, max_output_tokens=60)
    assert events[-1]["type"] == "response.completed" and events[-1]["response"]["status"] == "completed"


@pytest.mark.parametrize(
    "fields", [{"previous_response_id": "resp_1"}, {"background": True}, {"store": True}], ids=str
)
def test_state_is_unsupported(fields):
    error = refused(server().post(PATH, body(**fields)))
    assert "unsupported" in error["code"] and error["param"] in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"input": 5},
        {"input": []},
        {"input": [{"type": "wizard"}]},
        {"temperature": 3},
        {"max_output_tokens": 0},
        {"text": {"format": {"type": "x"}}},
    ],
    ids=str,
)
def test_refused(fields):
    refused(server().post(PATH, body(**fields)))


def test_unknown_model():
    refused(server().post(PATH, body(model="nobody")), 404, code="model_not_found")
