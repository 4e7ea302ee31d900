from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

pytest.importorskip("llguidance")

from grammar_support import (
    PADDING,
    PERSON,
    Schemas,
    Writer,
    allowed,
    available,
    feed,
    outside_strings,
    tokenizer,
)

from kllm.engine.grammar import GrammarCompiler
from kllm.errors import UserError
from kllm.tokenizer.tokenizer import Tokenizer

NAMES = available()
HARD = "囍🤖龘𠮷é한"


@pytest.fixture(scope="module", params=NAMES)
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer(request.param)


@pytest.fixture(scope="module")
def compiler(tok: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tok, tok.vocab_size + PADDING)


@pytest.fixture(scope="module")
def small() -> GrammarCompiler:
    tok = tokenizer("trained")
    return GrammarCompiler(tok, tok.vocab_size + PADDING)


def check(value: Any, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(value)


# ---- JSON


def test_random_schemas_are_obeyed_without_white_space(tok: Tokenizer, compiler: GrammarCompiler) -> None:
    schemas, writer, ended = Schemas(11), Writer(tok), 0
    count = 200 if tok is tokenizer("trained") else 80
    for _ in range(count):
        schema = schemas.document()
        answer = writer.write(compiler.json_schema(schema))
        assert not re.search(r"\s", outside_strings(answer.text)), answer.text
        if answer.ended:
            ended += 1
            check(json.loads(answer.text), schema)
    assert ended > 0.8 * count


def test_forced_text_comes_out_whole(tok: Tokenizer, compiler: GrammarCompiler) -> None:
    answer = Writer(tok).write(compiler.json_schema({"enum": [HARD]}))
    assert answer.ended and answer.text == f'"{HARD}"'


def test_forced_text_that_looks_like_control_tokens(tok: Tokenizer, compiler: GrammarCompiler) -> None:
    control = set(compiler.vocabulary.control.values())
    for marker in compiler.vocabulary.control:
        answer = Writer(tok).write(compiler.json_schema({"const": f"a{marker}b"}))
        assert answer.ended and json.loads(answer.text) == f"a{marker}b"
        assert not control & set(answer.ids)


def test_no_control_token_or_padding_inside_a_free_string(tok: Tokenizer, compiler: GrammarCompiler) -> None:
    control = compiler.vocabulary.control.values()
    padding = range(tok.vocab_size, tok.vocab_size + PADDING)
    writer = Writer(tok, favour=dict.fromkeys([*control, *padding], 1e9))
    for _ in range(5):
        answer = writer.write(compiler.json_schema({"type": "string"}), limit=60)
        assert not set(answer.ids) & {*control, *padding}


def test_the_end_only_where_the_text_may_end(small: GrammarCompiler) -> None:
    stops = set(small.vocabulary.stops)
    assert len(stops) > 1
    matcher = small.regex("ab*").matcher()
    assert not allowed(matcher) & stops
    feed(matcher, "a")
    assert allowed(matcher) >= stops
    assert not matcher.stopped
    feed(matcher, "b")
    assert allowed(matcher) >= stops
    done = small.regex("ab").matcher()
    feed(done, "ab")
    assert done.stopped and allowed(done) == stops


def test_any_json_object(small: GrammarCompiler) -> None:
    matcher = small.json_object().matcher()
    feed(matcher, '{"a":[1,{"b":null}],"c":{"d":{"e":"é"}}}')
    assert matcher.stopped
    assert not {t for t in allowed(small.json_object().matcher()) if small.vocabulary.tokens[t][:1] != b"{"}


def test_boolean_schemas_and_recursion(small: GrammarCompiler) -> None:
    matcher = small.json_schema(True).matcher()
    feed(matcher, "[1]")
    assert matcher.stopped
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}}
    matcher = small.json_schema(tree).matcher()
    feed(matcher, '{"kids":[{"kids":[{}]},{}]}')
    assert matcher.stopped


