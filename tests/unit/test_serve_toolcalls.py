"""Tool calls read from text: several, broken ones, pieces as they come, any cuts, nothing lost."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_scripted import CALL

from kllm.tokenizer.parts import Lexer, Part, merged
from kllm.tokenizer.toolcalls import END_TOOL_CALL, TOOL_CALL, ToolCallParser, new_call_id, read_call

F = ("f", '{"x": 1}')


def parse(text: str, cuts: tuple[int, ...] = (), **options: Any) -> list[Part]:
    """The parts of `text`, neighbours joined; ids are call_0, call_1, ..."""
    numbers = iter(range(100))
    parser = ToolCallParser(new_id=lambda: f"call_{next(numbers)}", **options)
    lexer = Lexer({TOOL_CALL: None, END_TOOL_CALL: None})
    bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    parts: list[Part] = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        for item in lexer.feed(text[start:end]):
            parts += parser.feed(item)
    for item in lexer.finish():
        parts += parser.feed(item)
    return merged([*parts, *parser.finish()])


def plain(parts: list[Part]) -> list[Any]:
    """(name, arguments) of calls, the text of content."""
    out: list[Any] = []
    for part in parts:
        if part.kind == "content":
            out.append(part.text)
        elif part.kind == "call":
            out.append((part.name, ""))
        else:
            out[-1] = (out[-1][0], out[-1][1] + part.text)
    return out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CALL, [("f", '{"x": 1}')]),
        ("Let me look.\n" + CALL, ["Let me look.", ("f", '{"x": 1}')]),
        (CALL + "\n" + CALL + "\n", [("f", '{"x": 1}'), ("f", '{"x": 1}')]),
        (CALL + "\nDone. ", [("f", '{"x": 1}'), "Done. "]),
        (CALL.removesuffix("</tool_call>"), [("f", '{"x": 1}')]),
        ('<tool_call>{"name":"f","arguments":"{\\"x\\":\\"猫\\"}"}</tool_call>', [("f", '{"x": "猫"}')]),
        ("a " + CALL + " b\n" + CALL + CALL + "c " + CALL, ["a", F, "\n\nb", F, F, "\n\nc", F]),
        ("a" + CALL + "<tool_call>no</tool_call>b", ["a", F, "\n\n<tool_call>no</tool_call>b"]),
        ("a" + CALL + " \n", ["a", F]),
        ('<tool_call>{"name":"f"}</tool_call>', [("f", "{}")]),
        ('<tool_call>{"name":"f","parameters":{"y":[]}}</tool_call>', [("f", '{"y": []}')]),
        ("no call  ", ["no call  "]),
        ("a < b <tool", ["a < b <tool"]),
    ],
)
def test_what_is_a_call(text: str, expected: list[Any]) -> None:
    assert plain(parse(text)) == expected


@pytest.mark.parametrize(
    "inner",
    ["", "not JSON", '{"name": "f", "arguments": {"x": }}', '{"arguments": {}}', "[1]", '{"name": 3, "arguments": {}}',
     '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}', "[" * 5000, '{"name": "f", "arguments": {"x": NaN}}'],
)  # fmt: skip
@pytest.mark.parametrize("around", ["{}", " a \n<tool_call>{}</tool_call> b ", "<tool_call>{}"])
def test_what_is_none_is_given_back_as_text(inner: str, around: str) -> None:
    text = around.replace("{}", inner)
    assert plain(parse(text)) == ([text] if text else [])


def test_a_broken_call_beside_a_good_one() -> None:
    broken = "<tool_call>oops</tool_call>"
    assert plain(parse(CALL + broken)) == [("f", '{"x": 1}'), broken]
    assert plain(parse(broken + "\n" + CALL)) == [broken, ("f", '{"x": 1}')]


def test_without_parallel_calls_the_first_one_counts() -> None:
    assert plain(parse(CALL + " text " + CALL, single=True)) == [("f", '{"x": 1}')]
    assert plain(parse(CALL + CALL, single=True, guaranteed=True)) == [("f", '{"x": 1}')]


def test_guaranteed_arguments_go_out_as_they_come() -> None:
    arguments = '{"a": "x}\\"{", "b": [{"c": "\\\\"}], "d": {}}'
    text = f'<tool_call>\n{{"name": "f.g", "arguments": {arguments}}}\n</tool_call>'
    parser = ToolCallParser(guaranteed=True)
    lexer = Lexer({TOOL_CALL: None, END_TOOL_CALL: None})
    parts = [p for char in text for item in lexer.feed(char) for p in parser.feed(item)]
    assert parts[0].kind == "call" and parts[0].name == "f.g"
    assert [p.text for p in parts[1:]] == list(arguments)
    assert parser.finish() == []


def test_a_guaranteed_call_cut_by_length() -> None:
    head = '<tool_call>\n{"name": "f", "arguments": {"x": "ab'
    assert plain(parse(head, guaranteed=True)) == [("f", '{"x": "ab')]
    assert plain(parse(head[:20], guaranteed=True)) == [head[:20]]


def test_ids() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100 and all(re.fullmatch("call_[A-Za-z0-9]{24}", one) for one in ids)
    assert read_call('{"name": "", "arguments": {}}') is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=6
)  # fmt: skip
ARGUMENTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)


@st.composite
def calls(draw: Any) -> str:
    call = {"name": draw(st.sampled_from(["f", "g-h"])), "arguments": draw(ARGUMENTS)}
    return (
        TOOL_CALL
        + draw(st.sampled_from(["", "\n"]))
        + json.dumps(call, ensure_ascii=draw(st.booleans()))
        + END_TOOL_CALL
    )


FRAGMENTS = calls() | st.sampled_from([TOOL_CALL, END_TOOL_CALL, "<tool", "_call>", "</", "\n", " ", "text", '{"name": "f", "arguments": {', "}", '"', "\\"])  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(FRAGMENTS, max_size=6).map("".join),
    st.lists(st.integers(0, 200), max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_cuts_do_not_matter_and_no_text_is_lost(
    text: str, cuts: list[int], guaranteed: bool, single: bool
) -> None:
    whole = parse(text, guaranteed=guaranteed, single=single)
    assert parse(text, tuple(cuts), guaranteed=guaranteed, single=single) == whole
    if not any(part.kind == "call" for part in whole):
        assert "".join(part.text for part in whole) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ARGUMENTS, st.booleans(), st.lists(st.integers(0, 200), max_size=8))
def test_arguments_come_back_as_they_were(
    arguments: dict[str, Any], guaranteed: bool, cuts: list[int]
) -> None:
    text = TOOL_CALL + json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=False) + END_TOOL_CALL
    if "tool_call>" in json.dumps(arguments):
        return
    ((name, written),) = plain(parse(text, tuple(cuts), guaranteed=guaranteed))
    assert name == "f" and json.loads(written) == arguments
