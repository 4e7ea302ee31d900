"""One text under two tokenizers: the places that are paired have read the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chat_support import chat_tokenizer
from data_tools import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.errors import UserError
from kllm.tokenizer.align import Translator, same_places
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

TEXT = "the cat ate 猫 and naïve fish 🐟 where is the cat? 12 345"


@pytest.fixture(scope="module")
def other() -> Tokenizer:
    """Merges of another corpus: the same words fall apart elsewhere."""
    return train_tokenizer(
        ["there fishing catch 在哪里 345 andante"] * 5, 300, max_bytes=10**6, min_frequency=1
    )[0]


def ids_of(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode_raw(text), dtype=np.int64)


def check_pairs(source: Tokenizer, target: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Pairs of all places; each has read the same bytes, and no such place is left out."""
    translated = Translator(source, target)([ids])[0]
    pairs = same_places(np.ones(len(ids), dtype=bool), translated)
    assert (np.diff(pairs, axis=0) > 0).all()

    def prefixes(tokenizer: Tokenizer, tokens: np.ndarray) -> list[bytes]:
        pieces = [tokenizer.bytes_of(int(t)) for t in tokens]
        return [b"".join(pieces[: n + 1]) for n in range(len(pieces))]

    mine, theirs = prefixes(source, ids), prefixes(target, translated.tokens)
    assert mine[-1] == theirs[-1]
    assert all(mine[a] == theirs[b] for a, b in pairs)
    assert len(pairs) == len(set(mine) & set(theirs))
    return pairs


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(TEXT), min_size=1, max_size=40))
def test_paired_places_have_read_the_same(other: Tokenizer, text: str) -> None:
    source = chat_tokenizer()
    ids = ids_of(source, text)
    assert len(check_pairs(source, other, ids)) >= 1


def test_one_tokenizer_is_the_identity() -> None:
    tokenizer = chat_tokenizer()
    ids = ids_of(tokenizer, f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")
    translated = Translator(tokenizer, tokenizer)([ids])[0]
    assert translated.tokens.tolist() == ids.tolist() and translated.exact.all()
    for by in ("offsets", "order"):
        pairs = same_places(np.ones(len(ids), dtype=bool), translated, by)
        assert pairs.tolist() == [[n, n] for n in range(len(ids))]


def test_bytes_pair_at_every_end_of_a_token(tmp_path: Path) -> None:
    source, target = chat_tokenizer(), byte_tokenizer(tmp_path)
    ids = ids_of(source, TEXT)
    assert len(check_pairs(source, target, ids)) == len(ids)
    assert len(check_pairs(target, source, ids_of(target, TEXT))) == len(ids)


def test_control_tokens_are_carried_over(tmp_path: Path) -> None:
    """By their text, by their role, and else as the text that they are."""
    source = byte_tokenizer(tmp_path / "a")
    target = byte_tokenizer(tmp_path / "b", think=False)
    ids = ids_of(source, "<|im_start|>a\n<think>b</think>c<|im_end|>")
    translated = Translator(source, target)([ids])[0]
    assert target.decode(translated.tokens, skip_special_tokens=False) == source.decode(ids, False)
    assert translated.tokens[0] == target.special_tokens["<|im_start|>"]
    assert translated.tokens[-1] == target.eos_token_id
    assert len(translated.tokens) == len(ids) - 2 + len("<think></think>")
    pairs = same_places(np.ones(len(ids), dtype=bool), translated)
    assert len(pairs) == len(ids)  # after each token of the source there is a place in the other


def test_roles_stand_in_for_names(data_kit: Path, tmp_path: Path) -> None:
    llama = Tokenizer.load(data_kit / "models" / "stories260K")
    source = byte_tokenizer(tmp_path)
    ids = ids_of(source, "Once upon a time<|im_end|>")
    translated = Translator(source, llama)([ids])[0]
    assert translated.tokens[0] == llama.bos_token_id, "its own start of text"
    assert translated.tokens[-1] == llama.eos_token_id
    assert llama.decode(translated.tokens) == "Once upon a time"
    pairs = same_places(np.ones(len(ids), dtype=bool), translated)
    assert pairs[-1].tolist() == [len(ids) - 1, len(translated.tokens) - 1]
    # each text token of the teacher ends where some byte does; its start of text answers nothing
    assert len(pairs) >= len(translated.tokens) - 2


@pytest.mark.parametrize(
    ("one", "two"), [("minimind", "smollm2"), pytest.param("qwen3", "minimind", marks=pytest.mark.slow)]
)
def test_published_vocabularies(data_kit: Path, one: str, two: str) -> None:
    a, b = (Tokenizer.load(data_kit / "tokenizers" / name) for name in (one, two))
    text = f"<|im_start|>user\n{TEXT}<|im_end|>\n"
    for source, target in ((a, b), (b, a)):
        ids = ids_of(source, text)
        assert len(check_pairs(source, target, ids)) > 12
        translated = Translator(source, target)([ids])[0]
        assert translated.tokens.tolist() == target.encode_raw(text)


def test_half_characters_and_unknown_ids(other: Tokenizer) -> None:
    """A row may start in the middle of a character: no exact place inside that run but its end."""
    source = chat_tokenizer()
    ids = ids_of(source, "🐟 fish<|im_end|>")
    cut = next(n for n in range(1, len(ids)) if source.bytes_of(int(ids[n]))[0] & 0xC0 == 0x80)
    broken = np.concatenate((ids[cut:], [source.vocab_size + 7]))
    translated = Translator(source, other)([broken])[0]
    pairs = same_places(np.ones(len(broken), dtype=bool), translated)
    ends = [broken[a] for a, _ in pairs]
    assert source.eos_token_id in ends and translated.tokens[pairs[-1][1]] == other.eos_token_id
    assert len(pairs) < len(broken) - 1
    empty = Translator(source, other)([np.array([source.vocab_size + 1]), np.empty(0, dtype=np.int64)])
    assert [len(t.tokens) for t in empty] == [0, 0]
    for by in ("offsets", "order"):
        assert same_places(np.ones(1, dtype=bool), empty[0], by).shape == (0, 2)


def test_in_order_as_published(tmp_path: Path) -> None:
    """Stretch by stretch, first with first, until the shorter ends."""
    source, target = chat_tokenizer(), byte_tokenizer(tmp_path)
    ids = ids_of(source, "the cat<|im_end|>the fish")
    end = int(np.flatnonzero(ids == source.eos_token_id)[0])
    labelled = np.zeros(len(ids), dtype=bool)
    labelled[1:end] = True
    labelled[end + 1 :] = True
    translated = Translator(source, target)([ids])[0]
    pairs = same_places(labelled, translated, "order")
    assert pairs[:, 0].tolist() == np.flatnonzero(labelled).tolist()
    first = translated.source_read[1]
    start = int(np.searchsorted(translated.read, first))
    assert pairs[: end - 1, 1].tolist() == list(range(start, start + end - 1))
    assert target.bytes_of(int(translated.tokens[pairs[end - 1, 1]]))[0] in b"the"


def test_word_pieces_are_refused(tmp_path: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[SEP]": 3}, unk_token="[UNK]")
    )
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="which text each token"):
        Translator(Tokenizer.load(tmp_path), chat_tokenizer())