def test_listed_properties_are_all_there_is_unless_said_otherwise(small: GrammarCompiler) -> None:
    matcher = small.json_schema(PERSON).matcher()
    feed(matcher, '{"name":"x","age":15')
    assert b"," not in {small.vocabulary.tokens[i] for i in allowed(matcher)}
    more = small.json_schema({**PERSON, "additionalProperties": True}).matcher()
    feed(more, '{"name":"x","age":15,"more":1}')
    assert more.stopped
    joined = {"allOf": [PERSON, {"properties": {"more": {"const": 1}}, "required": ["more"]}]}
    both = small.json_schema(joined).matcher()
    feed(both, '{"name":"x","age":15,"more":1}')
    assert both.stopped


def test_a_property_called_like_a_keyword_survives(small: GrammarCompiler) -> None:
    names = ["title", "format", "description", "default", "x-guidance"]
    schema = {"type": "object", "properties": {n: {"const": 1} for n in names}, "required": names}
    answer = Writer(tokenizer("trained")).write(small.json_schema(schema))
    assert json.loads(answer.text) == dict.fromkeys(names, 1)


def test_white_space_cannot_be_asked_for(small: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"const": 1}, "x-guidance": {"whitespace_flexible": True}}
    matcher = small.json_schema(schema).matcher()
    assert not any(small.vocabulary.tokens[i].strip() == b"" for i in allowed(matcher))


# ---- regex, choice, grammar


@pytest.mark.parametrize(
    "pattern",
    [r"\d{3}-\w{2}", r"^(yes|no)$", r"[\d.]+/[^\s]{1,3}", r"\p{Han}{2,4}", r'"[]a^-]+"', r"(?i)abc"],
)
def test_regex(tok: Tokenizer, compiler: GrammarCompiler, pattern: str) -> None:
    python = pattern.replace(r"\p{Han}", "[\u2e80-\U0003ffff]")
    for seed in range(3):
        answer = Writer(tok, seed).write(compiler.regex(pattern))
        if answer.ended:
            assert re.fullmatch(python, answer.text)
    assert r"\d" in pattern or answer.ended


def test_choice_takes_any_characters(tok: Tokenizer, compiler: GrammarCompiler) -> None:
    options = ['say "hi"\n\t\\', "你好 🤖", "<|im_end|>", "a/b|c(d)[e]{2}*+?.^$", "ab", "abc", "\x00\x7f"]
    written = {Writer(tok, seed).write(compiler.choice(options)).text for seed in range(40)}
    assert written <= set(options) and len(written) > 3


def test_choice_of_a_longer_text_with_the_same_beginning(small: GrammarCompiler) -> None:
    matcher = small.choice(["ab", "abc"]).matcher()
    feed(matcher, "ab")
    assert not matcher.stopped
    assert allowed(matcher) >= set(small.vocabulary.stops)
    feed(matcher, "c")
    assert matcher.stopped


def test_lark_gbnf_and_control_tokens_by_name(small: GrammarCompiler) -> None:
    matcher = small.lark('start: <think> "x" </think>').matcher()
    control = small.vocabulary.control
    assert allowed(matcher) == {control["<think>"]}
    matcher = small.lark('root ::= "yes" | "no" [0-9]').matcher()
    feed(matcher, "no4")
    assert matcher.stopped


# ---- tools

