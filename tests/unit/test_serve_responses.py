"""/v1/responses: items in and out, the events of a stream, tools, schemas, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serve_bigrams import Client, Scripted, refusal

from kllm.serve.response_input import messages_of

PATH = "/v1/responses"
LOOK = {
    "type": "function", "name": "look", "description": "Looks.", "strict": True,
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "the 猫"}}\n</tool_call>'


def client(says: str = "the cat sat.") -> Client:
    return Client(Scripted(says))


def events_of(text: str) -> list[dict[str, Any]]:
    """A stream's events; each frame must name its event and carry one line of JSON."""
    found = []
    for frame in text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs between two equal requests."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(item) for item in value]
        if isinstance(value, dict):
            return {k: cleaned(v) for k, v in value.items() if k not in ("id", "call_id", "created_at")}
        return value

    found: dict[str, Any] = cleaned(response)
    return found


# ---- answers


def test_an_answer_is_one_message() -> None:
    answer = client().post(PATH, model="tiny", input="hi", metadata={"a": "b"}).json()
    assert answer["object"] == "response" and answer["status"] == "completed"
    assert answer["id"].startswith("resp_") and answer["model"] == "tiny"
    (item,) = answer["output"]
    assert item["type"] == "message" and item["role"] == "assistant" and item["status"] == "completed"
    assert [(part["type"], part["text"]) for part in item["content"]] == [("output_text", "the cat sat.")]
    assert answer["error"] is None and answer["incomplete_details"] is None
    assert answer["metadata"] == {"a": "b"} and answer["store"] is False
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens"] > 2 and usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_an_answer_cut_by_its_limit_is_incomplete() -> None:
    body = {"input": "hi", "max_output_tokens": 2}
    answer = client().post(PATH, **body).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["usage"]["output_tokens"] == 2
    assert events_of(client().post(PATH, **body, stream=True).text)[-1]["type"] == "response.incomplete"


def test_silence_is_an_empty_message() -> None:
    assert client("").post(PATH, input="hi").json()["output"][0]["content"][0]["text"] == ""


