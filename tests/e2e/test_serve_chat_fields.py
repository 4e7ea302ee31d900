"""Chat completions: every field's valid and invalid values, and the length of prompt and answer."""

from __future__ import annotations

import re
import time

import pytest
from serve_client import CHAT, chat_body, content_of, messages_of, post, refused, server
from serve_model import CONTEXT, decode, encode, tokenizer

# ------------------------------------------------------------------------------------- numbers and ranges

VALID = {
    "max_tokens": [1, 8],
    "max_completion_tokens": [1, 9],
    "temperature": [0, 0.0, 1, 2, 2.0, 1e-9],
    "top_p": [0, 1, 0.5, 1e-9],
    "top_k": [-1, 0, 1, 50, 100000],
    "min_p": [0, 1, 0.5],
    "repetition_penalty": [1, 0.5, 1.7],
    "repeat_penalty": [1, 1.3],
    "presence_penalty": [-2, 2, 0.1],
    "frequency_penalty": [-2, 2, 0.1],
    "logit_bias": [{}, {"100": 5}, {"100": -100}, {"101": 100.0}],
    "seed": [0, 1, -1, 2**63 - 1, -(2**63)],
    "n": [1, 2, 16],
    "stop": ["xyzzy", ["xyzzy"], [], ["a\n"] * 16],
    "stop_token_ids": [[], [5], [5, 6]],
    "ignore_eos": [True, False],
    "min_tokens": [0, 1, 8],
    "stream": [False],
    "logprobs": [True, False],
    "tools": [[]],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "chat_template_kwargs": [{}, {"x": 1, "y": "z", "b": True, "l": [1], "d": {"k": None}}],
    "reasoning_effort": ["none", "minimal", "low", "medium", "high", "extreme"],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "cache_salt": ["x"],
}
INVALID = {
    "max_tokens": [0, -1, 1.5, "many", [], {}, True],
    "max_completion_tokens": [0, -5, "8x", 0.5],
    "temperature": [-0.1, 2.01, -1, 1e300, "hot", [], {}],
    "top_p": [-0.1, 1.1, "x", []],
    "top_k": [-2, 1.5, "x", []],
    "min_p": [-0.1, 1.1, "x"],
    "repetition_penalty": [0, -1, "x"],
    "repeat_penalty": [0, -1],
    "presence_penalty": [-2.1, 2.1, "x"],
    "frequency_penalty": [-2.1, 2.1, []],
    "logit_bias": [
        {"x": 1},
        {"1.5": 1},
        {"-1": 1},
        {str(tokenizer().get_vocab_size()): 1},
        {"99999999999999999999": 1},
        {"5": 100.5},
        {"5": -101},
        {"5": "x"},
        [],
        [[5, 1]],
        "x",
        {str(i): 1 for i in range(1025)},
    ],
    "seed": [2**63, -(2**63) - 1, 1.5, "x", []],
    "n": [0, -1, 17, 10**9, 1.5, "x", []],
    "stop": ["", [""], ["a", ""], 5, [5], {}, ["a"] * 17, "x" * 257, ["x" * 257]],
    "stop_token_ids": [[-1], [tokenizer().get_vocab_size()], ["x"], 5, [1.5], [2**70]],
    "ignore_eos": ["maybe", 5, []],
    "min_tokens": [-1, "x", 1.5],
    "stream": ["maybe", 5, []],
    "stream_options": [{"include_usage": True}, {}],
    "logprobs": ["maybe", 5, []],
    "top_logprobs": [1, 21, -1, "x"],
    "tools": ["x", {}, [5], [{}]],
    "tool_choice": ["sometimes", 5, {"type": "wizard"}],
    "parallel_tool_calls": ["maybe", 5],
    "response_format": ["json", {}, {"type": "wizard"}, {"type": None}, 5],
    "structured_outputs": ["x", 5, []],
    "chat_template_kwargs": ["x", [], 5],
    "reasoning_effort": [5, []],
    "add_generation_prompt": ["maybe", 5],
    "continue_final_message": ["maybe", 5],
    "chat_template": ["{{ messages }}"],
    "model": [5, [], {}],
}


@pytest.mark.parametrize("field", VALID)
def test_field_valid(field):
    for value in VALID[field]:
        response = post(**{"max_tokens": 2, field: value})
        assert response.status_code == 200, (value, response.text)


@pytest.mark.parametrize("field", INVALID)
def test_field_invalid(field):
    for value in INVALID[field]:
        response = post(**{"max_tokens": 2, field: value})
        assert response.status_code == 400, (value, response.status_code, response.text[:300])
        error = refused(response)
        assert error["param"] and error["param"].startswith(field), (value, error)