TOOLS: list[dict[str, Any]] = [
    {"name": "get_weather", "parameters": {**PERSON, "$defs": {"unused": {}}}},
    {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
    {"name": "list.all-1"},
]


def calls(text: str) -> list[dict[str, Any]]:
    parts = text.split("\n</tool_call>")
    assert parts.pop() == ""
    return [json.loads(part.removeprefix("\n").removeprefix("<tool_call>\n")) for part in parts]


def test_tool_calls(tok: Tokenizer, compiler: GrammarCompiler) -> None:
    names, most = set(), 0
    favour = {compiler.vocabulary.text_ids[b"\n"]: np.log(tok.vocab_size / 4)}
    for seed in range(12):
        answer = Writer(tok, seed, favour).write(compiler.tools(TOOLS, repeat=bool(seed % 2)))
        if not answer.ended:
            continue
        found = calls(answer.text)
        assert len(found) == 1 or seed % 2
        most = max(most, len(found))
        for call in found:
            assert list(call) == ["name", "arguments"]
            check(call["arguments"], PERSON if call["name"] == "get_weather" else {"maxProperties": 0})
            names.add(call["name"])
        mark = compiler.vocabulary.control.get("<tool_call>")
        assert mark is None or answer.ids.count(mark) == len(found)
    assert len(names) > 1 and most > 1


def test_tool_calls_are_spaced_as_templates_write_them(small: GrammarCompiler) -> None:
    matcher = small.tools(TOOLS, repeat=False).matcher()
    control = small.vocabulary.control
    matcher.accept(control["<tool_call>"])
    feed(matcher, '\n{"name": "get_weather", "arguments": {"name": "x", "age": 1}}\n')
    matcher.accept(control["</tool_call>"])
    assert matcher.stopped


def test_markers_that_are_no_tokens_are_written_as_text(small: GrammarCompiler) -> None:
    matcher = small.tools(TOOLS, opener="[CALL]", closer="[/CALL]", repeat=True).matcher()
    feed(matcher, '[CALL]\n{"name": "get_time", "arguments": {}}\n[/CALL]')
    assert not matcher.stopped
    feed(matcher, '\n[CALL]\n{"name": "list.all-1", "arguments": {}}\n[/CALL]')
    assert allowed(matcher) >= set(small.vocabulary.stops)


def test_a_bad_tool_is_named(small: GrammarCompiler) -> None:
    bad = {"name": "bad", "parameters": {"type": "object", "properties": {"x": {"not": {}}}}}
    with pytest.raises(UserError, match="not") as caught:
        small.tools([TOOLS[0], bad], repeat=False)
    assert caught.value.where == "tools[1].function.parameters"


# ---- after a closer


def test_starts_after_a_closing_token(small: GrammarCompiler) -> None:
    vocabulary, control = small.vocabulary, small.vocabulary.control
    matcher = small.json_schema({"const": 5}, after="</think>").matcher()
    assert not matcher.active
    feed(matcher, "cat {")
    everything = allowed(matcher)
    assert not everything & set(vocabulary.stops)
    assert len(everything) > vocabulary.size - 10
    matcher.accept(control["</think>"])
    assert matcher.active
    newline = vocabulary.text_ids[b"\n"]
    for _ in range(2):
        assert newline in allowed(matcher)
        matcher.accept(newline)
    assert allowed(matcher) == {vocabulary.text_ids[b"5"]}
    feed(matcher, "5")
    assert matcher.stopped


def test_the_text_of_a_closing_token_is_never_spelled_out(small: GrammarCompiler) -> None:
    tok = tokenizer("trained")
    matcher = small.json_schema({"const": 5}, after="</think>").matcher()
    for char in "</think":
        matcher.accept(small.vocabulary.text_ids[char.encode()])
    assert not matcher.active
    assert not any(tok.bytes_of(i).startswith(b">") for i in allowed(matcher))
    matcher.accept(small.vocabulary.text_ids[b"x"])
    assert small.vocabulary.text_ids[b">"] in allowed(matcher)


def test_starts_after_a_text_of_several_tokens(tok: Tokenizer, compiler: GrammarCompiler) -> None:
    vocabulary = compiler.vocabulary
    constraint = compiler.choice(["yes"], after="[/end]")
    matcher = constraint.matcher()
    for byte in b"[/[/end":
        matcher.accept(vocabulary.text_ids[bytes([byte])])
        assert not matcher.active
    for i in allowed(matcher):  # nothing may share a token with the end of the closer but line breaks
        piece = tok.bytes_of(i) if i not in vocabulary.control.values() else b""
        assert not piece.startswith(b"]") or piece.strip(b"\n") == b"]"
    matcher.accept(vocabulary.text_ids[b"]"])
    assert matcher.active
    feed(matcher, "yes")
    assert matcher.stopped
