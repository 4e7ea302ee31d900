"""Dialects: each is detected, brought to one shape, or refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.data.formats import (
    ChatRecord,
    PreferenceRecord,
    PromptRecord,
    RatedRecord,
    TextRecord,
    WrongDialect,
    detect,
    normalise,
)
from kllm.data.messages import BadRow, join_reasoning, split_reasoning

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2"}


@pytest.mark.parametrize(
    ("row", "dialect", "messages"),
    [
        ({"messages": [U, A]}, "openai", [U, A]),
        ([U, A], "openai", [U, A]),
        ({"conversations": [SYSTEM, U, A]}, "minimind", [SYSTEM, U, A]),
        ({"messages": [U, A], "system": "be brief"}, "openai", [SYSTEM, U, A]),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "id": 7},
            "sharegpt",
            [U, A],
        ),
        (
            {"conversations": [{"from": "Human", "value": "hi"}, {"from": "Assistant", "value": "hello"}]},
            "sharegpt",
            [U, A],
        ),
        ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca", [U, A]),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "system": "be brief"},
            "alpaca",
            [SYSTEM, {"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        (
            {"instruction": "hi", "input": None, "output": "hello", "history": [["a", "b"]]},
            "alpaca",
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, U, A],
        ),
        (
            {"instruction": "Q", "context": "C", "response": "R", "category": "x"},
            "dolly",
            [{"role": "user", "content": "Q\nC"}, {"role": "assistant", "content": "R"}],
        ),
        ({"prompt": "hi", "completion": "hello"}, "completion", [U, A]),
        ({"prompt": [SYSTEM, U], "completion": [A]}, "completion", [SYSTEM, U, A]),
        ({"prompt": "hi", "response": "hello"}, "completion", [U, A]),
        ({"question": "hi", "answer": "hello"}, "qa", [U, A]),
        ({"question": "1+1?", "answer": 2}, "qa", [
            {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]),
        ({"prompt": "hi", "answer": "hello"}, "prompt", [U, A]),
        ({"messages": [U, U, A, A]}, "openai", [U, U, A, A]),
        ({"messages": [U, A, U]}, "openai", [U, A]),
        ({"messages": [{"role": "system", "content": ""}, U, A]}, "openai", [U, A]),
        ({"messages": [{**U, "content": [{"type": "text", "text": "h"}, "i"]}, A]}, "openai", [U, A]),
    ],
)  # fmt: skip
def test_conversations(row: Any, dialect: str, messages: list[Any]) -> None:
    assert detect(row) == dialect
    assert normalise(row, "chat") == ChatRecord(messages, None)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, CALLING, RESULT, A], "tools": [TOOL]},
        {"messages": [U, CALLING, RESULT, A], "tools": json.dumps([TOOL])},
        {"messages": [U, {**CALLING, "content": None}, RESULT, A], "tools": TOOL},
        {"messages": [U, {"role": "assistant", "tool_calls": [CALL]}, RESULT, A],
         "functions": [TOOL["function"]]},
        {"conversations": [{**SYSTEM, "content": "", "tools": json.dumps([TOOL])},
                           U, {**CALLING, "tool_calls": json.dumps([CALL])}, RESULT, A]},
        {"conversations": [{"role": "system", "content": "", "functions": [TOOL]},
                           U, {**CALLING, "tool_calls": json.dumps(CALL)}, RESULT, A]},
        {"messages": [U, {**CALLING, "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}, RESULT, A],
         "tools": [TOOL]},
        {"messages": [U, {"role": "assistant", "content": None, "function_call": CALL["function"]},
                      {"role": "function", "content": "2"}, A], "tools": [TOOL]},
        {"conversations": [{"from": "human", "value": "hi"},
                           {"from": "function_call", "value": json.dumps(CALL["function"])},
                           {"from": "observation", "value": "2"}, {"from": "gpt", "value": "hello"}],
         "tools": json.dumps([TOOL["function"]])},
    ],
)  # fmt: skip
def test_tools_and_calls_in_every_spelling(row: Any) -> None:
    assert normalise(row, "chat") == ChatRecord([U, CALLING, RESULT, A], [TOOL])


def test_empty_tools_are_no_tools() -> None:
    for nothing in ("", "[]", [], None):
        assert normalise({"messages": [U, A], "tools": nothing}, "chat") == ChatRecord([U, A], None)


def test_call_ids_and_unparsable_arguments_survive() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{broken"}}
    row = {"messages": [U, {"role": "assistant", "tool_calls": [call]}, {**RESULT, "tool_call_id": "c1"}]}
    record = normalise(row, "chat")
    assert isinstance(record, ChatRecord) and record.messages[1]["tool_calls"] == [call]
    record = normalise({"messages": [*row["messages"], A]}, "chat")
    assert isinstance(record, ChatRecord) and record.messages[2]["tool_call_id"] == "c1"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [U]}, "no assistant message"),
        ({"messages": [A]}, "there is no prompt"),
        ({"messages": [U, {"role": "wizard", "content": "x"}]}, "message 2 has the unknown role 'wizard'"),
        ({"messages": [U, {"content": "x"}]}, "message 2 has no role"),
        ({"messages": [{"role": "user"}, A]}, r"message 1 \(user\) has no content"),
        (
            {"messages": [U, {"role": "assistant", "content": None}]},
            r"message 2 \(assistant\) has no content",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": " \n"}]},
            "message 2: the assistant's answer is empty",
        ),
        ({"messages": [{"role": "user", "content": 3}, A]}, "message 1: the content is a number, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "part of type 'image_url'"),
        ({"messages": [U, "hello"]}, "message 2 is text, not an object"),
        (
            {"messages": [U, {"role": "assistant", "content": "", "tool_calls": "[{"}]},
            "tool_calls is a string",
        ),
        ({"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "no function name"),
        ({"messages": [U, A], "tools": "{"}, "tools is a string that is not JSON"),
        ({"messages": [U, A], "tools": [{"x": 1}]}, "a tool has no name"),
        ({"instruction": "", "input": "", "output": "x"}, "instruction is empty"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": "a", "output": ["x"]}, "output is not text"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history is not a list of"),
        ({"messages": [{"role": "user", "content": "\ud800"}, A]}, "half of a surrogate pair"),
        ({"foo": 1, "bar": 2}, "unknown format: no known combination among the keys foo, bar"),
        ({"messages": None, "text": None}, "unknown format"),
        (7, "the row is a int, not an object"),
    ],
)
def test_bad_rows_say_why(row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        normalise(row, "chat")


def test_texts() -> None:
    assert normalise({"text": "a"}, "text") == TextRecord("a")
    assert normalise({"content": "a"}, "text") == TextRecord("a")
    assert normalise("a", "text") == TextRecord("a")
    assert normalise({"instruction": "x", "output": "y", "text": "a"}, "text") == TextRecord("a")
    for row, reason in (({"text": " \n"}, "the text is empty"), ({"text": "\udfff"}, "surrogate")):
        with pytest.raises(BadRow, match=reason):
            normalise(row, "text")


@pytest.mark.parametrize(
    ("row", "want", "words"),
    [
        ({"chosen": "a", "rejected": "b", "prompt": "c"}, "chat", "a preference pair.*but fine-tuning"),
        ({"prompt": "a", "completion": "b", "label": True}, "chat", "a rated answer"),
        ({"text": "a"}, "chat", "plain text.*but fine-tuning"),
        ({"messages": [U, A]}, "text", "a conversation.*but pretraining wants documents"),
        ({"question": "a", "answer": "b"}, "text", "a question"),
        ({"messages": [U, A]}, "preference", "but preference training wants pairs"),
        ({"conversations": [U], "gt": ["1"]}, "chat", "a question"),
    ],
)
def test_another_kind_of_data_is_named(row: Any, want: Any, words: str) -> None:
    with pytest.raises(WrongDialect, match=words) as caught:
        normalise(row, want)
    assert caught.value.hint


PAIR = PreferenceRecord([U], [A], [{"role": "assistant", "content": "go away"}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": [U], "chosen": [A], "rejected": [{"role": "assistant", "content": "go away"}]},
        {"chosen": [U, A], "rejected": [U, {"role": "assistant", "content": "go away"}]},
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, {"role": "assistant", "content": "go away"}]},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "hello"},
         "rejected": {"from": "gpt", "value": "go away"}},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"},
        {"question": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " hello", "rejected": " go away"},
        {"chosen": "Human: hi\n\nAssistant: hello", "rejected": "Human: hi\n\nAssistant: go away"},
        {"chosen": "\r\n\r\nHuman: hi\r\n\r\nAssistant: hello",
         "rejected": "\r\n\r\nHuman: hi\r\n\r\nAssistant: go away"},
        {"messages": [U, A], "chosen": "hello", "rejected": "go away"},
        {"messages": [U, A], "chosen": [U, A], "rejected": [U, {"role": "assistant", "content": "go away"}]},
    ],
)  # fmt: skip
def test_preference_pairs_in_every_spelling(row: Any) -> None:
    assert detect(row) == "preference"
    assert normalise(row, "preference") == PAIR


S, Q = {"role": "system", "content": "be kind"}, {"role": "user", "content": "and you?"}
BAD = {"role": "assistant", "content": "go away"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "be kind", "prompt": "hi"}, [S, U]),
        ({"system_prompt": "be kind", "prompt": "hi"}, [S, U]),
        ({"prompt": [S, U]}, [S, U]),
        ({"prompt": [S], "chosen": [U, A], "rejected": [U, BAD]}, [S, U]),
        ({"system": "be kind", "prompt": "hi", "chosen": [U, A], "rejected": [U, BAD]}, [S, U]),
        ({"prompt": [S, U], "chosen": [U, A], "rejected": [U, BAD]}, [S, U]),
        ({"prompt": [U], "chosen": [S, U, A], "rejected": [S, U, BAD]}, [S, U]),
        ({"prompt": [U, A, Q], "chosen": [Q, A], "rejected": [Q, BAD]}, [U, A, Q]),
        ({"prompt": [U, A], "chosen": [Q, A], "rejected": [Q, BAD]}, [U, A, Q]),
        ({"prompt": [S, U], "chosen": [U, A, Q, A], "rejected": [U, A, Q, BAD]}, [S, U, A, Q]),
        ({"prompt": "and you? ", "chosen": [U, A, Q, A], "rejected": [U, A, Q, BAD]}, [U, A, Q]),
        ({"instruction": "and", "input": "you?", "history": [["hi", "hello"]], "system": "be kind"},
         [S, U, A, {"role": "user", "content": "and\nyou?"}]),
    ],
)  # fmt: skip
def test_nothing_of_a_pairs_prompt_is_lost(row: Any, prompt: Any) -> None:
    found = normalise({"chosen": "hello", "rejected": "go away", **row}, "preference")
    assert found == PreferenceRecord(prompt, [A], [BAD])


def test_a_sentence_that_begins_like_a_transcript_is_one() -> None:
    found = normalise(
        {"prompt": "Human: a word?", "chosen": "Assistant: yes", "rejected": " no"}, "preference"
    )
    assert [m["content"] for m in (*found.prompt, *found.chosen, *found.rejected)] == [
        "Human: a word?", "Assistant: yes", " no",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "something else", "chosen": [U, A], "rejected": [U, BAD]},
            "begin with other words than the prompt",
        ),
        ({"prompt": "hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": "a", "rejected": "b"}, "the pair has no prompt"),
        ({"chosen": [U], "rejected": [U, A]}, "chosen does not end with an answer"),
        (
            {"chosen": [U, A], "rejected": [{"role": "user", "content": "other"}, A]},
            "no prompt|do not continue",
        ),
        (
            {"prompt": "hi", "chosen": "", "rejected": "b"},
            "chosen: message 1: the assistant's answer is empty",
        ),
    ],
)
def test_broken_pairs_say_why(row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        normalise(row, "preference")


def test_ratings_and_prompts() -> None:
    rated = normalise({"prompt": "hi", "completion": "hello", "label": False}, "rated")
    assert rated == RatedRecord([U], [A], False)
    assert normalise({"question": "hi", "answer": "4", "solution": "2+2=4"}, "prompt") == PromptRecord(
        [U], "4"
    )
    agent = {"conversations": [U, {"role": "assistant", "content": "none"}], "gt": ["1"]}
    assert normalise(agent, "prompt") == PromptRecord([U], ["1"])
    assert normalise({"messages": [U, {"role": "assistant", "content": ""}]}, "prompt") == PromptRecord([U])
    assert normalise({"question": "hi", "messages": [U], "answer": "x"}, "prompt") == PromptRecord([U], "x")


def test_reasoning_is_taken_out_only_where_it_goes_back_unchanged() -> None:
    assert split_reasoning("<think>\nwhy\n</think>\n\nso") == ("why", "so")
    for kept in (
        "<think>why</think>so", "<think>\n\n</think>\n\nso", "<think>\nwhy\n</think>\nso",
        "so <think>\nx\n</think>\n\ny", "<think>\n\nwhy\n</think>\n\nso",
        "<think>\nwhy\n</think>\n\n\nso", "<think>\nwhy", "<think>\nwhy\n</think>\n\n",
    ):  # fmt: skip
        assert split_reasoning(kept) == (None, kept)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab \n"), st.text(alphabet="ab \n"))
def test_reasoning_taken_out_and_put_back_is_the_same_text(thought: str, said: str) -> None:
    content = f"<think>\n{thought}\n</think>\n\n{said}"
    reasoning, rest = split_reasoning(content)
    message = {"role": "assistant", "content": rest}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    assert join_reasoning([message])[0]["content"] == content


def test_given_reasoning_is_kept() -> None:
    row = {"messages": [U, {**A, "reasoning_content": "because", "tool_calls": None}]}
    record = normalise(row, "chat")
    assert isinstance(record, ChatRecord) and record.messages[1] == {**A, "reasoning_content": "because"}
