"""Structured output: JSON schemas, regular expressions, choices, grammars on a model that knows nothing."""

from __future__ import annotations

import json
import re
import time

import jsonschema
import pytest
from serve_client import CHAT, chat_body, content_of, forced, refused, server, texts_of, whole_message
from serve_model import added_tokens, encode

WIDE = "囍🤖龘𠮷é한"


def shaped(schema, **fields):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"response_format": form, "max_tokens": 300, **fields}


def obj(required=None, **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


SCHEMAS = {
    "enum": {"enum": ["red", "green", "blue"]},
    "const": {"const": {"a": [1, None, "é"]}},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "range": {"type": "integer", "minimum": 0, "maximum": 150},
    "negative range": {"type": "integer", "minimum": -5, "exclusiveMaximum": 3},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 25},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "short text": {"type": "string", "minLength": 2, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"enum": ["x"]}], "items": False, "minItems": 2},
    "object": obj(
        name={"type": "string", "maxLength": 8}, age={"type": "integer", "minimum": 0, "maximum": 150}
    ),
    "optional": obj([], a={"const": 1}, b={"const": 2}),
    "nested": obj(a=obj(b=obj(c={"enum": [1, 2]}))),
    "any of": {"anyOf": [{"const": 1}, obj(x={"const": "y"})]},
    "one of": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "union type": {"type": ["boolean", "null"]},
    "definitions": {
        "$defs": {"c": {"enum": ["r", "g"]}},
        **obj(c={"$ref": "#/$defs/c"}, d={"$ref": "#/$defs/c"}),
    },
    "recursion": {
        "$defs": {"n": obj(v={"enum": [1, 2]}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]})},
        "$ref": "#/$defs/n",
    },
    "wide keys": obj(**{"城市": {"enum": ["北京", "巴黎"]}, "🤖": {"const": "é"}}),
    "array of objects": {"type": "array", "items": obj(k={"type": "boolean"}), "minItems": 1, "maxItems": 2},
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("seed", [None, 1])
def test_answers_obey_the_schema(name, seed):
    schema = SCHEMAS[name]
    sampling = {} if seed is None else {"temperature": 1, "seed": seed}
    answer = server().chat("fill it in", **shaped(schema, **sampling))
    text = content_of(answer)
    if answer["choices"][0]["finish_reason"] == "stop":
        value = json.loads(text)
        jsonschema.validate(value, schema)
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
        assert len(re.findall(r"\s", outside)) <= len(re.findall(r"[,:]", outside)), "white space sprawls"
    else:
        assert name in ("recursion", "number"), text
    assert not re.search(r"\s{3,}", re.sub(r'"(?:[^"\\]|\\.)*"', "", text))


def test_properties_come_in_the_schema_s_order():
    schema = obj(zebra={"const": 1}, apple={"const": 2}, mango={"const": 3})
    assert list(json.loads(content_of(server().chat(**shaped(schema))))) == ["zebra", "apple", "mango"]


def test_schema_is_obeyed_with_strict_false_and_no_name_rule():
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": False, "schema": SCHEMAS["enum"]}}
    assert (
        json.loads(content_of(server().chat(response_format=form, max_tokens=50))) in SCHEMAS["enum"]["enum"]
    )


def test_json_object():
    answer = server().chat(response_format={"type": "json_object"}, max_tokens=60)
    text = content_of(answer)
    assert text.lstrip().startswith("{")
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


def test_json_object_can_end():
    close = {str(encode("}")[0]): 100}
    answer = server().chat(response_format={"type": "json_object"}, max_tokens=200, logit_bias=close)
    assert json.loads(content_of(answer)) == {} and answer["choices"][0]["finish_reason"] == "stop"


def test_text_format_changes_nothing():
    assert content_of(server().chat(response_format={"type": "text"})) == content_of(server().chat())


def test_cut_by_length_is_a_prefix():
    schema = {"const": {"a": "x" * 50, "b": [1, 2, 3]}}
    whole = content_of(server().chat(**shaped(schema)))
    part = server().chat(**shaped(schema, max_tokens=5))
    assert part["choices"][0]["finish_reason"] == "length" and part["usage"]["completion_tokens"] == 5
    assert content_of(part) and whole.startswith(content_of(part))


@pytest.mark.parametrize(
    "text", [*WIDE, WIDE, "a" + WIDE + "b", "👩‍👩‍👧‍👦", "e\u0301", "\U0010ffff", "ﷺ", "日本語テキスト"]
)
def test_forced_wide_text(text):
    """A one-value enum, a choice and a regex give exactly the text, whole and streamed."""
    schema = shaped({"enum": [text]})
    assert json.loads(content_of(server().chat(**schema))) == text
    stream = server().stream_chat(**schema)
    assert json.loads(stream.message()["content"]) == text
    assert content_of(server().chat(**forced(text))) == text
    assert server().stream_chat(**forced(text)).message()["content"] == text
    assert "\ufffd" not in stream.raw.decode()


def test_forced_text_finishes_with_stop():
    answer = server().chat(**forced("blue"))
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "pattern", ["[0-9]{3}-[0-9]{4}", "(yes|no)", "a+b", "[^\\n]{1,5}x", "[一-龥]{2}", "\\d\\d:\\d\\d"]
)
def test_regex(pattern):
    fields = {"structured_outputs": {"regex": pattern}, "max_tokens": 60, "temperature": 1, "seed": 2}
    answer = server().chat(**fields)
    if answer["choices"][0]["finish_reason"] == "stop":
        assert re.fullmatch(pattern, content_of(answer))
    assert server().stream_chat(**fields).message()["content"] == content_of(answer)


