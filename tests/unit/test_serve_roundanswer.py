"""Stop strings and log-probabilities beside calls that the server runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from serve_scripted import CALL, chunks_of, joined, tokenizer
from serve_tool_support import events_of, sums, tool_server

from kllm.engine.answer import Answer, Reading
from kllm.engine.params import Event, SamplingParams, TokenLogprob
from kllm.engine.request import Request
from kllm.serve.roundanswer import taken, without_stops
from kllm.tokenizer.parts import merged


def test_a_stop_string_holds_in_every_round() -> None:
    with tool_server("the " + sums("1+1"), "a mat. a cat.") as box:
        choice = box.message("hi", stop=["cat"])
        assert choice["message"]["content"] == "the\n\na mat. a " and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_does_not_cut_a_call(stream: bool) -> None:
    for said in (sums("6*7"), f"why\nso</think>\n\n{sums('6*7')}\n{sums('1+1')}\n"):
        with tool_server(said, "It is 42.\nReally.") as box:
            thinking = "</think>" in said
            asked = {"stop": ["\n", '"name"'], "chat_template_kwargs": {"enable_thinking": thinking}}
            if thinking:
                box.engine._script.said[1] = "</think>\n" + box.engine._script.said[1]
            response = box.chat("hi", stream=stream, **asked)
            message = joined(chunks_of(response)) if stream else response.json()["choices"][0]["message"]
            assert message["content"] == "It is 42." and len(box.engine.asked) == 2
            assert "<|im_start|>tool\n42" in box.prompt()


def test_a_stop_string_ends_what_is_no_call_and_the_calls() -> None:
    broken = "<tool_call>\n{no} END, no</tool_call>"
    with tool_server("So: " + broken, "never") as box:
        choice = box.message("hi", stop=["END"])
        assert choice["message"]["content"] == "So: <tool_call>\n{no} " and choice["finish_reason"] == "stop"
        box.engine._script.said[0] = "So: " + broken[:20]  # it never ends
        assert box.message("hi", stop=["END"])["message"]["content"] == "So: <tool_call>\n{no} "
        box.engine._script.said[0] = "So: " + sums("6*7") + "\nEND" + sums("1+1")
        choice = box.message("hi", stop=["END"])
        assert choice["finish_reason"] == "stop" and choice["message"]["content"] == "So:"
        assert events_of(choice["message"])[1:] == [
            ("result", "calculator", "error: not run: the answer has ended", True),
        ]  # fmt: skip
        assert box.runtime.in_flight == 0


def test_the_calls_tokens_are_no_text() -> None:
    asked = {"logprobs": True, "stream": True}
    said = ["the " + sums("1+1") + "cat" + sums("2+2")[:-12], "a " + CALL[:30] + "</tool_call> b"]
    with tool_server(*said) as box:
        for parallel, text in ((True, "the cat"), (False, "the ")):
            found = joined(chunks_of(box.chat("hi", parallel_tool_calls=parallel, **asked)))
            assert "".join(one["token"] for one in found["logprobs"]) == text + said[1]
            assert found["content"] == text.strip().replace(" ", "\n\n") + "\n\n" + said[1]


SAID = [
    "the cat sat on the mat. 你好，世界。猫在哪里？",
    "\n\n the\n\tcat",
    "why\n</think>\n\nthe\ncat\n\nsat",
    "a <think> b</think> c",
    "the\n <tool_call>{</tool_call> sat\n\n",
]


def events_of_engine(said: str, params: SamplingParams) -> list[Event]:
    """What the engine says, a token at a time."""
    ids = [*tokenizer().encode_raw(said), tokenizer().eos_token_id]
    request = Request(1, [5], params, tokenizer(), 30, tokenizer().vocab_size)
    return [
        request.accept([token], [TokenLogprob(token, -0.5, ())])
        for token in ids
        if request.finish_reason is None
    ]


def as_one(events: list[Event]) -> Event:
    """What a slow reader finds."""
    tokens = tuple(token for event in events for token in event.token_ids)
    logprobs = tuple(one for event in events for one in event.logprobs)
    text = "".join(event.text for event in events)
    return replace(events[-1], token_ids=tokens, logprobs=logprobs, text=text)


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("least", [0, 4])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    "stop", [["\n"], ["\n\n", "sat"], ["世", "cat s", "at"], ["哪里"], ["nope"], ["<|im_end|>", "cat"]]
)
def test_stop_strings_are_those_of_the_engine(said: str, least: int, at_once: bool, stop: list[str]) -> None:
    """Where nothing is thought and nothing called: the same text, reason, tokens and log-probabilities."""
    reading = Reading(
        tokenizer(), thinking=False, split=True, parsed=True, stop_ids=frozenset(tokenizer().stop_token_ids)
    )
    params = SamplingParams(
        max_tokens=30, stop=tuple(stop), min_tokens=least, logprobs=0, shown_special_ids=reading.shown()
    )
    asked, mine = without_stops(params, reading)
    theirs = Answer(reading)
    expected = [part for event in events_of_engine(said, params) for part in theirs.take(event)]
    events = events_of_engine(said, asked)
    found = taken(mine, [(0, event) for event in ([as_one(events)] if at_once else events)])
    assert merged(found) == merged(expected)
    assert (mine.finish_reason, mine.tokens, mine.overhang) == (
        theirs.finish_reason,
        theirs.tokens,
        theirs.overhang,
    )
    assert mine.pop_entries() == theirs.pop_entries()
