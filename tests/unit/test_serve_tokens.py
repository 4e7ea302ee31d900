"""/tokenize, /detokenize, /tokenizer_info: vLLM's shapes, and what lm_eval's remote tokenizer reads."""

from __future__ import annotations

from typing import Any

import pytest
from serve_bigrams import CONTEXT, Bigrams, Client, refusal, tokenizer

from kllm.tokenizer.chat import ChatEncoder

MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "the cat <|im_end|>?"}]


@pytest.fixture
def client() -> Client:
    return Client(Bigrams())


@pytest.mark.parametrize("text", ["", "the cat", "你好 🐈", "<|im_start|>user\nhi<|im_end|>\n", "a" * 5000])
def test_there_and_back(client: Client, text: str) -> None:
    answer = client.post("/tokenize", prompt=text, add_special_tokens=False).json()
    assert answer["tokens"] == tokenizer().encode_raw(text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == CONTEXT
    assert "token_strs" not in answer
    assert client.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}


def test_strings_of_tokens_are_the_vocabularys(client: Client) -> None:
    answer = client.post("/tokenize", model="tiny", prompt="the cat", return_token_strs=True).json()
    assert answer["token_strs"] == [tokenizer().id_to_token(i) for i in answer["tokens"]]


def test_messages_go_through_the_chat_template(client: Client) -> None:
    encoder = ChatEncoder(tokenizer())
    answer = client.post("/tokenize", messages=MESSAGES).json()
    assert answer["tokens"] == encoder.prompt(MESSAGES)
    assert answer["count"] == len(answer["tokens"])
    whole = client.post("/tokenize", messages=MESSAGES, add_generation_prompt=False).json()["tokens"]
    assert whole == encoder.encode(MESSAGES).ids
    text = client.post("/detokenize", tokens=whole).json()["prompt"]
    assert text == encoder.text(MESSAGES)


def test_messages_with_tools(client: Client) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    answer = client.post("/tokenize", messages=MESSAGES, tools=tools).json()
    assert answer["tokens"] == ChatEncoder(tokenizer()).prompt(MESSAGES, tools)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"prompt": "a", "add_special_tokens": "no"}, "add_special_tokens"),
    ],
    ids=str,
)
def test_what_tokenize_refuses(client: Client, body: dict[str, Any], param: str) -> None:
    assert refusal(client.post("/tokenize", **body))["param"] == param


@pytest.mark.parametrize("tokens", [[300], [5, -1], [True], [1.5], "5", [[5]], [2**70], None], ids=str)
def test_what_detokenize_refuses(client: Client, tokens: Any) -> None:
    assert (refusal(client.post("/detokenize", tokens=tokens))["param"] or "").startswith("tokens")


def test_no_tokens_are_no_text(client: Client) -> None:
    assert client.post("/detokenize", tokens=[]).json() == {"prompt": ""}


def test_an_unknown_model_is_404(client: Client) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert refusal(client.post(path, **body, model="nobody"), 404)["code"] == "model_not_found"


def test_what_the_remote_tokenizer_reads(client: Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == tokenizer().role_tokens["eos_token"]
    assert {"bos_token", "pad_token", "tokenizer_class"} <= info.keys()
    assert info["chat_template"] == tokenizer().chat_template
    assert info["model_max_length"] == CONTEXT
    eos = client.post("/tokenize", prompt=info["eos_token"], add_special_tokens=False).json()["tokens"]
    assert eos == [tokenizer().eos_token_id]
