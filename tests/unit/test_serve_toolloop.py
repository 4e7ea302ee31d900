"""The server's own tools: rounds, limits, what the client sees, and which requests get them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from serve_scripted import CALL, TOOL, chunks_of, joined, says, tokenizer
from serve_scripted import fresh_server as server
from serve_tool_support import Slow, call, events_of, sums, tool_server

from kllm.serve import calling
from kllm.tokenizer.toolcalls import TOOL_CALL
from kllm.tools.tool import ToolError, tool_of

server = pytest.fixture(server)


def test_a_call_is_run_and_the_answer_follows() -> None:
    with tool_server("Let me see. " + sums("6*7"), "It is 42.") as box:
        answer = box.chat("what is 6*7?").json()
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
        assert choice["message"]["content"] == "Let me see.\n\nIt is 42."
        assert events_of(choice["message"]) == [
            ("call", "calculator", {"expression": "6*7"}),
            ("result", "calculator", "42", False),
        ]
        told, result = choice["message"]["tool_events"]
        assert told["id"] == result["id"] and result["seconds"] >= 0
        (first, _), (second, _) = box.engine.asked
        usage = answer["usage"]
        assert usage["prompt_tokens"] == len(first) + len(second)
        drawn = [len(tokenizer().encode_raw(text)) + 1 for text in box.engine._script.said]
        assert usage["completion_tokens"] == sum(drawn)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 6}
        shown = tokenizer().decode(second, skip_special_tokens=False)
        before = tokenizer().decode(first, skip_special_tokens=False)
        assert '"calculator"' in before and '"clock"' in before
        assert shown.startswith(before.rpartition("<|im_start|>assistant")[0])  # the cache finds it
        assert "<|im_start|>tool\n42<|im_end|>" in shown and "Let me see." in shown
        assert box.runtime.in_flight == 0


def test_without_a_call_it_is_a_plain_answer() -> None:
    with tool_server("the cat") as box:
        message = box.message("hi")["message"]
        assert message == {"role": "assistant", "content": "the cat", "refusal": None}


@says("the cat")
def test_without_the_flag_nothing_changes(server: Any) -> None:
    server.message("hi", server_tools=True)
    assert "calculator" not in server.prompt()
    assert "server_tools" in server.refusal("hi", server_tools=["calculator"])["param"]


def test_errors_go_back_to_the_model() -> None:
    with tool_server(sums("1/0"), call("nope", x=1), call(expr=2), "Sorry.") as box:
        message = box.message("hi")["message"]
        results = [event for event in message["tool_events"] if event["type"] == "result"]
        assert all(event["is_error"] and event["content"].startswith("error: ") for event in results)
        assert "there is no tool 'nope'" in results[1]["content"] and message["content"] == "Sorry."
        assert results[2]["content"] in box.prompt()
        counts = box.served.metrics.tool_calls
        assert counts == {("calculator", "error"): 2, ("unknown", "error"): 1}
        assert 'tool="unknown",outcome="error"} 1' in box.app.state.metrics.render([box.served])


def test_the_same_call_twice_is_the_end() -> None:
    with tool_server(sums("1+1"), sums("1+1"), "It is 2.") as box:
        message = box.message("hi")["message"]
        results = [event for event in events_of(message) if event[0] == "result"]
        assert results[0][2:] == ("2", False) and "not run: the same call twice" in results[1][2]
        assert message["content"] == "It is 2."
        banned = tokenizer().added_tokens[TOOL_CALL]
        biases = [dict(params.logit_bias) for _, params in box.engine.asked]
        assert [banned in bias for bias in biases] == [False, False, True]
        assert '"calculator"' in box.prompt()
        assert box.served.metrics.tool_calls["calculator", "not_run"] == 1


def test_rounds_are_limited() -> None:
    with tool_server(*(sums(f"{i}+1") for i in range(20))) as box:
        message = box.message("hi")["message"]
        assert len(box.engine.asked) == 9
        assert len(message["tool_events"]) == 16
        assert TOOL_CALL in message["content"]  # the script says it all the same


def test_several_calls_in_one_answer() -> None:
    with tool_server(sums("1+1") + "\nand\n" + sums("2+2"), "Done.") as box:
        message = box.message("hi")["message"]
        assert [e[0] for e in events_of(message)] == ["call", "call", "result", "result"]
        assert message["content"] == "and\n\nDone."
    with tool_server(sums("1+1") + sums("2+2"), "Done.") as box:
        assert len(box.message("hi", parallel_tool_calls=False)["message"]["tool_events"]) == 2


def without_ids(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key not in ("id", "seconds")} for event in events]


@pytest.mark.parametrize("thinking", [False, True])
def test_a_stream_is_the_whole(thinking: bool) -> None:
    said = ["Look: " + sums("6*7"), sums("1/0"), "It is 42."]
    if thinking:
        said = [f"why{i}</think>{text}" for i, text in enumerate(said)]
    asked = {"logprobs": True, "top_logprobs": 1, "chat_template_kwargs": {"enable_thinking": thinking}}
    with tool_server(*said) as box:
        whole = box.chat("hi", **asked).json()
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = chunks_of(box.chat("hi", **asked, **stream))
        message = whole["choices"][0]["message"]
        sum_of = joined(chunks)
        deltas = [choice["delta"] for one in chunks for choice in one["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        events = [event for delta in deltas for event in delta.get("tool_events", [])]
        assert without_ids(events) == without_ids(message["tool_events"])
        assert sum_of["content"] == message["content"] == "Look:\n\nIt is 42."
        assert sum_of["calls"] == [] and sum_of["reason"] == "stop"
        assert sum_of["reasoning_content"] == message.get("reasoning_content", "")
        if thinking:
            assert message["reasoning_content"] == "why0\n\nwhy1\n\nwhy2"
        assert sum_of["logprobs"] == whole["choices"][0]["logprobs"]["content"]
        text = "".join(
            f"{f'why{i}' if thinking else ''}</think>{said}"
            for i, said in enumerate(["Look: ", "", "It is 42."])
        )
        assert "".join(one["token"] for one in sum_of["logprobs"]) == (
            text if thinking else "Look: It is 42."
        )
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
        assert len({one["id"] for one in chunks}) == 1


def test_max_tokens_is_for_all_rounds() -> None:
    first = len(tokenizer().encode_raw(sums("6*7"))) + 1
    with tool_server(sums("6*7"), "the cat sat on the mat") as box:
        answer = box.chat("hi", max_tokens=first + 2).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == first + 2
        assert [params.max_tokens for _, params in box.engine.asked] == [first + 2, 2]
    with tool_server(sums("6*7"), "never") as box:
        answer = box.chat("hi", max_tokens=first).json()
        assert answer["choices"][0]["finish_reason"] == "length" and len(box.engine.asked) == 1
        assert events_of(answer["choices"][0]["message"])[1][2:] == (
            "error: not finished: the answer has no tokens left", True,
        )  # fmt: skip
    with tool_server("the cat " + sums("6*7"), "never") as box:  # cut inside the call: it is text
        message = box.message("hi", max_tokens=first - 3)
        assert message["finish_reason"] == "length" and TOOL_CALL in message["message"]["content"]


def test_a_full_context_ends_it_with_what_there_is() -> None:
    def much() -> str:
        """Says much."""
        return "cat " * 900

    with tool_server("So: " + call("much"), "never", tools=[much], context=700) as box:
        choice = box.message("hi")
        assert choice["finish_reason"] == "length" and choice["message"]["content"] == "So:"
        assert len(box.engine.asked) == 1 and box.runtime.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_writes_is_no_fault_of_the_client(stream: bool) -> None:
    """Arguments nested deeper than a request may have them: an error for the model, not a 400."""
    deep: Any = 1
    for _ in range(130):
        deep = [deep]
    with tool_server(call(expression=deep), sums("6*7"), "It is 42.") as box:
        response = box.chat("hi", stream=stream)
        if stream:
            assert joined(chunks_of(response))["content"] == "It is 42."
            return
        message = response.json()["choices"][0]["message"]
        (told, _), results = events_of(message)[0][::2], events_of(message)[1::2]
        assert told == "call" and message["content"] == "It is 42."
        assert [event[2:] for event in results] == [
            ("error: calculator: the arguments are nested deeper than 128", True), ("42", False),
        ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_that_cannot_go_on_ends(stream: bool) -> None:
    """There is room for the client's messages, and none for what the tools add to them."""
    many = [{"role": "user", "content": ""}] * 2047
    with tool_server("So: " + sums("6*7"), "never", context=99_999) as box:
        response = box.chat(*many, stream=stream)
        choice = (
            {"finish_reason": joined(chunks_of(response))["reason"]}
            if stream
            else response.json()["choices"][0]
        )
        assert choice["finish_reason"] == "length" and len(box.engine.asked) == 1
        assert stream or events_of(choice["message"])[1][2] == "42"
        assert box.runtime.in_flight == 0


