"""Reasoning told apart from the answer: start state, newlines, marks by token and by text, any cuts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_scripted import tokenizer

from kllm.engine.answer import Answer, Reading, message_of
from kllm.engine.params import Event
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.parts import Lexer, Mark
from kllm.tokenizer.thinking import starts_thinking


class Bare:
    """A tokenizer without any added token: marks are found by their text."""

    added_tokens: dict[str, int] = {}  # noqa: RUF012
    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def bytes_of(self, token):
        return b""

    def stream_decoder(self, **kwargs: Any) -> None:
        return None


def split(
    text: str, *, thinking: bool, cuts: tuple[int, ...] = (), by_token: bool = False
) -> tuple[str, str]:
    """(reasoning, content) of an answer whose text comes cut, from a tokenizer with or without the marks."""
    reading = Reading(tokenizer() if by_token else Bare(), thinking, True)  # type: ignore[arg-type]
    answer, parts = Answer(reading), []
    if by_token:
        ids = tokenizer().encode_raw(text)
        decoder = tokenizer().stream_decoder()
        events = [Event(1, (i,), decoder.put(i)) for i in ids] + [Event(1, (), decoder.flush(), "stop")]
    else:
        bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
        pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        events = [Event(1, (), p, "stop" if i == len(pieces) - 1 else None) for i, p in enumerate(pieces)]
    for one in events:
        parts += answer.take(one)
    message = message_of(parts, "reasoning_content")
    return message.get("reasoning_content", ""), message["content"]


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        (True, "\nhm\n\nso\n</think>\n\nHello\n", "hm\n\nso", "Hello\n"),
        (True, "</think>Hello", "", "Hello"),
        (True, "cut in its thoughts\n", "cut in its thoughts\n", ""),
        (True, "a</think>b</think>c", "a", "b</think>c"),
        (True, "a<think>b</think>c", "a<think>b", "c"),
        (False, "Hello\n", "", "Hello\n"),
        (False, "\n\nHello", "", "\n\nHello"),
        (False, " \n<think>\nhm</think>\nHello", "hm", "Hello"),
        (False, "<think>", "", ""),
        (False, "no <think>hm</think> tag", "", "no <think>hm</think> tag"),
        (False, "</think>Hello", "", "</think>Hello"),
        (False, "\n", "", "\n"),
        (False, "", "", ""),
    ],
)
def test_what_is_reasoning(by_token: bool, thinking: bool, text: str, reasoning: str, content: str) -> None:
    assert split(text, thinking=thinking, by_token=by_token) == (reasoning, content)


def test_a_beginning_of_a_mark_that_does_not_go_on_is_given_out() -> None:
    assert split("a </thi", thinking=True, cuts=(4, 6)) == ("a </thi", "")
    assert split("<thin", thinking=False, cuts=(2,)) == ("", "<thin")
    assert split("a </thi nk> b", thinking=True, cuts=(7,)) == ("a </thi nk> b", "")


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<", "</", "thi", "nk>", "\n", "\n\n", " ", "a", "你好", "🤖"]
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS, st.lists(st.integers(0, 60), max_size=8), st.booleans())
def test_cuts_do_not_matter_and_nothing_is_lost(text: str, cuts: list[int], thinking: bool) -> None:
    whole = split(text, thinking=thinking)
    assert split(text, thinking=thinking, cuts=tuple(cuts)) == whole
    kept, given_ = "".join(whole).split(), text.split()
    for mark in ("<think>", "</think>"):
        kept, given_ = [w.replace(mark, "") for w in kept], [w.replace(mark, "") for w in given_]
    assert "".join(kept) == "".join(given_)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS, st.booleans())
def test_marks_by_token_and_by_text_agree_on_what_the_model_meant(text: str, thinking: bool) -> None:
    assert split(text, thinking=thinking, by_token=True) == split(text, thinking=thinking)


def test_letters_that_are_no_token_are_no_mark() -> None:
    tok = tokenizer()
    ids = [*tok.encode("say </think> x"), tok.added_tokens["</think>"], *tok.encode("Hello")]
    answer = Answer(Reading(tok, True, True))
    parts = answer.take(Event(1, tuple(ids), tok.decode(ids), "stop"))
    message = message_of(parts, "reasoning_content")
    assert (message["reasoning_content"], message["content"]) == ("say </think> x", "Hello")
    assert answer.reasoning_tokens == len(tok.encode("say </think> x")) + 1


def test_text_that_comes_later_than_its_tokens_is_read_the_same() -> None:
    """Stop strings hold text back, so a mark's text may come in pieces after its token."""
    tok = tokenizer()
    ids = [*tok.encode("hm"), tok.added_tokens["</think>"], *tok.encode("Hello")]
    text = tok.decode(ids)
    lexer = Lexer({"</think>": tok.added_tokens["</think>"]}, tok.stream_decoder())
    lexer.saw(ids)
    found = [item for char in text for item in lexer.feed(char)] + lexer.finish()
    assert "".join(i for i in found if isinstance(i, str)) == "hmHello"
    assert [i for i in found if isinstance(i, Mark)] == [Mark("</think>", 2)]


def test_the_start_is_read_from_the_prompts_tail() -> None:
    tok = tokenizer()
    encoder = ChatEncoder(tok)
    user = {"role": "user", "content": "hi <think>"}
    assert not starts_thinking(tok, encoder.prompt([user]))
    assert starts_thinking(tok, encoder.prompt([user], open_thinking=True))
    cut = {"role": "assistant", "content": "<think>\nnever closed"}
    assert not starts_thinking(tok, encoder.encode([user, cut, user]).ids)
    assert not starts_thinking(tok, [])
