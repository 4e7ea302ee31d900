"""Whatever anybody says: the mask is the assistant's words, and only the template writes control tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.tokenizer.chat import ChatEncoder, Encoded
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

NASTY = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|buffer1|>", "<think>", "</think>", "<tool_call>"),
    *("</tool_call>", "<tool_response>", "</tool_response>", "<|im_start|>assistant\n"),
    *("<|im_end|>\n<|im_start|>system\n", "<", "|>", "<|im_", "end|>"),
    *("\ue000", "\ue001", "\ue002", "\U000f0000", "{{ 7 * 7 }}", "{% endgeneration %}", "\\ue000"),
    *("\n", "\n\n", "   ", "\t", '"', "\\", "好", "🤖", "e\u0301", "word", " word", "1234"),
]
words = st.lists(
    st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=8
)
texts = words.map("".join)
# What an assistant may write itself: no turn markers, which would end its turn.
own = st.lists(
    st.sampled_from([w for w in NASTY if "<|" not in w and "|>" not in w and w != "<"]), max_size=8
)
own_texts = own.map("".join)
arguments = st.dictionaries(texts, texts | st.integers() | st.lists(texts, max_size=2), max_size=3)
calls = st.fixed_dictionaries({"name": texts, "arguments": arguments})
assistants = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts},
    optional={"reasoning_content": texts, "tool_calls": st.lists(calls, min_size=1, max_size=2)},
)
others = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": texts})
systems = st.fixed_dictionaries({"role": st.just("system"), "content": texts})
conversations = st.tuples(
    st.lists(systems, max_size=1), st.lists(assistants | others, min_size=1, max_size=6)
).map(lambda parts: parts[0] + parts[1])
tool_lists = st.none() | st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts})}),
    min_size=1,
    max_size=2,
)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    text = (
        'the assistant and the user talk. 用户和助手在说话。 <|im_start|>assistant\n <think> {"name": 1}\n\n'
        * 20
    )
    return ChatEncoder(train_tokenizer([text], 380)[0])


def spoken(message: dict[str, Any]) -> str:
    """What the assistant says in a turn, as our template writes it."""
    out = ""
    if message.get("reasoning_content") is not None:
        out += f"<think>\n{message['reasoning_content']}\n</think>\n\n"
    parts = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", []):
        values = json.dumps(call["arguments"], ensure_ascii=False)
        parts.append(f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {values}}}\n</tool_call>')
    return out + "\n".join(parts) + "<|im_end|>"


def masked(tokenizer: Tokenizer, encoded: Encoded) -> str:
    ids = [i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]
    return tokenizer.decode(ids, skip_special_tokens=False)


def structure(messages: list[dict[str, Any]], tools: Any) -> list[str]:
    """The control tokens that the template itself writes outside the assistant's words."""
    out: list[str] = []
    if tools:
        out += ["<|im_start|>", *["<tool_call>", "</tool_call>"] * 2, "<|im_end|>"]
        messages = messages[1:] if messages[0]["role"] == "system" else messages
    for i, message in enumerate(messages):
        tool = message["role"] == "tool"
        if not (tool and i and messages[i - 1]["role"] == "tool"):
            out.append("<|im_start|>")
        if message["role"] == "assistant":
            continue
        if tool:
            out += ["<tool_response>", "</tool_response>"]
        if not (tool and i + 1 < len(messages) and messages[i + 1]["role"] == "tool"):
            out.append("<|im_end|>")
    return out


@settings(max_examples=120, deadline=None, derandomize=True)
@given(messages=conversations, tools=tool_lists)
def test_the_mask_is_exactly_what_the_assistant_said(
    encoder: ChatEncoder, messages: list[dict[str, Any]], tools: Any
) -> None:
    encoded = encoder.encode(messages, tools)
    tokenizer = encoder.tokenizer
    assert masked(tokenizer, encoded) == "".join(spoken(m) for m in messages if m["role"] == "assistant")
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == encoder.text(messages, tools)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(messages=conversations, tools=tool_lists)
def test_only_the_template_writes_control_tokens(
    encoder: ChatEncoder, messages: list[dict[str, Any]], tools: Any
) -> None:
    encoded = encoder.encode(messages, tools)
    names = {i: name for name, i in encoder.tokenizer.added_tokens.items()}
    outside = [names[i] for i, m in zip(encoded.ids, encoded.mask, strict=True) if i in names and not m]
    assert outside == structure(messages, tools)
    inside = [names[i] for i, m in zip(encoded.ids, encoded.mask, strict=True) if i in names and m]
    assert inside.count("<|im_end|>") == sum(m["role"] == "assistant" for m in messages)
    assert not {"<|im_start|>", "<|endoftext|>"} & set(inside)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(messages=conversations, tools=tool_lists)
def test_a_prompt_is_the_start_of_the_training_row(
    encoder: ChatEncoder, messages: list[dict[str, Any]], tools: Any
) -> None:
    row = encoder.encode(messages, tools)
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        thinking = {"enable_thinking": False} if message.get("reasoning_content") == "" else {}
        prompt = encoder.prompt(messages[:i], tools, **thinking)
        assert row.ids[: len(prompt)] == prompt
        if not thinking:
            assert not row.mask[len(prompt) - 1] and row.mask[len(prompt)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(content=own_texts, reasoning=own_texts)
def test_the_assistants_own_tags_are_tokens(encoder: ChatEncoder, content: str, reasoning: str) -> None:
    """Think and tool tags in the assistant's content are the tokens that it will write."""
    tokenizer = encoder.tokenizer
    encoded = encoder.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": content}])
    answer = [i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]
    for tag in ("<think>", "</think>", "<tool_call>"):
        assert answer.count(tokenizer.added_tokens[tag]) == content.count(tag)
    encoded = encoder.encode([{"role": "assistant", "content": "", "reasoning_content": reasoning}])
    assert encoded.ids.count(tokenizer.added_tokens["</think>"]) == 1  # reasoning cannot end itself


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batch=st.lists(st.tuples(conversations, tool_lists), min_size=1, max_size=4))
def test_a_batch_is_its_rows(encoder: ChatEncoder, batch: list[tuple[list[dict[str, Any]], Any]]) -> None:
    assert encoder.encode_batch(batch) == [encoder.encode(messages, tools) for messages, tools in batch]
