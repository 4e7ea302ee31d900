"""Embeddings."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from serve_client import locked_server, refused, server
from serve_model import CONTEXT, HIDDEN, encode, tokenizer

PATH = "/v1/embeddings"


def vectors(**body):
    return [np.array(item["embedding"]) for item in server().answer(PATH, body)["data"]]


def test_answer_has_every_field():
    answer = server().answer(PATH, {"input": ["the cat", "x"], "model": "tiny"})
    assert answer["object"] == "list" and answer["model"] == "tiny"
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert {item["object"] for item in answer["data"]} == {"embedding"}
    tokens = len(encode("the cat")) + 1
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_vectors_are_normalised_and_differ():
    first, second = vectors(input=["the cat", "a dog barks"])
    assert first.shape == (HIDDEN,) and np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert abs(first @ second) < 0.999


def test_input_kinds_are_the_same():
    ids = encode("the cat")
    for body in (["the cat"], ids, [ids]):
        assert vectors(input=body)[0] == pytest.approx(vectors(input="the cat")[0], abs=1e-5)


def test_batch_is_like_alone():
    texts = ["the cat", "你好", "x " * 60]
    alone = [vectors(input=text)[0] for text in texts]
    for one, other in zip(vectors(input=texts), alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_base64_is_the_same_vector():
    text = server().answer(PATH, {"input": "the cat", "encoding_format": "base64"})["data"][0]["embedding"]
    assert isinstance(text, str)
    data = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    assert data == pytest.approx(vectors(input="the cat")[0], abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, HIDDEN])
def test_dimensions_cut_and_normalise(size):
    (cut,) = vectors(input="the cat", dimensions=size)
    whole = vectors(input="the cat")[0][:size]
    assert cut == pytest.approx(whole / np.linalg.norm(whole), abs=1e-5)


def test_pooling_is_a_setting():
    last = locked_server().answer(PATH, {"input": "the cat sat"})["data"][0]["embedding"]
    assert np.linalg.norm(last) == pytest.approx(1, abs=1e-5)
    assert np.abs(np.array(last) - vectors(input="the cat sat")[0]).max() > 1e-3


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": None},
        {"input": []},
        {"input": [[]]},
        {"input": ""},
        {"input": 5},
        {"input": {}},
        {"input": [1.5]},
        {"input": [True]},
        {"input": [None]},
        {"input": ["x", 5]},
        {"input": [tokenizer().get_vocab_size()]},
        {"input": [-1]},
        {"input": "x", "encoding_format": "hex"},
        {"input": "x", "dimensions": 0},
        {"input": "x", "dimensions": HIDDEN + 1},
        {"input": "x", "dimensions": "x"},
    ],
    ids=str,
)
def test_refused(body):
    error = refused(server().post(PATH, body))
    assert error["param"].split("[")[0] in ("input", "encoding_format", "dimensions")


def test_too_long():
    for value in ("cat " * 2 * CONTEXT, [5] * (CONTEXT + 1)):
        refused(server().post(PATH, {"input": value}), code="context_length_exceeded")


def test_unknown_model():
    refused(server().post(PATH, {"input": "x", "model": "nobody"}), 404, code="model_not_found")


def test_nulls_and_unknown_fields():
    body = {"input": "x", "encoding_format": None, "dimensions": None, "user": None, "extra": 1}
    assert len(vectors(**body)) == 1
