"""Names of tokens and the API's log-probability objects: unique, reversible, exact, placed in the text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from serve_bigrams import sentencepiece, tokenizer

from kllm.engine.params import TokenLogprob
from kllm.serve.logprobs import (
    FLOOR,
    CompletionLogprobs,
    chat_entry,
    joined,
    text_offsets,
    token_name,
    token_of_name,
)
from kllm.tokenizer.tokenizer import Tokenizer


def entries(ids: list[int], lp: float = -1.0, top: tuple[tuple[int, float], ...] = ()) -> list[TokenLogprob]:
    return [TokenLogprob(i, lp, top) for i in ids]


@pytest.mark.parametrize("make", [tokenizer, sentencepiece])
def test_names_are_unique_and_lead_back(make) -> None:
    words = make()
    names = [token_name(words, i) for i in range(words.vocab_size)]
    assert len(set(names)) == words.vocab_size
    assert [token_of_name(words, name) for name in names] == list(range(words.vocab_size))


def test_half_characters_are_named_by_their_bytes() -> None:
    words = tokenizer()
    ids = words.encode("甲")
    assert [token_name(words, i) for i in ids] == [r"bytes:\xe7", r"bytes:\x94", r"bytes:\xb2"]


def test_of_two_tokens_with_the_same_bytes_the_text_token_has_the_text() -> None:
    words = sentencepiece()
    assert token_name(words, 5) == "A"
    assert token_name(words, 3) == r"bytes:\x41"


def test_names_by_id_and_for_ids_that_only_the_model_has() -> None:
    words = tokenizer()
    assert token_name(words, 7, as_id=True) == "token_id:7"
    assert token_name(words, 100_000) == "token_id:100000"
    assert token_of_name(words, "token_id:7") == 7
    assert token_of_name(words, "no such token") is None


def test_real_vocabularies_have_no_collision(data_kit: Path) -> None:
    for name in ("minimind", "gpt2"):
        tokenizer = Tokenizer.load(data_kit / "tokenizers" / name)
        names = {token_name(tokenizer, i) for i in range(tokenizer.vocab_size)}
        assert len(names) == tokenizer.vocab_size


def test_chat_entries_carry_raw_bytes_and_sorted_alternatives() -> None:
    words = tokenizer()
    ids = words.encode("甲 cat")
    top = ((ids[0], -0.25), (ids[1], -2.5))
    found = [chat_entry(words, e) for e in entries(ids, -0.25, top)]
    assert bytes(b for item in found for b in item["bytes"]).decode() == "甲 cat"
    assert found[0]["token"] == "\ufffd"
    assert found[0]["top_logprobs"] == [
        {"token": "\ufffd", "logprob": -0.25, "bytes": [0xE7]},
        {"token": "\ufffd", "logprob": -2.5, "bytes": [0x94]},
    ]
    assert chat_entry(words, entries(ids)[0], as_ids=True)["token"] == f"token_id:{ids[0]}"


def test_a_control_token_adds_no_bytes_unless_it_is_shown() -> None:
    words = tokenizer()
    eos = words.eos_token_id
    hidden = chat_entry(words, TokenLogprob(eos, -1.0))
    assert hidden["token"] == words.role_tokens["eos_token"]
    assert hidden["bytes"] == []
    shown = chat_entry(words, TokenLogprob(eos, -1.0), shown=(eos,))
    assert bytes(shown["bytes"]).decode() == words.role_tokens["eos_token"]


def test_numbers_survive_json_to_the_bit_and_infinity_has_a_floor() -> None:
    words = tokenizer()
    values = torch.log_softmax(torch.randn(50, generator=torch.Generator().manual_seed(3)), -1).tolist()
    for value in values:
        entry = chat_entry(words, TokenLogprob(5, value, ((5, value),)))
        back = json.loads(json.dumps(entry))
        assert back["logprob"] == back["top_logprobs"][0]["logprob"] == value
    for value in (-math.inf, math.nan, -1e6):
        assert chat_entry(words, TokenLogprob(5, value))["logprob"] == FLOOR


def test_the_drawn_token_is_always_among_the_alternatives() -> None:
    words = tokenizer()
    a, b = words.encode("甲")[:2]
    part = CompletionLogprobs(words).add([
        TokenLogprob(a, -3.0, ((b, -0.5),)), TokenLogprob(b, -0.5, ((b, -0.5),)), TokenLogprob(a, -2.0),
    ])  # fmt: skip
    assert part["top_logprobs"] == [
        {r"bytes:\x94": -0.5, r"bytes:\xe7": -3.0}, {r"bytes:\x94": -0.5}, {r"bytes:\xe7": -2.0},
    ]  # fmt: skip


def test_offsets_count_characters_of_the_text_across_parts() -> None:
    words = tokenizer()
    text = "the 你é cat"
    ids = words.encode(text)
    writer = CompletionLogprobs(words, start=10)
    parts = [writer.add(entries([i])) for i in [*ids, words.eos_token_id]]
    whole = parts[0]
    for part in parts[1:]:
        whole = joined(whole, part)
    data = [words.bytes_of(i) for i in ids]
    for i, at in enumerate(whole["text_offset"][:-1]):
        before = b"".join(data[:i]).decode("utf-8", "ignore")
        assert at == 10 + len(before), (i, whole["tokens"])
    assert whole["text_offset"][-1] == 10 + len(text)
    assert whole["tokens"][-1] == words.role_tokens["eos_token"]


def test_a_broken_character_counts_before_the_token_that_shows_it() -> None:
    words = tokenizer()
    half, cat = words.encode("甲")[0], words.encode("cat")
    part = CompletionLogprobs(words).add(entries([half, *cat]))
    assert part["text_offset"][:2] == [0, 1]  # the text is "\ufffdcat"


def test_an_echoed_prompt_has_nulls_first_and_offsets_in_its_own_text() -> None:
    words = tokenizer()
    text = "<|im_start|>the cat"
    ids = words.encode_raw(text)
    part = CompletionLogprobs(words).prompt(ids, [None, *entries(ids[1:])], text)
    assert part["token_logprobs"][0] is None and part["top_logprobs"][0] is None
    assert len(part["tokens"]) == len(ids)
    assert "".join(part["tokens"]) == text
    starts = part["text_offset"]
    cut = [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert cut == part["tokens"]


def test_a_start_token_that_is_not_in_the_text_has_no_width() -> None:
    words = sentencepiece()
    assert text_offsets(words, [1, 5, 7], "A A") == [0, 0, 1]
    assert text_offsets(words, [1, 5, 7], "<s>A A") == [0, 3, 4]
    assert text_offsets(words, [5, 7, 7], "A") == [0, 1, 1]  # of another origin: never past its end
