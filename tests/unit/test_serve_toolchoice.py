"""Tools and grammars in chat requests: what is parsed, forced, banned and refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from serve_scripted import CALL, THINK, TOOL, Server, chunks_of, fresh_server, joined, says, tokenizer

from kllm.serve.errors import ApiError
from kllm.serve.schemas import check_schema
from kllm.serve.tools import tool_plan

server = pytest.fixture(fresh_server)


# ---- tools


@says("Let me see.\n" + CALL + "\n" + CALL)
def test_calls_are_parsed(server: Server) -> None:
    choice = server.message("hi", tools=[TOOL])
    calls = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Let me see." and choice["finish_reason"] == "tool_calls"
    assert [c["function"] for c in calls] == [{"name": "f", "arguments": '{"x": 1}'}] * 2
    assert len({c["id"] for c in calls}) == 2 and all(re.fullmatch(r"call_\w{24}", c["id"]) for c in calls)
    streamed = joined(chunks_of(server.chat("hi", tools=[TOOL], stream=True)))
    assert streamed["content"] == "Let me see." and streamed["reason"] == "tool_calls"
    assert [(c["name"], c["arguments"]) for c in streamed["calls"]] == [("f", '{"x": 1}')] * 2
    assert len(server.message("hi", tools=[TOOL], parallel_tool_calls=False)["message"]["tool_calls"]) == 1


@says(CALL)
def test_content_is_null_beside_calls_only(server: Server) -> None:
    assert server.message("hi", tools=[TOOL])["message"]["content"] is None
    for tools in (
        {},
        {"tools": []},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none"},
    ):
        choice = server.message("hi", **tools)
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop", tools
        assert "tool_calls" not in choice["message"]


def test_none_bans_the_marker_and_keeps_the_tools_in_the_prompt(server: Server) -> None:
    token = tokenizer().added_tokens["<tool_call>"]
    server.message("hi", tools=[TOOL], tool_choice="none", logit_bias={str(token): 100})
    assert dict(server.engine.asked[-1][1].logit_bias)[token] < -1e6
    assert '"description": "d"' in server.prompt()
    server.message("hi", tools=[TOOL])
    assert server.engine.asked[-1][1].logit_bias == ()


@says("<tool_call>oops</tool_call> and more")
def test_a_broken_call_is_text(server: Server) -> None:
    choice = server.message("hi", tools=[TOOL])
    assert (
        choice["message"]["content"] == "<tool_call>oops</tool_call> and more"
        and choice["finish_reason"] == "stop"
    )
    assert (
        joined(chunks_of(server.chat("hi", tools=[TOOL], stream=True)))["content"]
        == choice["message"]["content"]
    )


@says(CALL)
def test_forced_calls_have_a_grammar(server: Server) -> None:
    other = {"type": "function", "function": {"name": "g"}}
    both = [
        {"name": "f", "parameters": {**TOOL["function"]["parameters"], "additionalProperties": False}},
        {"name": "g", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    ]
    cases: list[tuple[Any, Any, list[Any], bool]] = [
        ("required", True, both, True),
        ("required", False, both, False),
        ({"type": "function", "function": {"name": "f"}}, True, both[:1], False),
    ]
    for choice, parallel, wanted, repeat in cases:
        done = server.message("hi", tools=[TOOL, other], tool_choice=choice, parallel_tool_calls=parallel)
        assert server.compiler.asked[-1] == ("tools", (wanted,), {"repeat": repeat, "after": None})
        assert server.engine.asked[-1][1].constraint == ("tools", wanted)
        assert (
            done["finish_reason"] == "tool_calls"
            and done["message"]["tool_calls"][0]["function"]["name"] == "f"
        )
    server.message("hi", tools=[TOOL], tool_choice="required", **THINK)
    assert server.compiler.asked[-1][2]["after"] == "</think>"
    cut = server.message(
        "hi", tools=[TOOL], tool_choice="required", max_tokens=len(tokenizer().encode_raw(CALL)) - 4
    )
    assert cut["finish_reason"] == "length" and cut["message"]["tool_calls"][0]["function"][
        "arguments"
    ].startswith("{")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": "x"}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0].function.parameters.type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integr"}}}}}]}, "tools[0].function.parameters.properties.x.type"),
        ({"tools": [{**TOOL, "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    ],
)  # fmt: skip
def test_wrong_tools_are_named(server: Server, body: dict[str, Any], param: str) -> None:
    assert server.refusal("hi", **body)["param"] == param


def test_arguments_that_a_function_does_not_declare_are_left_out() -> None:
    def forced(parameters: Any) -> Any:
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        plan = tool_plan([tool], "required", True)
        return plan.forced and plan.forced[0]["parameters"]

    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert forced(None) == forced({}) == forced({"properties": {}}) == nothing
    for open_ in ({"type": "object"}, {"type": "object", "properties": {}, "additionalProperties": True},
                  {"type": "object", "properties": {}, "required": ["x"]},
                  {"type": "object", "properties": {}, "allOf": [{"properties": {"x": {}}}]}):  # fmt: skip
        assert forced(open_) == open_


@pytest.mark.parametrize(
    ("schema", "at"),
    [
        (True, None),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": ["string", "null"], "pattern": r"^\p{L}(?<n>x)\u{1F600}(?<!a|bc)$"}}}, None),
        ({"type": "object", "x-strange": 5, "required": [], "additionalProperties": False, "minProperties": 1.0}, None),
        ({"items": [{"type": "string"}, True], "anyOf": [{}], "enum": [None]}, None),
        (5, ""),
        ({"type": []}, ".type"),
        ({"type": {"a": 1}}, ".type"),
        ({"pattern": "("}, ".pattern"),
        ({"patternProperties": {"[": {}}}, ".patternProperties"),
        ({"properties": []}, ".properties"),
        ({"properties": {"a": 5}}, ".properties.a"),
        ({"anyOf": {}}, ".anyOf"),
        ({"oneOf": [{"not": 1}]}, ".oneOf[0].not"),
        ({"items": [5]}, ".items[0]"),
        ({"required": [1]}, ".required"),
        ({"enum": []}, ".enum"),
        ({"minimum": "1"}, ".minimum"),
        ({"maxLength": -1}, ".maxLength"),
        ({"maxItems": 1.5}, ".maxItems"),
        ({"$ref": 5}, ".$ref"),
    ],
)  # fmt: skip
def test_schemas(schema: Any, at: str | None) -> None:
    if at is None:
        check_schema(schema, "s")
    else:
        with pytest.raises(ApiError) as caught:
            check_schema(schema, "s")
        assert (caught.value.status, caught.value.param) == (400, f"s{at}")


def test_a_schema_may_not_be_too_deep() -> None:
    schema: dict[str, Any] = {}
    for _ in range(70):
        schema = {"items": schema}
    with pytest.raises(ApiError, match="deeper"):
        check_schema(schema, "s")


# ---- grammars


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}


@pytest.mark.parametrize(
    ("body", "compiled"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_object",)),
        ({"response_format": schema_format({"type": "object"})}, ("json_schema", {"type": "object"})),
        ({"structured_outputs": {"json": {"type": "null"}}}, ("json_schema", {"type": "null"})),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, ("json_schema", {"type": "null"})),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"], "json": None}}, ("choice", ["a", "b"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, ("lark", 'start: "a"')),
    ],
)
def test_grammars_are_compiled(server: Server, body: dict[str, Any], compiled: Any) -> None:
    server.message("hi", **body)
    assert server.engine.asked[-1][1].constraint == compiled
    server.message("hi", **body, **THINK)
    assert [asked[2] for asked in server.compiler.asked] == (
        [] if compiled is None else [{"after": None}, {"after": "</think>"}]
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format.json_schema.schema"),
        ({"response_format": schema_format([])}, "response_format.json_schema.schema"),
        ({"response_format": schema_format({"type": "strin"})}, "response_format.json_schema.schema.type"),
        ({"response_format": schema_format({"enum": ["x" * 70_000]})}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [5]}}, "structured_outputs.choice[0]"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "tools": [TOOL], "tool_choice": "required"}, "structured_outputs"),
    ],
)  # fmt: skip
def test_wrong_grammars_are_named(server: Server, body: dict[str, Any], param: str) -> None:
    assert server.refusal("hi", **body)["param"] == param


def test_marks_spelt_inside_constrained_text_are_text() -> None:
    """No token of it is the mark, so it is a JSON string like any other."""
    tok = tokenizer()
    ids = tok.encode('{"a": "<think></think><tool_call>{}</tool_call>"}')
    server = Server(lambda prompt, params: ids)
    message = server.message("hi", response_format={"type": "json_object"}, tools=[TOOL])["message"]
    assert message["content"] == tok.decode(ids) and set(message) == {"role", "content", "refusal"}
    server.close()
