"""Tool calls: chosen, required, named, refused, streamed, and handed back."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from serve_client import CHAT, chat_body, content_of, refused, server, whole_message, without_ids
from serve_model import added_tokens, decode

SUM = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "op": {"enum": ["plus", "mal"]}},
    "required": ["a", "op"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "北京"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMAS = {"add_up": SUM, "get.weather-1": CITY}


def tool(name, parameters=None, **more):
    function = {"name": name, "description": f"Does {name}.", **more}
    return {
        "type": "function",
        "function": function if parameters is None else {**function, "parameters": parameters},
    }


TOOLS = [tool(name, schema) for name, schema in SCHEMAS.items()]
USER = [{"role": "user", "content": "hello"}]


def named(name):
    return {"type": "function", "function": {"name": name}}


def required(**fields):
    return server().chat(**{"tools": TOOLS, "tool_choice": "required", "max_tokens": 300, **fields})


def checked_calls(answer):
    """The calls of an answer that has some; each is whole and obeys its schema."""
    choice = answer["choices"][0]
    message = choice["message"]
    assert message["content"] is None or message["content"] == ""
    for call in message["tool_calls"]:
        assert set(call) >= {"id", "type", "function"} and call["type"] == "function"
        assert re.fullmatch(r"call_[A-Za-z0-9]{24}", call["id"])
        arguments = call["function"]["arguments"]
        assert isinstance(arguments, str)
        jsonschema.validate(json.loads(arguments), SCHEMAS[call["function"]["name"]])
    assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
    return message["tool_calls"]


@pytest.mark.parametrize("seed", range(4))
def test_required_gives_calls_that_obey(seed):
    answer = required(temperature=1, seed=seed, parallel_tool_calls=False)
    assert len(checked_calls(answer)) == 1
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_required_in_parallel_gives_whole_calls():
    answer = required(temperature=1, seed=1, parallel_tool_calls=True)
    assert len(checked_calls(answer)) >= 1
    assert answer["choices"][0]["finish_reason"] in ("tool_calls", "length")


def test_required_beside_a_call_content_is_null():
    assert required(parallel_tool_calls=False)["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize("name", SCHEMAS)
def test_named_tool(name):
    answer = required(tool_choice=named(name))
    calls = checked_calls(answer)
    assert [call["function"]["name"] for call in calls] == [name]
    assert answer["choices"][0]["finish_reason"] in ("tool_calls", "stop")


def test_tool_without_parameters():
    answer = server().chat(
        tools=[tool("ping")], tool_choice="required", max_tokens=60, parallel_tool_calls=False
    )
    for call in answer["choices"][0]["message"].get("tool_calls") or []:
        assert call["function"]["name"] == "ping"
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_tool_with_empty_parameters_has_an_end():
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    answer = server().chat(tools=[tool("ping", empty)], tool_choice=named("ping"), max_tokens=60)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {}


@pytest.mark.parametrize("strict", [True, False, None])
def test_strict_is_accepted_and_always_kept(strict):
    answer = required(tools=[tool("add_up", SUM, strict=strict)], tool_choice=named("add_up"))
    assert checked_calls(answer)


def test_auto_without_a_call_is_text():
    message = server().chat(tools=TOOLS)["choices"][0]["message"]
    assert message["content"] and not message.get("tool_calls")
    assert (
        server().chat(tools=TOOLS, tool_choice="auto")["choices"][0]["message"]["content"]
        == message["content"]
    )


CALL = '\\n{\\"name\\": \\"add_up\\", \\"arguments\\": {\\"a\\": 7, \\"op\\": \\"plus\\"}}\\n'
OPEN, SHUT = added_tokens()["<tool_call>"], added_tokens()["</tool_call>"]


def written(*parts):
    """Fields that make the model write `parts`: ints are tokens, strings text."""
    rule = " ".join(f"<[{part}]>" if isinstance(part, int) else f'"{part}"' for part in parts)
    return {"structured_outputs": {"grammar": f"start: {rule}"}, "max_tokens": 200, "tools": TOOLS}


def test_auto_parses_the_model_s_own_format():
    answer = server().chat(**written(OPEN, CALL, SHUT))
    (call,) = checked_calls(answer)
    assert json.loads(call["function"]["arguments"]) == {"a": 7, "op": "plus"}
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_auto_parses_several_calls_and_keeps_text():
    answer = server().chat(**written("Let me see.", OPEN, CALL, SHUT, "\\n", OPEN, CALL, SHUT))
    message = answer["choices"][0]["message"]
    assert len(message["tool_calls"]) == 2 and "Let me see." in message["content"]
    assert "tool_call>" not in message["content"]


@pytest.mark.parametrize(
    "inside",
    ["not json", '{\\"name\\": ', "[1, 2]", '{\\"arguments\\": {}}', "5"],
)
def test_what_is_no_call_stays_text(inside):
    fields = written("x", OPEN, inside, SHUT, "y")
    message = whole_message(server().chat(**fields))
    assert not message["calls"] and message["finish"] == "stop"
    assert inside.replace("\\", "") in message["content"]
    assert message["content"].startswith("x") and message["content"].endswith("y")
    assert server().stream_chat(**fields).message()["content"] == message["content"]


def test_unfinished_call_is_not_lost():
    bias = {"logit_bias": {str(OPEN): 100}, "max_tokens": 3, "tools": TOOLS}
    message = whole_message(server().chat(**bias))
    assert message["content"] == "<tool_call>" * 3 and message["finish"] == "length"


def test_none_never_calls_but_keeps_the_prompt():
    answer = server().chat(tools=TOOLS, tool_choice="none", logit_bias={str(OPEN): 100})
    message = answer["choices"][0]["message"]
    assert not message.get("tool_calls") and "<tool_call>" not in message["content"]
    auto = server().chat(tools=TOOLS)["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens"] == auto


def test_tools_are_in_the_prompt():
    text = decode(server().prompt_ids(USER, tools=TOOLS))
    assert "add_up" in text and "get.weather-1" in text and "Does add_up." in text


@pytest.mark.parametrize("tools", [[], None])
def test_no_tools(tools):
    assert content_of(server().chat(tools=tools)) == content_of(server().chat())
    assert content_of(server().chat(tools=tools, tool_choice="none")) == content_of(server().chat())


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": named("add_up")},
        {"tools": [], "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": named("nobody")},
        {"tools": TOOLS, "tool_choice": "sometimes"},
        {"tools": TOOLS, "tool_choice": {"type": "function"}},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}},
        {"tools": TOOLS, "tool_choice": {"type": "wizard", "function": {"name": "add_up"}}},
        {"tools": TOOLS, "tool_choice": 5},
        {"tools": TOOLS, "tool_choice": []},
    ],
    ids=lambda fields: str(fields.get("tool_choice")) + f" {len(fields)}",
)
def test_bad_tool_choice(fields):
    assert refused(server().post(CHAT, chat_body(**fields)))["param"].startswith("tool")


BAD_TOOLS = {
    "twice": [tool("a", SUM), tool("a", CITY)],
    "name with a blank": [tool("bad name")],
    "empty name": [tool("")],
    "long name": [tool("x" * 65)],
    "wide name": [tool("wetter_über")],
    "no name": [{"type": "function", "function": {"description": "x"}}],
    "no function": [{"type": "function"}],
    "other type": [{"type": "retrieval"}],
    "no type": [{"function": {"name": 5}}],
    "schema type": [tool("a", {"type": "wizard"})],
    "schema list": [tool("a", [])],
    "schema text": [tool("a", "object")],
    "schema pattern": [
        tool("a", {"type": "object", "properties": {"x": {"type": "string", "pattern": "("}}})
    ],
    "not an object": ["a"],
    "too many": [tool(f"t{i}") for i in range(129)],
}


@pytest.mark.parametrize("name", BAD_TOOLS)
def test_bad_tools(name):
    fields = {"tools": BAD_TOOLS[name], "tool_choice": "required"}
    assert refused(server().post(CHAT, chat_body(**fields)))["param"].startswith("tools")


def test_bad_tools_under_auto_too():
    for name in ("twice", "name with a blank", "schema type"):
        refused(server().post(CHAT, chat_body(tools=BAD_TOOLS[name])))


@pytest.mark.parametrize("name", ["x" * 64, "A.b-c_9", "0"])
def test_good_names(name):
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    answer = server().chat(
        tools=[tool(name, empty)], tool_choice="required", parallel_tool_calls=False, max_tokens=150
    )
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == name


def test_round_trip():
    first = required(parallel_tool_calls=False)
    message = first["choices"][0]["message"]
    (call,) = message["tool_calls"]
    messages = [*USER, message, {"role": "tool", "tool_call_id": call["id"], "content": "the result is 42"}]
    answer = server().answer(CHAT, chat_body(messages=messages, tools=TOOLS))
    assert content_of(answer)
    text = decode(server().prompt_ids(messages, tools=TOOLS))
    assert "the result is 42" in text and call["function"]["name"] in text
    assert "<tool_call>" in text


def test_two_results_in_one_turn():
    calls = [
        {
            "id": f"c{i}",
            "type": "function",
            "function": {"name": "add_up", "arguments": '{"a": 1, "op": "plus"}'},
        }
        for i in range(2)
    ]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"result-{i}"} for i in range(2)]
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    text = decode(server().prompt_ids(messages))
    assert "result-0" in text and "result-1" in text
    server().answer(CHAT, chat_body(messages=messages, tools=TOOLS))


@pytest.mark.parametrize("arguments", ["not json", "[1]", "5", 5, [], ""])
def test_arguments_that_are_no_object(arguments):
    """Refused or taken as text, but never an error of the server."""
    call = {"id": "c", "type": "function", "function": {"name": "add_up", "arguments": arguments}}
    messages = [
        *USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    response = server().post(CHAT, chat_body(messages=messages))
    if response.status_code != 200:
        assert refused(response)["param"].startswith("messages[1]")


# ---------------------------------------------------------------------------------------------- streamed


def deltas_of(stream):
    return [part for choice in stream.of(0) for part in choice["delta"].get("tool_calls") or []]


@pytest.mark.parametrize("choice", ["required", named("get.weather-1")], ids=["required", "named"])
def test_stream_of_a_call(choice):
    fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 300, "parallel_tool_calls": False}
    stream = server().stream_chat(**fields)
    deltas = deltas_of(stream)
    first = deltas[0]
    assert first["index"] == 0 and first["type"] == "function" and re.fullmatch(r"call_\w{24}", first["id"])
    assert first["function"]["name"] in SCHEMAS and first["function"]["arguments"] == ""
    for delta in deltas[1:]:
        assert not delta.get("id") and not delta["function"].get("name") and delta["function"]["arguments"]
    assert len(deltas) > 2, "arguments come in pieces"
    message = stream.message()
    assert message["content"] == "" and message["finish"] in ("tool_calls", "stop")
    whole = whole_message(server().chat(**fields))
    assert without_ids(message) == without_ids(whole)


def test_stream_of_several_calls():
    fields = written("Hm.", OPEN, CALL, SHUT, "\\n", OPEN, CALL, SHUT)
    stream = server().stream_chat(**fields)
    assert [d["index"] for d in deltas_of(stream) if d.get("id")] == [0, 1]
    assert without_ids(stream.message()) == without_ids(whole_message(server().chat(**fields)))
    assert "tool_call>" not in stream.message()["content"]


def test_stream_shows_no_marker():
    raw = server().stream_chat(**written(OPEN, CALL, SHUT)).raw
    assert b"tool_call>" not in raw


def test_calls_after_thinking():
    fields = {
        "chat_template_kwargs": {"enable_thinking": True},
        "logit_bias": {str(added_tokens()["</think>"]): 100},
        "parallel_tool_calls": False,
    }
    answer = required(**fields)
    assert checked_calls(answer) and not answer["choices"][0]["message"].get("reasoning_content")


def test_calls_are_counted_in_usage():
    usage = required(parallel_tool_calls=False)["usage"]
    assert usage["completion_tokens"] > 10
