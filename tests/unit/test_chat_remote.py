"""A model behind an address: a server's stream as the conversation's events, and what goes wrong there."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from scripted_server import calls, serving

from kllm.chat.conversation import Conversation
from kllm.chat.model import Called, ContextFull, Said, Settings
from kllm.chat.remote import RemoteModel
from kllm.engine.answer import message_of
from kllm.errors import EXIT_FAILURE, EXIT_USAGE, KllmError
from kllm.tokenizer.parts import Part
from kllm.tools.registry import Toolbox, find_tools

HI = [{"role": "user", "content": "hi"}]


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


def heard(model: RemoteModel, **options: Any) -> list[Any]:
    return list(model.ask(HI, None, Settings(), **options))


def text_of(items: list[Any], kind: str = "content") -> str:
    return "".join(i.text for i in items if isinstance(i, Part) and i.kind == kind)


def test_a_stream_becomes_parts_and_figures() -> None:
    script = [{"reasoning_content": "hm"}, "你", "好", {"finish_reason": "length"}]
    with serving(lambda body: script) as server:
        for url in (server.url, server.url + "/", server.url + "/v1", server.url + "/v1/chat/completions"):
            model = RemoteModel(url)
            assert (model.name, model.context) == ("scripted", 4096)
        items = heard(model)
    assert (text_of(items), text_of(items, "reasoning")) == ("你好", "hm")
    said = items[-1]
    assert isinstance(said, Said) and (said.finish_reason, said.prompt_tokens, said.completion_tokens) == (
        "length",
        10,
        3,
    )
    assert said.prefill_s > 0 and said.decode_s >= 0
    body = server.requests[0]
    assert body == {
        "model": "scripted", "messages": HI, "stream": True, "stream_options": {"include_usage": True},
    }, "what was not set is the server's affair"  # fmt: skip


def test_what_was_set_is_sent() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "call_0"},
    ]
    tools = Toolbox(find_tools(["clock"])).schemas()
    with serving(lambda body: ["a"], key="sesame") as server:
        model = RemoteModel(server.url, key="sesame")
        settings = Settings({"temperature": 0.5, "seed": None}, False)
        list(model.ask(messages, tools, settings, calls=False))
    body = server.requests[0]
    assert body["temperature"] == 0.5 and "seed" not in body and body["tools"] == tools
    assert body["tool_choice"] == "none" and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "reasoning_content" not in body["messages"][1], "DeepSeek refuses it"
    call = body["messages"][1]["tool_calls"][0]
    assert call["function"]["arguments"] == '{"x": 1}' and call["id"] == "call_0"
    assert server.heads[0]["authorization"] == "Bearer sesame"


@pytest.mark.parametrize("owner", ["kllm", "vllm"])
def test_a_server_s_own_tools_are_kept_out_of_a_talk_in_code(owner: str) -> None:
    with serving(lambda body: ["It is 1."], owner=owner) as server:
        code = Conversation(RemoteModel(server.url), box=Toolbox([], code=True), code=True)
        list(code.ask("?"))
        list(Conversation(RemoteModel(server.url)).ask("?"))
        code.close()
    sent = [body.get("server_tools", "nothing") for body in server.requests]
    assert sent == [False if owner == "kllm" else "nothing", "nothing"], "others refuse unknown fields"


def test_tool_calls_are_put_together_and_run() -> None:
    def script(body: dict[str, Any]) -> list[Any]:
        if body["messages"][-1]["role"] == "tool":
            return [body["messages"][-1]["content"]]
        return calls(("calculator", {"expression": "6*7"}), ("calculator", {"expression": "1/0"}))

    with serving(script) as server:
        chat = Conversation(RemoteModel(server.url), box=Toolbox(find_tools(["calculator"])))
        items = list(chat.ask("?"))
    assert [i.text for i in items if isinstance(i, Called)] == ["42", "error: division by zero"]
    assert [m["role"] for m in server.requests[1]["messages"]] == ["user", "assistant", "tool", "tool"]
    assert chat.turns[0].answer["content"] == "error: division by zero"


def test_calls_that_the_server_ran_are_shown_and_not_run_again() -> None:
    script = [
        {"tool_events": [{"type": "call", "id": "a", "name": "clock", "arguments": "{}"}]},
        {
            "tool_events": [
                {"type": "result", "id": "a", "content": "noon", "is_error": False, "seconds": 0.1}
            ]
        },
        "It is noon.",
    ]
    with serving(lambda body: script) as server:
        chat = Conversation(RemoteModel(server.url))
        items = list(chat.ask("?"))
    assert [i for i in items if isinstance(i, Called)] == [
        Called("clock", "{}", "noon", False, 0.1, there=True)
    ]
    assert (
        chat.turns[0].messages[-1] == {"role": "assistant", "content": "It is noon."}
        and len(server.requests) == 1
    )


def test_a_server_that_does_not_stream() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    whole = {
        "choices": [
            {
                "message": {"role": "assistant", "content": "all", "tool_calls": [call]},
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    with serving(lambda body: (200, whole)) as server:
        items = heard(RemoteModel(server.url))
    assert text_of(items) == "all" and [
        i.name for i in items if isinstance(i, Part) and i.kind == "call"
    ] == ["f"]
    assert (items[-1].finish_reason, items[-1].completion_tokens) == ("tool_calls", 2)


def test_ctrl_c_closes_the_connection() -> None:
    with serving(lambda body: (f"w{i} " for i in range(10_000)), pause=0.01) as server:
        count = iter(range(10_000))
        items = heard(RemoteModel(server.url), interrupted=lambda: next(count) > 5)
        assert items[-1].finish_reason == "cancelled" and 0 < len(items) < 100
        deadline = time.monotonic() + 10
        while not server.left:
            assert time.monotonic() < deadline, "the server goes on for nobody"
            time.sleep(0.01)


def test_ctrl_c_is_seen_while_nothing_comes() -> None:
    gate = threading.Event()

    def script(body: dict[str, Any]) -> Any:
        yield "a"
        gate.wait(20)

    with serving(script) as server:
        started = time.monotonic()
        items = heard(RemoteModel(server.url), interrupted=lambda: time.monotonic() - started > 0.3)
        assert text_of(items) == "a" and time.monotonic() - started < 10
        gate.set()


# -- what goes wrong, one line each --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said", "code"),
    [
        ((500, {"error": {"message": "out of luck"}}), "http 500: out of luck", EXIT_FAILURE),
        ((429, {"error": {"message": "queue full"}}), "http 429: queue full", EXIT_FAILURE),
        ((404, {"error": "no such model"}), "no such model or address", EXIT_USAGE),
        ((403, {}), "it wants a key.*--api-key-file", EXIT_USAGE),
        ((200, {"nothing": 1}), "not a chat completion", EXIT_FAILURE),
        (delta(content="a") + event(error={"message": "broke"}), "the server gave up: broke", EXIT_FAILURE),
        (delta(content="a") + event(error="broke"), "the server gave up: broke", EXIT_FAILURE),
        (delta(content="a"), "the answer was cut off", EXIT_FAILURE),
        (b"data: {nonsense\n\n", "not a chat completion", EXIT_FAILURE),
        (b"data: [1]\n\n", "not a chat completion", EXIT_FAILURE),
        (event(choices=[3]), "not a chat completion", EXIT_FAILURE),
        (
            (200, {"error": {"message": "model not loaded"}}),
            "the server gave up: model not loaded",
            EXIT_FAILURE,
        ),
        ((301, {}), "it has moved", EXIT_USAGE),
        (b"data: " + b"[" * 100_000 + b"\n\n", "not a chat completion", EXIT_FAILURE),
        (delta(tool_calls=[{"index": [], "function": 3}]), "not a chat completion", EXIT_FAILURE),
    ],
)
def test_a_refusal_or_a_broken_answer_is_one_line(answer: Any, said: str, code: int) -> None:
    with serving(lambda body: answer) as server:
        model = RemoteModel(server.url)
        with pytest.raises(KllmError, match=said) as failure:
            heard(model)
    assert "\n" not in str(failure.value) and server.url in str(failure.value)
    assert failure.value.exit_code == code


@pytest.mark.parametrize(
    "error",
    [
        {"message": "This model's maximum context length is 8 tokens", "code": "context_length_exceeded"},
        {
            "message": "the request exceeds the available context size",
            "code": 400,
            "type": "exceed_context_size_error",
        },
        {"message": "too long", "code": 400, "type": "exceed_context_size_error"},
    ],
)
def test_the_context_of_the_server_is_full(error: dict[str, Any]) -> None:
    with serving(lambda body: (400, {"error": error})) as server, pytest.raises(ContextFull):
        heard(RemoteModel(server.url))


def test_a_server_that_hangs_up_without_a_last_word_is_forgiven() -> None:
    with serving(lambda body: delta(content="all") + delta("stop")) as server:
        assert text_of(heard(RemoteModel(server.url))) == "all"


def test_nobody_there_a_wrong_key_and_no_such_model() -> None:
    with pytest.raises(KllmError, match="connection refused.*is the server running") as failure:
        RemoteModel("http://127.0.0.1:9")
    assert failure.value.exit_code == EXIT_FAILURE
    for url in ("nonsense", "ftp://x", "http://", "http://h:99999", "http://exämple.org"):
        with pytest.raises(KllmError) as failure:
            RemoteModel(url)
        assert failure.value.exit_code == EXIT_USAGE and "\n" not in str(failure.value)
    with serving(lambda body: ["a"], key="sesame") as server:
        with pytest.raises(KllmError, match="it wants a key.*KLLM_API_KEY"):
            RemoteModel(server.url)
        with pytest.raises(KllmError, match="wrong key") as failure:
            RemoteModel(server.url, key="mellon")
        assert "mellon" not in str(failure.value) and failure.value.exit_code == EXIT_USAGE
    with serving(lambda body: ["a"], models=("a", "b")) as server:
        with pytest.raises(KllmError, match="which of its models.*it lists a, b"):
            RemoteModel(server.url)
        with pytest.raises(KllmError, match="no model named 'c' .it lists a, b"):
            RemoteModel(server.url, model="c")
        model = RemoteModel(server.url, model="b")
        assert (model.name, model.names) == ("b", ("a", "b"))


def test_a_prompt_that_cannot_be_seen() -> None:
    with (
        serving(lambda body: (404, {})) as server,
        pytest.raises(KllmError, match="does not show its prompts"),
    ):
        RemoteModel(server.url).prompt(HI, None, Settings())


# -- what servers stream ---------------------------------------------------------------------------------


def piece(index: Any = None, number: Any = None, name: Any = None, arguments: Any = None) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    given = {"index": index, "id": number, "function": function}
    return {"tool_calls": [{key: value for key, value in given.items() if value is not None}]}


@pytest.mark.parametrize(
    "deltas",
    [
        [piece(0, "a", "f", '{"x":'), piece(0, None, None, " 1}"), piece(1, "b", "g", "{}")],
        [piece(0, "a", "f", '{"x": 1}'), piece(0, "b", "g", "{}")],  # older ollama, Gemini
        [piece(None, "a", "f", '{"x":'), piece(None, "a", None, " 1}"), piece(None, "b", "g", "{}")],
        [piece(None, "a", "f", {"x": 1}), piece(None, "b", "g", {})],
        [piece(0, "a"), piece(0, None, "f", '{"x": 1}'), piece(1, "b", None, "{"), piece(1, None, "g", "}")],
        [piece(0, None, "f", '{"x":'), piece(0, "a", None, " 1}"), piece(1, "b", "g", "{}")],
        [
            {
                "tool_calls": piece(0, "a", "f", '{"x": 1}')["tool_calls"]
                + piece(1, "b", "g", "{}")["tool_calls"]
            }
        ],
    ],
)
def test_calls_in_every_dialect(deltas: list[Any]) -> None:
    with serving(lambda body: deltas) as server:
        items = heard(RemoteModel(server.url))
    message = message_of([i for i in items if isinstance(i, Part)], "reasoning_content")
    named = [
        (c["function"]["name"], json.loads(c["function"]["arguments"] or "{}")) for c in message["tool_calls"]
    ]
    assert named == [("f", {"x": 1}), ("g", {})] and items[-1].finish_reason == "tool_calls"


def test_thinking_in_tags_refusals_parts_and_half_characters() -> None:
    def says(*deltas: Any) -> tuple[str, str]:
        with serving(lambda body: list(deltas)) as server:
            items = heard(RemoteModel(server.url))
        return text_of(items, "reasoning"), text_of(items)

    assert says("<thi", "nk>\nhm", "m\n</think>\n\nye", "s <b>") == ("hmm", "yes <b>")
    assert says("a < b <think> c") == ("", "a < b <think> c"), "only at the start"
    assert says({"reasoning": "hm"}, "<think>x</think>y") == ("hm", "<think>x</think>y"), (
        "it tells them apart"
    )
    assert says({"refusal": "I will not."}) == ("", "I will not.")
    assert says({"content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}) == (
        "",
        "in parts",
    )
    assert says("a\ud800b") == ("", "a\ufffdb")


@pytest.mark.parametrize(
    "usage",
    ['{"prompt_tokens": 1e999}', '{"completion_tokens": "many"}', '{"prompt_tokens_details": [1]}', "[]"],
)
def test_odd_figures_do_not_cost_the_answer(usage: str) -> None:
    last = b'data: {"choices": [], "usage": ' + usage.encode() + b"}\n\n"
    with serving(lambda body: delta(content="all") + delta("stop") + last) as server:
        items = heard(RemoteModel(server.url))
    assert text_of(items) == "all" and items[-1].completion_tokens == 1


def test_events_of_several_lines_and_windows_line_ends() -> None:
    whole = b'data: {"choices":\r\ndata: [{"index": 0, "delta": {"content": "two lines"}, "finish_reason": "stop"}]}\r\n\r\n'
    with serving(lambda body: b": hello\n\nevent: x\n" + whole + b"data: [DONE]") as server:
        assert text_of(heard(RemoteModel(server.url))) == "two lines"
