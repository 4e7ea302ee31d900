"""POST /v1/chat/completions: answers, streams that add up to them, thinking, tools, grammars, figures, errors."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_scripted import THINK, TOOL, Server, chunks_of, fresh_server, joined, says, tokenizer

from kllm.engine.answer import Answer, Reading, delta_of, message_of
from kllm.engine.params import Event, TokenLogprob
from kllm.serve.settings import Settings
from kllm.serve.tools import ToolPlan

server = pytest.fixture(fresh_server)


def test_a_whole_answer(server: Server) -> None:
    answer = server.chat("hi", model="tiny").json()
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", answer.pop("id")) and isinstance(answer.pop("created"), int)
    prompt = len(server.engine.asked[-1][0])
    usage = answer.pop("usage")
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "the cat sat.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "system_fingerprint": "kllm-test",
    }
    tokens = len(tokenizer().encode("the cat sat.")) + 1
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, tokens)
    assert usage["total_tokens"] == prompt + tokens
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_stream_is_the_whole_answer_in_order(server: Server) -> None:
    response = server.chat("hi", stream=True, stream_options={"include_usage": True}, n=2)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache, no-transform"
    chunks = chunks_of(response)
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "tiny", "chat.completion.chunk")
    }
    whole = server.chat("hi", n=2).json()
    for index in (0, 1):
        choices = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
        assert all(c["delta"].get("content") and c["finish_reason"] is None for c in choices[1:-1])
        assert joined(chunks, index)["content"] == whole["choices"][index]["message"]["content"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(c["usage"] is None for c in chunks[:-1])
    assert "usage" not in chunks_of(server.chat("hi", stream=True))[0]


def test_limits_and_reasons(server: Server) -> None:
    assert server.message("hi", max_tokens=2)["finish_reason"] == "length"
    server.message("hi", max_tokens=10**9, max_completion_tokens=3)
    assert server.engine.asked[-1][1].max_tokens == 3
    server.message("hi", max_tokens=10**9)
    prompt, params = server.engine.asked[-1]
    assert params.max_tokens == 512 - len(prompt)
    stopped = server.message("hi", stop=["sat"])
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("the cat ", "stop")
    for field in ("max_tokens", "max_completion_tokens"):
        for value in (0, -1, 1.5, "5", True):
            assert server.refusal("hi", **{field: value})["param"] == field


def test_an_empty_answer_is_a_string() -> None:
    server = Server("")
    assert server.message("hi")["message"]["content"] == ""
    server.close()


def test_every_optional_field_may_be_null_or_unknown(server: Server) -> None:
    from kllm.serve.job import ChatRequest

    nulls = {name: None for name in ChatRequest.model_fields if name != "messages"}
    server.message("hi", **nulls)
    ignored = {"user": "u", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "prompt_cache_key": "x",
               "safety_identifier": "y", "verbosity": "low", "modalities": ["text"], "prediction": {}, "web_search_options": {},
               "functions": 5, "num_ctx": 2048}  # fmt: skip
    server.message("hi", **ignored)


def test_what_several_fields_say_together(server: Server) -> None:
    assert server.refusal("hi", stream_options={"include_usage": True})["param"] == "stream_options"
    assert server.refusal("hi", top_logprobs=1)["param"] == "top_logprobs"
    assert server.refusal("hi", logprobs=False, top_logprobs=1)["param"] == "top_logprobs"
    assert server.refusal("hi", logprobs=True, top_logprobs=21)["param"] == "top_logprobs"
    assert server.refusal("hi", logprobs=3)["param"] == "logprobs"
    assert server.refusal("hi", n=17)["param"] == "n"
    assert server.chat("hi", model="nope").status_code == 404
    assert server.engine.asked == []


# ---- log-probabilities


@says("the cat 你好 sat.")
def test_logprobs_cover_the_text_and_only_that(server: Server) -> None:
    for extra in (
        {},
        {"stop": ["sat"]},
        {"max_tokens": 4},
        {"stop_token_ids": [tokenizer().encode(" sat")[0]]},
    ):
        whole = server.message("hi", logprobs=True, top_logprobs=2, **extra)
        content = whole["message"]["content"]
        entries = whole["logprobs"]["content"]
        assert b"".join(bytes(e["bytes"]) for e in entries).decode() == content, extra
        assert all(len(e["top_logprobs"]) == 2 for e in entries)
        chunks = chunks_of(server.chat("hi", logprobs=True, top_logprobs=2, stream=True, **extra))
        assert joined(chunks)["logprobs"] == entries
    assert server.message("hi", logprobs=True)["logprobs"]["content"][0]["top_logprobs"] == []
    assert server.message("hi")["logprobs"] is None


def test_logprobs_wait_for_their_text() -> None:
    tok = tokenizer()
    ids = tok.encode("囍 cat")  # 囍 is three tokens here
    answer = Answer(Reading(tok, False, True))
    decoder = tok.stream_decoder()
    seen = []
    for i in ids:
        answer.take(Event(1, (i,), decoder.put(i), logprobs=(TokenLogprob(i, -1.0),)))
        seen.append(len(answer.entries))
    assert len(ids) == 4 and seen[-1] == 4


# ---- thinking


@says("\nhm\n</think>\n\nHello")
def test_reasoning_has_its_own_field(server: Server) -> None:
    message = server.message("hi", **THINK)["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Hello")
    usage = server.chat("hi", **THINK).json()["usage"]
    inside = len(tokenizer().encode_raw("\nhm\n</think>"))
    assert usage["completion_tokens_details"] == {"reasoning_tokens": inside}
    streamed = joined(chunks_of(server.chat("hi", stream=True, **THINK)))
    assert (streamed["reasoning_content"], streamed["content"]) == ("hm", "Hello")
    cut = server.message("hi", max_tokens=2, **THINK)
    assert (
        cut["message"]["content"] == ""
        and cut["message"]["reasoning_content"]
        and cut["finish_reason"] == "length"
    )
    assert server.message("hi", logprobs=True, **THINK)["logprobs"]["content"][-1]["token"]
    plain = server.message("hi")["message"]
    assert plain["content"] == "\nhm\n</think>\n\nHello" and "reasoning_content" not in plain


@pytest.mark.parametrize(("field", "expected"), [("reasoning", "hm"), ("none", None)])
def test_the_field_is_the_servers_choice(field: Any, expected: str | None) -> None:
    server = Server("hm</think>Hello", Settings(reasoning_field=field))
    message = server.message("hi", **THINK)["message"]
    assert message.get("reasoning") == expected and "reasoning_content" not in message
    if field == "none":
        assert message["content"] == "<think>\nhm</think>Hello"
    server.close()


def test_reasoning_comes_back_to_the_template(server: Server) -> None:
    seen: list[Any] = []
    real = server.runtime.encoder.prompt  # type: ignore[union-attr]
    server.runtime.encoder.prompt = lambda messages, tools, **k: (
        seen.append(messages) or real(messages, tools, **k)
    )  # type: ignore
    for field in ("reasoning", "reasoning_content"):
        server.message("hi", {"role": "assistant", "content": "a", field: "because"}, "ho")
        assert seen[-1][1] == {"role": "assistant", "content": "a", "reasoning_content": "because"}


# ---- errors and readers


def test_an_engine_that_breaks_before_the_first_token_is_a_plain_error() -> None:
    server = Server("the cat sat.")
    server.engine.break_at = 0
    response = server.chat("hi", stream=True)
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    server.close()


def test_a_full_queue_is_refused_before_the_stream() -> None:
    server = Server("the cat sat.", Settings(max_queue=1, max_running=1))

    async def go() -> list[int]:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 2}
        return sorted(
            [
                r.status_code
                for r in await asyncio.gather(*[server.apost("/v1/chat/completions", body) for _ in range(6)])
            ]
        )

    codes = asyncio.run(go())
    assert codes[0] == 200 and codes[-1] == 429
    server.close()


# ---- a stream is the whole answer, whatever the text and the steps

PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": {"x": "你"}}',
        "\n",
        " ",
        "the",
        "<",
        "囍",
        "{",
    ]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(PIECES, max_size=10).map("".join),
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_steps_do_not_matter(
    text: str, sizes: list[int], thinking: bool, forced: bool, several: bool
) -> None:
    tok = tokenizer()
    ids = tok.encode_raw(text)
    plan = ToolPlan([TOOL], parsed=True, forced=[] if forced else None, several=several)
    reading = Reading(tok, thinking, True, plan.parsed, plan.forced is not None, plan.several)

    def read(steps: list[list[int]]) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
        answer, decoder, parts = Answer(reading), tok.stream_decoder(), []
        for step in steps:
            parts += answer.take(Event(1, tuple(step), "".join(map(decoder.put, step))))
        parts += answer.take(Event(1, (tok.eos_token_id,), decoder.flush(), "stop"))
        message = message_of(parts, "reasoning_content")
        for call in message.get("tool_calls", []):
            call.pop("id")
        return message, [delta_of(p, "reasoning_content") for p in parts], answer.reasoning_tokens

    steps, at = [], 0
    while at < len(ids):
        size = sizes[len(steps) % len(sizes)]
        steps.append(ids[at : at + size])
        at += size
    whole, _, reasoning = read([ids])
    message, deltas, counted = read(steps)
    assert message == whole and counted == reasoning
    assert "".join(d.get("content") or "" for d in deltas) == (whole["content"] or "")