def test_a_request_chooses_among_them() -> None:
    with tool_server("hi") as box:
        box.message("hi", server_tools=["clock"])
        assert "clock" in box.prompt() and "calculator" not in box.prompt()
        for chosen in ([], False):
            box.message("hi", server_tools=chosen)
            assert "clock" not in box.prompt()
        for chosen in (True, ["clock", "calculator", "clock"]):
            box.message("hi", server_tools=chosen)
            assert box.prompt().index("calculator") < box.prompt().index("clock")
        error = box.refusal("hi", server_tools=["clock", "python"])
        assert error["param"] == "server_tools" and '"python"; it has: calculator, clock' in error["message"]
        for wrong in ("clock", 1, [1], {"clock": True}):
            assert box.refusal("hi", server_tools=wrong)["param"].startswith("server_tools")


def test_a_tool_outside_the_subset_is_not_run() -> None:
    with tool_server(sums("6*7"), "Well.") as box:
        message = box.message("hi", server_tools=["clock"])["message"]
        assert events_of(message)[1][2] == "error: there is no tool 'calculator'; there is clock"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"n": 2},
        {"n": 2, "tool_choice": "none"},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["a"]}},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "continue_final_message": True},
        {"add_generation_prompt": False},
    ],
)  # fmt: skip
def test_requests_that_go_another_way(fields: dict[str, Any]) -> None:
    with tool_server(CALL) as box, tool_server(CALL, tools=[]) as plain:
        for one in (box, plain):
            choice = one.message("hi", **fields)
            assert "tool_events" not in choice["message"] and len(one.engine.asked) == fields.get("n", 1)
        assert box.engine.asked == plain.engine.asked
        assert (choice["finish_reason"] == "tool_calls") == ("tools" in fields)


