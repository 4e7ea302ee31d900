"""Chat completions: the whole answer, the model, the messages."""

from __future__ import annotations

import re
import time

import pytest
from serve_client import CHAT, chat_body, content_of, locked_server, messages_of, post, refused, server
from serve_model import decode, end_of_turn

# ------------------------------------------------------------------------------------------- the answer


def test_answer_has_every_field():
    answer = server().chat()
    assert {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"} <= set(answer)
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert re.fullmatch(r"chatcmpl-[\w-]{8,}", answer["id"])
    assert isinstance(answer["created"], int) and abs(answer["created"] - time.time()) < 60
    assert isinstance(answer["system_fingerprint"], str) and answer["system_fingerprint"]


def test_choice_has_every_field():
    (choice,) = server().chat()["choices"]
    assert {"index", "message", "logprobs", "finish_reason"} <= set(choice)
    assert choice["index"] == 0 and choice["logprobs"] is None and choice["finish_reason"] == "length"
    message = choice["message"]
    assert message["role"] == "assistant" and isinstance(message["content"], str) and message["content"]
    assert message["refusal"] is None
    assert not message.get("tool_calls") and not message.get("reasoning_content")


def test_ids_differ_and_fingerprint_does_not():
    first, second = server().chat(), server().chat("other", temperature=1)
    assert first["id"] != second["id"]
    assert first["system_fingerprint"] == second["system_fingerprint"]


def test_usage_adds_up():
    usage = server().chat(max_tokens=7)["usage"]
    assert usage["prompt_tokens"] == len(server().prompt_ids(messages_of(("user", "hello"))))
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


def test_usage_counts_cached_tokens():
    text = "one shared beginning that is quite long, " * 8
    first = server().chat(text)["usage"]
    second = server().chat(text)["usage"]
    assert 0 < second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]
    assert second["prompt_tokens"] == first["prompt_tokens"]


def test_cache_salt_separates():
    text = "a secret beginning that is quite long, " * 8
    server().chat(text, cache_salt="alice")
    other = server().chat(text, cache_salt="bob")["usage"]["prompt_tokens_details"]["cached_tokens"]
    same = server().chat(text, cache_salt="alice")["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert other == 0 and same > 0


def test_usage_counts_the_prompt_once_for_all_n():
    one, three = server().chat(max_tokens=4)["usage"], server().chat(max_tokens=4, n=3)["usage"]
    assert three["prompt_tokens"] == one["prompt_tokens"] and three["completion_tokens"] == 12


def test_end_of_text_counts_and_content_is_a_string():
    answer = server().chat(logit_bias={end_of_turn(): 100})
    assert content_of(answer) == "" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


# ------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("model", [None, "tiny"])
def test_model_served(model):
    assert server().chat(model=model)["model"] == "tiny"


@pytest.mark.parametrize("model", ["gpt-4", "/etc/passwd", "../tiny", "tiny ", "TINY", "x" * 5000])
def test_model_unknown(model):
    error = refused(post(model=model), 404, code="model_not_found", param="model")
    assert len(error["message"]) < 500


def test_second_model_by_name():
    answer = locked_server().chat(model="second", max_tokens=2)
    assert answer["model"] == "second"
    names = [card["id"] for card in locked_server().get("/v1/models").json()["data"]]
    assert names == ["first", "second"]
    assert locked_server().chat(max_tokens=2)["model"] == "first"


def test_generation_config_gives_the_defaults():
    texts = {content_of(locked_server().chat(temperature=None, seed=seed)) for seed in (1, 2, 3)}
    assert texts == {content_of(locked_server().chat(temperature=0))}


def test_rest_of_a_small_context_is_the_default_length():
    answer = locked_server().chat("hi", model="second", max_tokens=None)
    usage = answer["usage"]
    assert usage["total_tokens"] == 64 and answer["choices"][0]["finish_reason"] == "length"


# --------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_roles(role):
    messages = messages_of((role, "be brief"), ("user", "hi"))
    assert content_of(server().answer(CHAT, chat_body(messages=messages)))


def test_developer_is_system():
    ids = [
        server().prompt_ids(messages_of((role, "be brief"), ("user", "hi")))
        for role in ("system", "developer")
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("role", ["wizard", "function", "", "User", None, 5])
def test_role_unknown(role):
    messages = messages_of(("user", "hi"), (role, "x"))
    refused(post(messages=messages), param="messages[1].role")


@pytest.mark.parametrize("messages", [None, [], {}, "hi", 5, [5], [None], ["hi"], [[]]], ids=str)
def test_messages_must_be_a_list_of_objects(messages):
    error = refused(post(messages=messages))
    assert error["param"].startswith("messages")


def test_messages_missing():
    refused(server().post(CHAT, {"model": "tiny"}), param="messages")


def test_role_missing():
    assert refused(post(messages=[{"content": "hi"}]))["param"].startswith("messages[0]")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "system"},
        {"role": "assistant"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "tool_call_id": "x"},
        {"role": "user", "content": 5},
        {"role": "user", "content": {"text": "x"}},
        {"role": "user", "content": True},
        {"role": "user", "content": [5]},
        {"role": "user", "content": [{"text": "x"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "user", "content": [{"type": "file", "file": {}}]},
    ],
    ids=str,
)
def test_content_wrong(message):
    error = refused(post(messages=[{"role": "user", "content": "hi"}, message]))
    assert error["param"].startswith("messages[1]"), error


def test_content_parts_equal_a_string():
    parts = [{"type": "text", "text": "hello"}]
    assert content_of(server().chat(parts)) == content_of(server().chat("hello"))


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "alpha"}, {"type": "text", "text": "omega"}]
    text = decode(server().prompt_ids([{"role": "user", "content": parts}]))
    assert re.search(r"alpha\s?omega", text)


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_content_parts_in_every_role(role):
    parts = [{"type": "text", "text": "hello"}]
    both = [
        server().prompt_ids([*messages_of(("user", "x")), {"role": role, "content": c, "tool_call_id": "c"}])
        for c in (parts, "hello")
    ]
    assert both[0] == both[1]


def test_assistant_without_content_but_with_calls():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for message in (
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ):
        body = chat_body(
            messages=[
                *messages_of(("user", "x")),
                message,
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
            ]
        )
        server().answer(CHAT, body)


def test_arguments_as_string_or_object_are_the_same_prompt():
    def ids(arguments):
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return server().prompt_ids([*messages_of(("user", "x")), {"role": "assistant", "tool_calls": [call]}])

    assert ids('{"a": 1, "b": "x"}') == ids({"a": 1, "b": "x"})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_accepted_on_input(field):
    message = {"role": "assistant", "content": "yes", field: "because of the cat"}
    messages = [*messages_of(("user", "x")), message, *messages_of(("user", "y"))]
    assert "because of the cat" in decode(server().prompt_ids(messages))


@pytest.mark.parametrize(
    "pairs",
    [
        [("system", "only this")],
        [("user", "x"), ("assistant", "")],
        [("user", "x"), ("assistant", "y")],
        [("assistant", "first"), ("user", "x")],
        [("user", "x"), ("user", "y"), ("system", "late")],
        [("user", "")],
    ],
    ids=str,
)
def test_unusual_conversations(pairs):
    assert isinstance(content_of(server().answer(CHAT, chat_body(messages=messages_of(*pairs)))), str)


@pytest.mark.parametrize("name", ["bob", None])
def test_message_name_is_accepted(name):
    server().answer(CHAT, chat_body(messages=[{"role": "user", "content": "hi", "name": name}]))


def test_too_many_messages():
    refused(post(messages=messages_of(*[("user", "")] * 2049)), param="messages")