@pytest.mark.parametrize("value", [-1, 21])
def test_top_logprobs_range(value):
    refused(post(logprobs=True, top_logprobs=value), param="top_logprobs")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "presence_penalty"])
def test_not_finite(field, value):
    body = b'{"messages": [{"role": "user", "content": "x"}], "%s": %s}' % (field.encode(), value.encode())
    refused(server().post(CHAT, body))


def test_every_optional_field_null():
    names = {*VALID, *INVALID, "user", "metadata", "store", "tool_choice", "structured_outputs", "suffix"}
    body = {"messages": [{"role": "user", "content": "hi"}], **dict.fromkeys(sorted(names))}
    body["max_tokens"] = 3
    assert content_of(server().answer(CHAT, body))


def test_nulls_inside():
    message = dict.fromkeys(
        ["name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal", "audio"]
    )
    body = chat_body(messages=[{**message, "role": "user", "content": "hi"}], stop=["x", None], stream=True)
    body["stream_options"] = {"include_usage": None}
    assert server().post(CHAT, body).status_code == 200


def test_known_useless_fields_are_ignored():
    fields = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "verbosity": "low",
        "modalities": ["text"],
        "prediction": {"type": "content", "content": "x"},
        "web_search_options": {},
    }
    assert content_of(server().chat(**fields)) == content_of(server().chat())


def test_known_useless_fields_are_ignored_whatever_they_hold():
    fields = {
        "user": 5,
        "metadata": "x",
        "store": "maybe",
        "service_tier": [],
        "prediction": 1,
        "verbosity": {},
    }
    assert content_of(server().chat(**fields)) == content_of(server().chat())


@pytest.mark.parametrize("value", [1, None, "x", [], {"deep": [1, {"er": None}]}], ids=str)
def test_unknown_fields_are_ignored(value):
    extra = {"chat_id": value, "params": value, "__proto__": value, "functions": None, "features": value}
    assert content_of(server().chat(**extra)) == content_of(server().chat())


# ------------------------------------------------------------------------------------------------ length


def test_max_completion_tokens_wins():
    assert server().chat(max_tokens=2, max_completion_tokens=5)["usage"]["completion_tokens"] == 5


def near_limit(room: int) -> str:
    """A message whose prompt leaves `room` tokens of the context."""
    used = len(server().prompt_ids(messages_of(("user", ""))))
    text = "".join(" " + str(i % 10) for i in range(CONTEXT - used - room + 50))
    ids = encode(text)
    while len(server().prompt_ids(messages_of(("user", text)))) > CONTEXT - room:
        ids = ids[:-1]
        text = decode(ids)
        over = len(server().prompt_ids(messages_of(("user", text)))) - (CONTEXT - room)
        text = decode(ids[: len(ids) - over])
    return text


@pytest.mark.parametrize("limit", [None, 100, 10**6, 2**32, 2**62])
def test_long_answers_are_clamped_to_the_context(limit):
    answer = server().chat(near_limit(6), max_tokens=limit)
    assert answer["usage"]["total_tokens"] == CONTEXT and answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["finish_reason"] == "length"


def test_last_place_of_the_context_is_usable():
    usage = server().chat(near_limit(1), max_tokens=None)["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (1, CONTEXT)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", [CONTEXT, 3 * CONTEXT])
def test_prompt_longer_than_the_context(words, stream):
    text = "cat " * words
    error = refused(post(content=text, stream=stream), code="context_length_exceeded")
    assert re.search(
        rf"This model's maximum context length is {CONTEXT} tokens\. However, your messages resulted in \d+ tokens",
        error["message"],
    )


def test_prompt_as_long_as_the_context():
    text = near_limit(1)
    text = (
        text + " 1"
        if len(server().prompt_ids(messages_of(("user", text + " 1")))) == CONTEXT
        else text + "猫"
    )
    if len(server().prompt_ids(messages_of(("user", text)))) >= CONTEXT:
        refused(post(content=text), code="context_length_exceeded")


def test_absurdly_long_prompt_is_refused_quickly():
    server()
    started = time.monotonic()
    refused(post(content="x" * 1_500_000), code="context_length_exceeded")
    assert time.monotonic() - started < 2


def test_truncate_prompt_tokens_keeps_the_last():
    answer = server().chat("cat " * 3 * CONTEXT, truncate_prompt_tokens=16)
    assert answer["usage"]["prompt_tokens"] == 16
