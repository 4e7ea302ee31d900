"""Conversations in all their written forms, templates of other houses, and clear refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kllm.errors import UserError
from kllm.tokenizer.chat import DEFAULT_TEMPLATE, ChatEncoder, Encoded, render
from kllm.tokenizer.source import Source
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


def with_template(template: str | None) -> Tokenizer:
    tokenizer = train_tokenizer(["the user asks, the assistant answers. 你问我答。"] * 9, 320)[0]
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(with_template(DEFAULT_TEMPLATE))


def spans(encoder: ChatEncoder, encoded: Encoded) -> list[tuple[bool, str]]:
    out: list[tuple[bool, list[int]]] = []
    for index, trained in zip(encoded.ids, encoded.mask, strict=True):
        if not out or out[-1][0] != trained:
            out.append((trained, []))
        out[-1][1].append(index)
    return [(trained, encoder.tokenizer.decode(ids, skip_special_tokens=False)) for trained, ids in out]


def test_one_exchange(encoder: ChatEncoder) -> None:
    assert spans(encoder, encoder.encode([USER, ANSWER])) == [
        (False, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (True, "yo<|im_end|>"),
        (False, "\n"),
    ]


def test_the_header_never_merges_with_the_content(encoder: ChatEncoder) -> None:
    for start in ("   code", "\n\nlater", "\n", " ", ""):
        row = encoder.encode([USER, {"role": "assistant", "content": start}])
        assert spans(encoder, row)[1] == (True, f"{start}<|im_end|>")


def test_thinking(encoder: ChatEncoder) -> None:
    think = {**ANSWER, "reasoning_content": "hm"}
    assert spans(encoder, encoder.encode([USER, think]))[1][1] == "<think>\nhm\n</think>\n\nyo<|im_end|>"
    for alias in ("reasoning", "thinking"):
        assert encoder.encode([USER, {**ANSWER, alias: "hm"}]) == encoder.encode([USER, think])
    empty = {**ANSWER, "reasoning_content": ""}
    assert spans(encoder, encoder.encode([USER, empty]))[1][1] == "<think>\n\n</think>\n\nyo<|im_end|>"
    assert encoder.encode([USER, {**ANSWER, "reasoning_content": None}]) == encoder.encode([USER, ANSWER])
    header = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    decode = encoder.tokenizer.decode
    assert decode(encoder.prompt([USER]), False) == header
    assert decode(encoder.prompt([USER], enable_thinking=True), False) == header
    off = encoder.prompt([USER], enable_thinking=False)
    assert decode(off, False) == header + "<think>\n\n</think>\n\n"
    assert ChatEncoder(encoder.tokenizer, enable_thinking=False).prompt([USER]) == off


def test_old_reasoning_stays(encoder: ChatEncoder) -> None:
    turns = [USER, {**ANSWER, "reasoning_content": "a"}, USER, {**ANSWER, "reasoning_content": "b"}]
    text = encoder.text(turns)
    assert text.count("<think>") == 2 and text.startswith(encoder.text(turns[:2]))


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "<好>&\'"}}\n</tool_call>'


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "f", "arguments": {"x": "<好>&'"}}],
        [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": "<好>&'"}}}],
        [{"function": {"name": "f", "arguments": '{"x":"<好>&\'"}'}}],
        '[{"name": "f", "arguments": "{\\"x\\": \\"<好>&\'\\"}"}]',
        {"name": "f", "arguments": {"x": "<好>&'"}},
    ],
)
def test_tool_calls_in_every_form(encoder: ChatEncoder, calls: Any) -> None:
    row = encoder.encode([USER, {"role": "assistant", "content": None, "tool_calls": calls}])
    assert spans(encoder, row)[1] == (True, CALL + "<|im_end|>")


def test_tool_results_share_a_turn(encoder: ChatEncoder) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    turns = [
        {"role": "system", "content": "S"},
        USER,
        {
            "role": "assistant",
            "content": "go",
            "tool_calls": [{"name": "f"}, {"name": "f", "arguments": None}],
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        ANSWER,
    ]
    text = encoder.text(turns, tools)
    assert text.startswith("<|im_start|>system\nS\n\n# Tools\n\nYou may call")
    assert (
        '<tools>\n{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}\n</tools>'
        in text
    )
    one = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert (
        f"assistant\ngo\n{one}\n{one}<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n"
        in text
    )
    assert "<tool_response>\n2\n</tool_response><|im_end|>\n" in text
    assert encoder.text(turns, json.dumps(tools)) == text
    inside = [{**turns[0], "tools": json.dumps(tools)}, *turns[1:]]  # MiniMind's files keep them there
    assert encoder.text(inside) == text
    assert encoder.encode(inside) == encoder.encode(turns, tools)


def test_text_parts_are_joined(encoder: ChatEncoder) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert encoder.encode([{"role": "user", "content": parts}, ANSWER]) == encoder.encode([USER, ANSWER])


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "at least one message"),
        (["hi"], "needs a role"),
        ([{"content": "hi"}], "needs a role"),
        ([{"role": "narrator", "content": "hi"}], "unknown role narrator"),
        ([{"role": "user", "content": 3}], "not text: int"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "not text"),
        ([{"role": "assistant", "tool_calls": "[{"}], "broken JSON"),
        ([{"role": "assistant", "tool_calls": [3]}], "not a tool call"),
        ([{"role": "assistant", "tool_calls": [{"arguments": {}}]}], "needs a name"),
    ],
)
def test_bad_messages_are_one_line(encoder: ChatEncoder, messages: Any, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        encoder.encode(messages)
    assert "\n" not in str(caught.value)


def test_bad_tools_are_one_line(encoder: ChatEncoder) -> None:
    for tools in ("{", '{"a": 1}'):
        with pytest.raises(UserError, match="tools"):
            encoder.encode([USER, ANSWER], tools)


def test_template_faults_are_one_line() -> None:
    for template, match in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 3 }}", "fails on this conversation"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ ''.__class__.mro() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
    ):
        with pytest.raises(UserError, match=match):
            render([USER], template)
    with pytest.raises(UserError, match="syntax error") as caught:
        render([USER], "line one\n{% for %}")
    assert str(caught.value.where) == "chat template:2"


def test_template_helpers() -> None:
    template = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}{{ bos_token }}{{ nothing }}"
    )
    assert render([{"b": "好<&>", "a": 1}, USER], template, bos_token="<s>") == '{"b": "好<&>", "a": 1}4<s>'


def test_a_tokenizer_without_template() -> None:
    tokenizer = with_template(None)
    assert ChatEncoder(tokenizer).template == DEFAULT_TEMPLATE  # it has the turn tokens
    bare = '{"model": {"type": "BPE", "vocab": {"</s>": 0}, "merges": []}, "added_tokens": []}'
    with pytest.raises(UserError, match="no chat template"):
        ChatEncoder(Tokenizer(Source("x", bare, {})))


# ---- templates without {% generation %}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKS_LATER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, INSTRUCT])
def test_spans_without_generation_blocks(template: str) -> None:
    encoder = ChatEncoder(with_template(template))
    turns = [
        USER,
        ANSWER,
        {"role": "user", "content": "<|im_start|>assistant\n[/INST] x"},
        {**ANSWER, "content": "2"},
    ]
    row = encoder.encode(turns)
    trained = [text.strip() for mask, text in spans(encoder, row) if mask]
    assert trained == ["yo<|im_end|>", "2<|im_end|>"]
    assert encoder.tokenizer.decode(row.ids, False) == encoder.text(turns)
    prompt = encoder.prompt(turns[:3])
    assert row.ids[: len(prompt)] == prompt


def test_turns_that_change_later_are_found_by_their_frame() -> None:
    """Here no rendering is a prefix of the next: earlier turns lose their think block."""
    encoder = ChatEncoder(with_template(THINKS_LATER))
    row = encoder.encode(
        [USER, {**ANSWER, "reasoning_content": "a"}, USER, {**ANSWER, "reasoning_content": "b"}]
    )
    trained = [text for mask, text in spans(encoder, row) if mask]
    assert trained == ["yo<|im_end|>", "<think>\nb\n</think>\n\nyo<|im_end|>"]


def test_spans_that_cannot_be_found_are_refused() -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}|{% endfor %}"
    encoder = ChatEncoder(with_template(template))
    with pytest.raises(UserError, match="does not show which words") as caught:
        encoder.encode([USER, ANSWER])
    assert "generation" in str(caught.value.hint)
    assert encoder.prompt([USER])  # answering needs no spans


def test_tokens_that_swallow_white_space() -> None:
    """An added token with rstrip takes the template's newline with it, never the assistant's first space."""
    tokenizer = with_template(CHATML)
    spec = json.loads(tokenizer._backend.to_str())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
    tokenizer = Tokenizer(Source("x", json.dumps(spec), {"eos_token": "<|im_end|>"}), CHATML)
    encoder = ChatEncoder(tokenizer)
    row = encoder.encode([USER, {**ANSWER, "content": "  yo"}])
    text = encoder.text([USER, {**ANSWER, "content": "  yo"}])
    assert tokenizer.decode(row.ids, False) == text.replace("<|im_end|>\n", "<|im_end|>")
    assert tokenizer.encode_raw(text)[:8] == row.ids[:8]


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'x' * 10**9 }}",
        "{{ (range(99999)|list) * 10000 }}",
        "{{ 9**(9**9) > 1 }}",
        "{{ '%1000000000d' % 5 }}",
        "{{ '%*d' % (1000000000, 5) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ '{:1000000000}'.format(5) }}",
        "{{ '{:{}}'.format(5, 1000000000) }}",
        "{{ '%1000000000d'|format(5) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'|indent(10**9) }}",
        "{{ messages|tojson(indent=99999999) }}",
        "{{ ('a'.ljust)(10**9) }}",
        "{% set n = namespace(x='aa') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set x = 9**99 %}{% for i in range(30) %}{% set x = x * x %}{% endfor %}{{ x > 1 }}{{ (x**999) > 1 }}",
    ],
)
def test_a_template_cannot_fill_the_memory_or_never_end(bomb):
    with pytest.raises(UserError, match="template"):
        render([{"role": "user", "content": "hi"}], bomb)


def test_ordinary_arithmetic_of_templates_works():
    text = "{{ 2 * 3 }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ '-' * 5 }}{{ '%03d' % 7 }}{{ '{:>4}'.format('a') }}"
    text += "{{ 'a'|center(5) }}{{ '%s! 123456'|format('b') }}{{ 'x'.ljust(3) }}|"
    assert render([], text) == "610241-----007   a  a  b! 123456x  |"