def test_own_tools_may_be_an_empty_list_and_the_format_text() -> None:
    with tool_server("hi") as box:
        box.message("hi", tools=[], response_format={"type": "text"}, tool_choice="auto")
        assert "calculator" in box.prompt()


@pytest.mark.parametrize("stream", [False, True])
def test_none_bans_the_calls_and_keeps_the_tools_in_the_prompt(stream: bool) -> None:
    with tool_server(sums("6*7"), "never") as box:
        box.message("hi")
        shown = box.engine.asked[0][0]
        response = box.chat("hi", tool_choice="none", stream=stream)
        message = joined(chunks_of(response)) if stream else response.json()["choices"][0]["message"]
        prompt, params = box.engine.asked[-1]
        assert prompt == shown and dict(params.logit_bias)[tokenizer().added_tokens[TOOL_CALL]] < -1e6
        assert message["content"] == sums("6*7") and "tool_events" not in message
        box.message("hi", tool_choice="none", server_tools=False)
        assert "calculator" not in box.prompt()


def test_the_servers_tools_cannot_be_forced() -> None:
    named = {"type": "function", "function": {"name": "calculator"}}
    with tool_server("hi") as box:
        for choice in ("required", named):
            error = box.refusal("hi", tool_choice=choice)
            assert error["param"] == "tool_choice" and "\n" not in error["message"]
            assert error["message"].startswith("the server's own tools run with tool_choice auto only")
            assert "needs tools" in box.refusal("hi", tool_choice=choice, server_tools=False)["message"]
        assert box.refusal("hi", tool_choice={"type": "x"})["param"] == "tool_choice.type"
        assert box.refusal("hi", tool_choice="always")["message"].startswith("tool_choice must be")
        assert box.engine.asked == []


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"server_tools": ["clock"]},
        {"server_tools": False},
        {"tools": [TOOL]},
        {"tool_choice": "none"},
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["a"]}},
        {"add_generation_prompt": False},
    ],
)
def test_what_is_shown_of_the_prompt_is_what_the_model_gets(extra: dict[str, Any]) -> None:
    with tool_server("hi") as box:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], **extra}
        shown = box.post("/v1/chat/completions/render", body).json()
        tokens = box.post("/tokenize", body).json()["tokens"]
        box.message("hi", **extra)
        assert shown["prompt"] == box.prompt() and shown["token_ids"] == tokens == box.engine.asked[-1][0]


