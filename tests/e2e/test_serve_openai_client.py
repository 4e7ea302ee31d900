"""The official client drives everything."""

from __future__ import annotations

import asyncio
import json

import pytest
from serve_client import KEYS, forced, locked_server, narrow_server, server
from serve_model import HIDDEN, added_tokens

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

USER = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Cat(pydantic.BaseModel):
    legs: int = pydantic.Field(ge=0, le=4)
    fat: bool


def client_of(running, key="none"):
    return openai.OpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client():
    with client_of(server()) as made:
        yield made


def create(client, **fields):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": USER, "max_tokens": 8, "temperature": 0, **fields}
    )


def test_chat(client):
    answer = create(client)
    assert answer.choices[0].message.content and answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer._request_id


def test_chat_stream(client):
    stream = create(client, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == create(client).choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 8


def test_chat_stream_helper(client):
    extra = forced("blue sky")
    with client.chat.completions.stream(model="tiny", messages=USER, extra_body=extra) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta"} <= kinds
    assert final.choices[0].message.content == "blue sky" and final.choices[0].finish_reason == "stop"


def test_parse_gives_a_pydantic_object(client):
    answer = client.chat.completions.parse(
        model="tiny", messages=USER, max_tokens=100, temperature=0, response_format=Cat
    )
    assert isinstance(answer.choices[0].message.parsed, Cat)


def test_tool_loop(client):
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    first = create(client, **fields)
    message = first.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    messages = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert create(client, messages=messages, tools=[TOOL]).choices[0].message.content


def test_tool_stream(client):
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    arguments, name = "", ""
    for chunk in create(client, stream=True, **fields):
        for part in chunk.choices[0].delta.tool_calls or []:
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert name == "weather" and json.loads(arguments)
    whole = create(client, **fields).choices[0].message.tool_calls[0].function
    assert (whole.name, whole.arguments) == (name, arguments)


def test_extra_body(client):
    assert create(client, extra_body=forced("囍🤖")).choices[0].message.content == "囍🤖"
    think = create(client, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert think.choices[0].message.reasoning_content and think.choices[0].message.content == ""


def test_logprobs(client):
    answer = create(client, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8 and len(entries[0].top_logprobs) == 3
    assert entries[0].top_logprobs[0].logprob == entries[0].logprob


def test_completions(client):
    answer = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=4, temperature=0, logprobs=2, echo=True
    )
    assert (
        answer.choices[0].text.startswith("the cat") and answer.choices[0].logprobs.token_logprobs[0] is None
    )
    chunks = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=4, temperature=0, stream=True
    )
    assert "the cat" + "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_embeddings(client):
    """The client asks for base64 by itself."""
    answer = client.embeddings.create(model="tiny", input=["a", "b"])
    assert [len(item.embedding) for item in answer.data] == [HIDDEN, HIDDEN]
    plain = client.embeddings.create(model="tiny", input="a", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-5)
    assert len(client.embeddings.create(model="tiny", input="a", dimensions=5).data[0].embedding) == 5


def test_models(client):
    (card,) = client.models.list().data
    assert client.models.retrieve(card.id) == card


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"temperature": 9}, "BadRequestError", None),
        ({"model": "nobody"}, "NotFoundError", "model_not_found"),
        (
            {"messages": [{"role": "user", "content": "x " * 9000}]},
            "BadRequestError",
            "context_length_exceeded",
        ),
        ({"stream": True, "temperature": 9}, "BadRequestError", None),
    ],
    ids=str,
)
def test_errors_are_the_client_s_own(client, fields, error, code):
    with pytest.raises(getattr(openai, error)) as caught:
        create(client, **fields)
    assert caught.value.code == code and caught.value.type


def test_keys():
    with client_of(locked_server(), KEYS[2]) as good:
        assert create(good, model="first")
    with client_of(locked_server(), "sk-wrong") as bad, pytest.raises(openai.AuthenticationError) as caught:
        create(bad)
    assert caught.value.code == "invalid_api_key"


def test_timed_out_stream_raises():
    with client_of(narrow_server()) as narrow, pytest.raises(openai.APIError):
        list(create(narrow, model="narrow", stream=True, max_tokens=None, extra_body={"ignore_eos": True}))


def test_many_asynchronous_requests():
    async def run():
        async with openai.AsyncOpenAI(base_url=server().url + "/v1", api_key="x", max_retries=0) as many:
            answers = [
                many.chat.completions.create(
                    model="tiny", messages=USER, max_tokens=6, temperature=1, seed=i % 3
                )
                for i in range(24)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

    texts = asyncio.run(run())
    assert len(set(texts)) == 3 and texts[:3] * 8 == texts


def test_closing_a_stream_early(client):
    from serve_client import eventually

    stream = create(client, stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert eventually(server().idle, 3)


def test_responses(client):
    answer = client.responses.create(model="tiny", input="hello", max_output_tokens=8, temperature=0)
    assert answer.output_text == create(client).choices[0].message.content
    with client.responses.stream(model="tiny", input="hello", max_output_tokens=8, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == answer.output_text


def test_n_and_stop(client):
    answer = create(client, n=2, stop=["gam"], extra_body=forced("alpha gamma"))
    assert [choice.message.content for choice in answer.choices] == ["alpha ", "alpha "]


def test_empty_answer(client):
    answer = create(client, logit_bias={str(added_tokens()["<|im_end|>"]): 100})
    assert answer.choices[0].message.content == "" and answer.choices[0].finish_reason == "stop"
