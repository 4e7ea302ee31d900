"""Stop strings: across token borders, in every place, whole and streamed."""

from __future__ import annotations

import pytest
from serve_client import content_of, forced, server, texts_of
from serve_model import added_tokens, encode

TEXT = "alpha beta gamma delta epsilon"
EOS = "<|im_end|>"
FORCE_EOS = {"logit_bias": {str(added_tokens()[EOS]): 100}}

# stop, what is left of TEXT
CASES = [
    ("gamma", "alpha beta "),
    ("a gam", "alpha bet"),
    ("a", ""),
    ("alpha", ""),
    (" ", "alpha"),
    ("epsilon", "alpha beta gamma delta "),
    ("n", "alpha beta gamma delta epsilo"),
    (TEXT, ""),
    ("lpha beta gamma delta epsilon", "a"),
    (["delta", "beta"], "alpha "),
    (["gamma delta", "gamma"], "alpha beta "),
    (["xyz", "pha b"], "al"),
    (["eta", "beta"], "alpha "),
    (["ma d", "gamma x"], "alpha beta gam"),
    (["zz"] * 15 + ["silo"], "alpha beta gamma delta ep"),
]
NEVER = [
    "gammax",
    "epsilonx",
    "Alpha",
    "alpha  beta",
    TEXT + ".",
    "\n",
    "epsilon" * 30,
    ["ph a", "mma  ", "psilonn"],
]


@pytest.mark.parametrize(("stop", "left"), CASES, ids=str)
def test_stop_cuts_before_the_match(stop, left):
    fields = forced(TEXT, stop=stop)
    answer = server().chat(**fields)
    assert content_of(answer) == left and answer["choices"][0]["finish_reason"] == "stop"
    message = server().stream_chat(**fields).message()
    assert message["content"] == left and message["finish"] == "stop"


@pytest.mark.parametrize("stop", NEVER, ids=str)
def test_what_was_held_back_is_given_out(stop):
    fields = forced(TEXT, stop=stop)
    assert content_of(server().chat(**fields)) == TEXT
    assert server().stream_chat(**fields).message()["content"] == TEXT


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("囍🤖龘𠮷é한", "龘", "囍🤖"),
        ("囍🤖龘𠮷é한", "🤖龘", "囍"),
        ("囍🤖龘𠮷é한", "é한", "囍🤖龘𠮷"),
        ("你好，世界。猫在哪里？", "世界", "你好，"),
        ("🤖🤖🤖", "🤖🤖", ""),
        ("aaaab", "ab", "aaa"),
        ("aabaabaac", "aabaac", "aab"),
        ("x\ny\n\nz", "\n\n", "x\ny"),
    ],
)
def test_stop_on_wide_and_repeated_text(text, stop, left):
    fields = forced(text, stop=[stop])
    assert content_of(server().chat(**fields)) == left
    assert server().stream_chat(**fields).message()["content"] == left


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_stop_out_of_free_text(seed, width):
    fields = {"temperature": 1, "seed": seed, "max_tokens": 40}
    text = content_of(server().chat(**fields))
    stop = text[len(text) // 2 :][:width]
    answer = server().chat(**fields, stop=stop)
    assert content_of(answer) == text[: text.index(stop)]
    assert server().stream_chat(**fields, stop=stop).message()["content"] == content_of(answer)
    assert answer["usage"]["completion_tokens"] < 40


def test_tokens_after_the_match_are_not_counted():
    answer = server().chat(**forced(TEXT, stop="gamma"))
    assert answer["usage"]["completion_tokens"] < len(encode(TEXT))


def test_no_chunk_ever_shows_a_part_of_the_match():
    stream = server().stream_chat(**forced(TEXT, stop="a gamma d"))
    text = ""
    for choice in stream.of(0):
        text += choice["delta"].get("content") or ""
        assert "alpha bet".startswith(text)


@pytest.mark.parametrize("stop", [EOS, [EOS], ["xyz", EOS]], ids=str)
def test_end_of_text_as_a_stop_string(stop):
    answer = server().chat(stop=stop, **FORCE_EOS)
    assert content_of(answer) == "" and answer["choices"][0]["finish_reason"] == "stop"
    completed = server().complete(stop=stop, **FORCE_EOS)
    assert texts_of(completed) == [""] and completed["choices"][0]["finish_reason"] == "stop"


def test_special_token_as_a_stop_string():
    bias = {str(added_tokens()["<|endoftext|>"]): 100}
    answer = server().chat(stop=["<|endoftext|>"], logit_bias=bias, ignore_eos=True, max_tokens=5)
    assert answer["usage"]["completion_tokens"] == 1 and answer["choices"][0]["finish_reason"] == "stop"


def test_min_tokens_holds_stop_strings_back():
    bias = {"logit_bias": {str(encode("the")[0]): 100}}
    early = server().chat(stop="the", max_tokens=10, **bias)
    late = server().chat(stop="the", max_tokens=10, min_tokens=4, **bias)
    assert content_of(early) == "" and early["usage"]["completion_tokens"] == 1
    assert content_of(late).startswith("thethethe") and late["choices"][0]["finish_reason"] == "stop"
    assert late["usage"]["completion_tokens"] in (4, 5)


def test_stop_for_every_choice():
    answer = server().chat(n=3, **forced(TEXT, stop="gamma"))
    assert texts_of(answer) == ["alpha beta "] * 3


def test_stop_does_not_look_at_the_prompt():
    answer = server().complete("alpha gam", **forced("ma beta", stop="gamma"))
    assert texts_of(answer) == ["ma beta"]
    echoed = server().complete("alpha gamma ", echo=True, **forced("beta", stop="gamma"))
    assert texts_of(echoed) == ["alpha gamma beta"]


def test_nulls_in_the_list_are_dropped():
    assert content_of(server().chat(**forced(TEXT, stop=[None, "gamma", None]))) == "alpha beta "
    assert content_of(server().chat(**forced(TEXT, stop=[None]))) == TEXT


def test_stop_in_completions_stream():
    stream = server().stream_complete("x", **forced(TEXT, stop=["gamma"]))
    assert stream.text() == "alpha beta " and stream.of(0)[-1]["finish_reason"] == "stop"