def test_a_text_to_be_cut_has_no_tools() -> None:
    with tool_server("hi") as box:
        assert box.post("/tokenize", {"prompt": "hi"}).json()["tokens"] == tokenizer().encode_raw("hi")
        refused = box.post(
            "/tokenize", {"messages": [{"role": "user", "content": "a"}], "server_tools": ["no"]}
        )
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "server_tools"


def test_responses_have_none() -> None:
    with tool_server("hi") as box:
        assert box.post("/v1/responses", {"input": "hi"}).status_code == 200
        assert "calculator" not in box.prompt()


def test_the_official_client_sees_an_answer() -> None:
    openai = pytest.importorskip("openai")

    async def work() -> None:
        with tool_server(sums("6*7"), "It is 42.") as box:
            transport = httpx.ASGITransport(box.app)
            http = httpx.AsyncClient(transport=transport)
            client = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="x", http_client=http)
            messages = [{"role": "user", "content": "6*7?"}]
            whole = await client.chat.completions.create(model="tiny", messages=messages)
            choice = whole.choices[0]
            assert choice.message.content == "It is 42." and choice.message.tool_calls is None
            assert choice.finish_reason == "stop"
            assert [event["type"] for event in choice.message.tool_events] == ["call", "result"]
            stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
            deltas = [chunk.choices[0].delta async for chunk in stream]
            assert all(delta.tool_calls is None for delta in deltas)
            assert "".join(delta.content or "" for delta in deltas) == "It is 42."
            await http.aclose()

    asyncio.run(work())


def test_the_document_has_the_field() -> None:
    with tool_server("hi") as box:
        document = asyncio.run(_openapi(box.app)).json()
        body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
        assert "tool_events" in body["schema"]["properties"]["server_tools"]["description"]


async def _openapi(app: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        return await client.get("/openapi.json")


def test_a_slow_tool_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "SECONDS", 0.1)
    monkeypatch.setattr(calling, "_LATE", 0.1)
    monkeypatch.setattr("kllm.serve.errand._GRACE", 0.1)
    slow = Slow()
    with tool_server(call("wait") + sums("1+1"), "Never mind.", tools=[slow.tool(), "calculator"]) as box:
        message = box.message("hi")["message"]
        assert message["content"] == "Never mind."
        results = [event for event in events_of(message) if event[0] == "result"]
        assert [event[2] for event in results] == ["error: not finished: the tools took more than 0.1 s"] * 2
        assert slow.left.wait(5)  # it was thrown out


def test_a_tool_cannot_end_the_server() -> None:
    def leave() -> str:
        """Leaves."""
        raise SystemExit(3)

    with tool_server(call("leave"), "Still here.", tools=[leave]) as box:
        message = box.message("hi")["message"]
        assert events_of(message)[1][2:] == ("error: leave: SystemExit", True)
        assert message["content"] == "Still here."


def test_what_a_tool_stumbles_over_is_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A stranger gets the type; what the tool itself says with a ToolError is meant for the model."""

    def boom(kindly: bool) -> str:
        """Fails."""
        try:
            raise RuntimeError("/secret/path")
        except RuntimeError as error:
            if kindly:
                raise ToolError("not today") from error
            raise

    with tool_server(call("boom", kindly=False), call("boom", kindly=True), "Oh.", tools=[boom]) as box:
        message = box.message("hi")["message"]
        results = [event[2] for event in events_of(message) if event[0] == "result"]
        assert results == ["error: boom: RuntimeError", "error: not today"]
        assert "/secret" not in box.prompt() and caplog.text.count("RuntimeError: /secret/path") == 1
    with pytest.raises(ToolError, match="boom: RuntimeError: /secret/path"):  # as in a terminal
        tool_of(boom).call('{"kindly": false}')
