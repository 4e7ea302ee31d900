"""Streamed text adds up to the whole text, and never shows half a character."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from kllm.tokenizer.source import Source
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(["流式输出要小心。the stream must not break. 🤖👍 é"] * 9, 340)[0]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream_decoder()
    return [*(stream.put(i) for i in ids), stream.flush()]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_ids_stream_to_what_decode_gives(trained: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, trained.vocab_size + 5), max_size=30))
    assert "".join(streamed(trained, ids)) == trained.decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_no_broken_character_ever(trained: Tokenizer, text: str) -> None:
    parts = streamed(trained, trained.encode(text))
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


def test_a_character_comes_when_it_is_whole(trained: Tokenizer) -> None:
    ids = trained.encode("龘")
    assert len(ids) == 3
    assert streamed(trained, ids) == ["", "", "龘", ""]
    assert streamed(trained, ids[:2]) == ["", "", "\ufffd"]  # one mark for the whole broken part
    assert streamed(trained, [*ids[:2], *trained.encode("a")])[2] == "\ufffda"


def test_invalid_bytes_never_swallow_what_follows(trained: Tokenizer) -> None:
    byte = {trained.bytes_of(i): i for i in range(trained.vocab_size)}
    ids = [byte[b"\xff"], byte[b"\xe4"], byte[b"A"], byte[b"\xf0"], byte[b"\x9f"]]
    assert "".join(streamed(trained, ids)) == trained.decode(ids) == "\ufffd\ufffdA\ufffd"


def test_special_tokens_are_left_out_but_tags_stay(trained: Tokenizer) -> None:
    ids = trained.encode_raw("<think>a</think><|im_end|>")
    assert "".join(streamed(trained, ids)) == "<think>a</think>"
    shown = trained.stream_decoder(skip_special_tokens=False)
    assert "".join(map(shown.put, ids)) == "<think>a</think><|im_end|>"
    assert trained.decode(ids, skip_special_tokens=False) == "<think>a</think><|im_end|>"


def test_decoders_that_look_at_neighbours() -> None:
    vocab = {"[UNK]": 0, "[SEP]": 1, "play": 2, "##ing": 3, "ball": 4, ",": 5}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(Source("x", backend.to_str(), {"eos_token": "[SEP]"}))
    ids = tokenizer.encode("playing ball, playing ball") * 20
    assert (
        "".join(streamed(tokenizer, ids))
        == tokenizer.decode(ids)
        == "playing ball, playing ball " * 19 + ("playing ball, playing ball")
    )