def test_the_events_of_a_text() -> None:
    answer = client().post(PATH, input="hi", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas >= 1
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    text = "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    assert text == "the cat sat."
    assert events[-1]["response"]["id"] == events[0]["response"]["id"]
    assert events[0]["response"]["status"] == "in_progress"
    item = events[-1]["response"]["output"][0]
    assert events[2]["item"] == {**item, "content": [], "status": "in_progress"}
    assert events[-2]["item"] == item
    assert all(event["item_id"] == item["id"] for event in events if "item_id" in event)


@pytest.mark.parametrize(
    ("says", "body"),
    [
        ("the cat sat.", {}),
        ("the cat sat.", {"max_output_tokens": 3}),
        (CALL, {"tools": [LOOK]}),
        (f"so: {CALL}\n{CALL}", {"tools": [LOOK]}),
        ("<think>\nhm\n</think>\n\nthe cat", {}),
        (f"<think>\nhm\n</think>\n\nlook\n{CALL}", {"tools": [LOOK]}),
        ("<tool_call>no call</tool_call>", {"tools": [LOOK]}),
    ],
)
def test_a_stream_ends_with_the_whole_answer_and_its_events_add_up_to_it(says: str, body: Any) -> None:
    whole = client(says).post(PATH, input="hi", **body).json()
    events = events_of(client(says).post(PATH, input="hi", **body, stream=True).text)
    last = events[-1]["response"]
    assert plain(last) == plain(whole)
    opened = [e["output_index"] for e in events if e["type"] == "response.output_item.added"]
    assert opened == list(range(len(last["output"])))
    for index, item in enumerate(last["output"]):
        own = [e for e in events if e.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[-1]["type"] == "response.output_item.done" and own[-1]["item"] == item
        said = "".join(e["delta"] for e in own if e["type"].endswith(".delta"))
        assert said == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_reasoning_is_an_item_of_its_own() -> None:
    answer = client("<think>\nhm, a cat\n</think>\n\nthe cat").post(PATH, input="hi").json()
    thought, said = answer["output"]
    assert thought["type"] == "reasoning" and thought["id"].startswith("rs_")
    assert (
        thought["content"] == [{"type": "reasoning_text", "text": "hm, a cat"}] and thought["summary"] == []
    )
    assert said["content"][0]["text"] == "the cat"
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 2


def test_a_function_call_and_the_way_back() -> None:
    talk = client(CALL)
    answer = talk.post(PATH, input="look", tools=[LOOK]).json()
    (call,) = answer["output"]
    assert call["type"] == "function_call" and call["name"] == "look"
    assert call["call_id"].startswith("call_") and json.loads(call["arguments"]) == {"at": "the 猫"}
    assert answer["status"] == "completed" and answer["tools"] == [LOOK]
    history = [
        {"role": "user", "content": "look"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "a cat"},
    ]
    again = client("it is a cat").post(PATH, input=history, tools=[LOOK])
    assert again.json()["output"][0]["content"][0]["text"] == "it is a cat"


def test_the_official_types_take_it() -> None:
    responses = pytest.importorskip("openai.types.responses")
    pydantic = pytest.importorskip("pydantic")
    strict = {"strict": False, "from_attributes": False}
    for says in ("the cat", f"<think>\nhm\n</think>\n\nlook\n{CALL}"):
        body = {"input": "hi", "tools": [LOOK], "text": {"format": {"type": "text"}}}
        responses.Response.model_validate(client(says).post(PATH, **body).json(), **strict)
        one = pydantic.TypeAdapter(responses.ResponseStreamEvent)
        for event in events_of(client(says).post(PATH, **body, stream=True).text):
            assert one.validate_python(event).type == event["type"]


# ---- requests


def test_input_items_become_messages() -> None:
    messages = messages_of(
        "be short",
        [
            {"role": "developer", "content": "no lies"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
            {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
            {"role": "assistant", "content": "x"},
            {"role": "assistant", "content": "y"},
        ],
    )  # fmt: skip

    def call(number: int, name: str) -> dict[str, Any]:
        return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert messages == [
        {"role": "system", "content": "be short"},
        {"role": "developer", "content": "no lies"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "reasoning_content": "hm", "content": "so", "tool_calls": [call(1, "f"), call(2, "g")]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": None, "tool_calls": [call(3, "f")]},
        {"role": "assistant", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]  # fmt: skip


def test_instructions_are_the_system_message() -> None:
    talk = client()
    with_words = talk.post(PATH, input="hi", instructions="be kind and short").json()
    assert with_words["instructions"] == "be kind and short"
    messages = [{"role": "system", "content": "be kind and short"}, {"role": "user", "content": "hi"}]
    tokens = talk.post("/tokenize", messages=messages).json()["count"]
    assert with_words["usage"]["input_tokens"] == tokens


def test_what_sdks_send_beside_is_ignored() -> None:
    body = {
        "store": False, "background": False, "previous_response_id": None, "truncation": "disabled",
        "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"verbosity": "low"}, "user": "u", "service_tier": "auto", "prompt_cache_key": "k",
        "top_logprobs": 0, "max_tool_calls": 3, "safety_identifier": "s", "tools": [], "unheard_of": 1,
    }  # fmt: skip
    assert client().post(PATH, input="hi", **body).status_code == 200
    nothing = dict.fromkeys(
        ("instructions", "tools", "text", "reasoning", "metadata", "temperature", "store")
    )
    assert client().post(PATH, input="hi", **nothing).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "file_search"}, "tools": [LOOK]}, "tool_choice.type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_as_unsupported(change: dict[str, Any], param: str) -> None:
    error = refusal(client().post(PATH, **{"input": "hi", **change}))
    assert error["code"] == "unsupported" and error["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"instructions": 7}, "instructions"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [LOOK, LOOK]}, "tools[1].name"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "hear"}}, "tool_choice.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "hi " * 9000}, "input"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refusals_name_the_field_of_this_request(change: dict[str, Any], param: str) -> None:
    assert refusal(client().post(PATH, **{"input": "hi", **change}))["param"] == param


def test_a_schema_is_compiled_and_given_to_the_engine() -> None:
    engine = Scripted('{"at":"x"}')
    form = {"type": "json_schema", "name": "place", "schema": LOOK["parameters"], "strict": True}
    answer = Client(engine).post(PATH, input="hi", text={"format": form}).json()
    assert answer["text"] == {"format": form}
    assert engine.params[-1].constraint is not None
    for choice in ("required", {"type": "function", "name": "look"}):
        Client(engine).post(PATH, input="hi", tools=[LOOK], tool_choice=choice)
        assert engine.params[-1].constraint is not None
    Client(engine).post(PATH, input="hi", tools=[LOOK])
    assert engine.params[-1].constraint is None