def test_choice():
    fields = {"structured_outputs": {"choice": ["red", "green", "light blue"]}, "max_tokens": 30}
    texts = {content_of(server().chat(temperature=2, seed=seed, **fields)) for seed in range(12)}
    assert texts <= {"red", "green", "light blue"} and len(texts) > 1


def test_choice_with_a_prefix_of_another():
    fields = {"structured_outputs": {"choice": ["ab", "abc"]}, "max_tokens": 30, "temperature": 1}
    assert {content_of(server().chat(seed=seed, **fields)) for seed in range(8)} <= {"ab", "abc"}


def test_structured_json():
    answer = server().chat(structured_outputs={"json": SCHEMAS["object"]}, max_tokens=200)
    jsonschema.validate(json.loads(content_of(answer)), SCHEMAS["object"])


def test_grammar():
    grammar = 'start: "sum" sign DIGIT\nsign: "+" | "-"\nDIGIT: /[0-9]/\n'
    text = content_of(server().chat(structured_outputs={"grammar": grammar}, max_tokens=30))
    assert re.fullmatch(r"sum[+-][0-9]", text)


def test_completions_take_structured_outputs():
    assert texts_of(server().complete("say", **forced("blue"))) == ["blue"]


def test_every_choice_obeys():
    answer = server().chat(n=4, temperature=2, seed=1, **shaped(SCHEMAS["enum"]))
    assert {json.loads(text) for text in texts_of(answer)} <= set(SCHEMAS["enum"]["enum"])


def test_bias_cannot_break_the_grammar():
    bias = {str(encode("the")[0]): 100, str(added_tokens()["<|im_end|>"]): 100}
    assert content_of(server().chat(logit_bias=bias, **forced("blue"))) == "blue"


def test_penalties_cannot_break_the_grammar():
    fields = forced("aaaaaaaaaaaaaaaa", presence_penalty=2, frequency_penalty=2, repetition_penalty=2)
    assert content_of(server().chat(**fields)) == "aaaaaaaaaaaaaaaa"


def test_a_dead_end_is_an_error_and_not_a_hang():
    """min_tokens forbids the end that the grammar demands."""
    response = server().post(CHAT, chat_body(**forced("blue", min_tokens=50)))
    if response.status_code == 200:
        assert content_of(response.json()).startswith("blue") or not content_of(response.json())
    else:
        refused(response, response.status_code)
    assert content_of(server().chat())


def test_with_thinking_the_grammar_waits():
    think = {"chat_template_kwargs": {"enable_thinking": True}}
    free = whole_message(server().chat(**think, **shaped(SCHEMAS["enum"], max_tokens=10)))
    assert free["content"] == "" and free["reasoning"] and free["finish"] == "length"
    close = {"logit_bias": {str(added_tokens()["</think>"]): 100}}
    closed = whole_message(server().chat(**think, **close, **shaped(SCHEMAS["enum"])))
    assert json.loads(closed["content"]) in SCHEMAS["enum"]["enum"] and closed["finish"] == "stop"


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": None},
        {"type": "json_schema", "json_schema": "x"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": "string"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": []}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "("}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/$defs/none"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "x" * 70_000}}},
        {"type": "yaml"},
        "json_object",
        [],
    ],
    ids=lambda form: str(form)[:90],
)
def test_bad_formats(form):
    error = refused(server().post(CHAT, chat_body(response_format=form)))
    assert error["param"].startswith("response_format")


def test_deep_schema_is_refused():
    schema = {"type": "boolean"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    refused(server().post(CHAT, chat_body(**shaped(schema))))


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"regex": "("},
        {"regex": 5},
        {"regex": "[z-a]"},
        {"choice": []},
        {"choice": "blue"},
        {"choice": [5]},
        {"grammar": "start: nothing_here"},
        {"grammar": "((("},
        {"grammar": 5},
        {"json": 5},
        {"json": {"type": "wizard"}},
        {"regex": "a", "choice": ["a"]},
        {"json": {"type": "null"}, "grammar": 'start: "a"'},
    ],
    ids=str,
)
def test_bad_structured_outputs(wanted):
    error = refused(server().post(CHAT, chat_body(structured_outputs=wanted)))
    assert error["param"].startswith("structured_outputs")


@pytest.mark.parametrize(
    "keyword", [{"not": {"const": 1}}, {"uniqueItems": True}, {"x-unknown": 5}, {"$comment": "x"}]
)
def test_unusual_keywords_work_or_are_refused(keyword):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, **keyword}
    response = server().post(CHAT, chat_body(**shaped(schema)))
    if response.status_code == 200:
        json.loads(content_of(response.json()))
    else:
        refused(response)


@pytest.mark.parametrize("kind", ["enum", "pattern", "depth"])
def test_heavy_grammars_do_not_hold_the_server(kind):
    schema = {
        "enum": {"enum": [f"value {i}" for i in range(3000)]},
        "pattern": {"type": "string", "pattern": "^(a{1,400}b{1,400}){1,400}$"},
        "depth": {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
    }[kind]
    server()
    started = time.monotonic()
    response = server().post(CHAT, chat_body(**shaped(schema, max_tokens=20)))
    assert response.status_code in (200, 400, 500) and time.monotonic() - started < 10
    assert content_of(server().chat())
