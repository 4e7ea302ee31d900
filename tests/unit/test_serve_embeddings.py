"""/v1/embeddings: every form of input, both encodings, length 1, pooling, refusals."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import pytest
import torch
from serve_bigrams import CONTEXT, WIDTH, Bigrams, Client, refusal, tokenizer

from kllm.serve.embeddings import normalised
from kllm.serve.settings import Settings

PATH = "/v1/embeddings"


def pooled(engine: Bigrams, ids: list[int], width: int = WIDTH) -> torch.Tensor:
    vector = engine.table[ids, :WIDTH].mean(0)[:width]
    return vector / vector.norm()


@pytest.mark.parametrize(
    "given",
    ["the cat", ["the cat", "你好"], [5, 6, 7], [[5, 6, 7], [9]]],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_every_form_of_input(given: Any) -> None:
    engine = Bigrams()
    answer = Client(engine).post(PATH, model="tiny", input=given).json()
    each = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    each = [tokenizer().encode_raw(item) if isinstance(item, str) else item for item in each]
    assert answer["object"] == "list" and answer["model"] == "tiny"
    assert [d["index"] for d in answer["data"]] == list(range(len(each)))
    for ids, item in zip(each, answer["data"], strict=True):
        assert item["object"] == "embedding"
        torch.testing.assert_close(torch.tensor(item["embedding"]), pooled(engine, ids))
        assert math.isclose(math.hypot(*item["embedding"]), 1, rel_tol=1e-6)
    tokens = sum(map(len, each))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_base64_holds_the_same_numbers() -> None:
    client = Client(Bigrams())
    plain = client.post(PATH, input="the cat").json()["data"][0]["embedding"]
    packed = client.post(PATH, input="the cat", encoding_format="base64").json()["data"][0]["embedding"]
    numbers = struct.unpack(f"<{WIDTH}f", base64.b64decode(packed, validate=True))
    assert list(numbers) == pytest.approx(plain, rel=1e-6)


def test_fewer_dimensions_are_the_first_ones_at_length_one() -> None:
    engine = Bigrams()
    answer = Client(engine).post(PATH, input=[5, 6], dimensions=3).json()
    torch.testing.assert_close(torch.tensor(answer["data"][0]["embedding"]), pooled(engine, [5, 6], 3))


def test_the_server_decides_the_pooling() -> None:
    engine = Bigrams()
    Client(engine, Settings(pooling="last")).post(PATH, input=[5, 6])
    assert engine.embedded == [([5, 6], "last")]


def test_a_vector_of_zeros_is_no_division_by_zero() -> None:
    assert normalised([0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [5, True]}, "input"),
        ({"input": [300]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"dimensions": WIDTH + 1}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"encoding_format": 7}, "encoding_format"),
    ],
    ids=str,
)
def test_refusals_name_the_field(change: dict[str, Any], param: str) -> None:
    assert refusal(Client(Bigrams()).post(PATH, **{"input": "the", **change}))["param"] == param


@pytest.mark.parametrize(
    "given", [[5] * (CONTEXT + 1), "x" * (17 * CONTEXT), ["a", "the cat " * 64]], ids=len
)
def test_too_long_an_input_is_refused_and_the_longest_that_fits_is_not(given: Any) -> None:
    client = Client(Bigrams())
    error = refusal(client.post(PATH, input=given))
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    assert client.post(PATH, input=[5] * CONTEXT).status_code == 200


def test_an_unknown_model_is_404() -> None:
    assert refusal(Client(Bigrams()).post(PATH, input="a", model="ada"), 404)["code"] == "model_not_found"


def test_nulls_are_absent() -> None:
    assert Client(Bigrams()).post(PATH, input="a", dimensions=None, encoding_format=None).status_code == 200
