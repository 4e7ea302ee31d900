"""Training a tokenizer: merges, bounds, determinism, what the file holds."""

from __future__ import annotations

import itertools
import json
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kllm.tokenizer.words as words_module
from kllm.errors import UserError
from kllm.tokenizer.bpe import learn_merges
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import _word_arrays, train_tokenizer
from kllm.tokenizer.words import PATTERN, WordCounter

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.\nIt is 1987.",
    "今天天气很好，我们去公园散步。今天天气不好，我们在家看书。",
    "def main(x):\n    return x + 1\n\nprint(main(41))",
] * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)[0]


def reference_merges(counts: dict[str, int], tokens: int, least: int) -> list[tuple[bytes, bytes]]:
    """BPE by recounting everything after each merge; ties to the symbols made first."""
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    rank = {bytes([b]): i for i, b in enumerate(_alphabet_order())}
    merges: list[tuple[bytes, bytes]] = []
    while len(rank) < 256 + tokens:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, n in words:
            for pair in itertools.pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], rank[p[0]], rank[p[1]]))
        if pairs[best] < least:
            break
        if best not in merges:
            merges.append(best)
        rank.setdefault(best[0] + best[1], len(rank))
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def _alphabet_order() -> list[int]:
    from kllm.tokenizer.pieces import byte_alphabet

    alphabet = byte_alphabet()
    return sorted(range(256), key=lambda b: ord(alphabet[b]))


def learnt(counts: dict[str, int], tokens: int, least: int) -> list[tuple[bytes, bytes]]:
    texts = [bytes([b]) for b in _alphabet_order()]
    out = []
    for first, second, made in learn_merges(
        *_word_arrays(Counter(counts)), tokens=tokens, min_frequency=least
    ):
        out.append((texts[first], texts[second]))
        if made == len(texts):
            texts.append(texts[first] + texts[second])
    return out


def test_merges_equal_plain_recounting() -> None:
    rng = random.Random(5)
    for _ in range(60):
        letters = rng.choice(["ab", "abc", "aé你", "abcdef"])
        words = ["".join(rng.choices(letters, k=rng.randint(1, 14))) for _ in range(rng.randint(3, 60))]
        counts = {word: rng.randint(1, 9) for word in words}
        tokens, least = rng.randint(1, 60), rng.choice([1, 2, 6])
        assert learnt(counts, tokens, least) == reference_merges(counts, tokens, least)


def test_same_text_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), 400)[0].save(tmp_path / name)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    train_tokenizer(TEXTS[::-1], 400)[0].save(tmp_path / "c")  # the order of documents does not matter either
    assert (tmp_path / "c/tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()


def test_special_tokens_have_their_places(trained: Tokenizer) -> None:
    named = list(trained.added_tokens.items())
    assert named[:3] == [("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)]
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    assert [name for name, _ in named[3:9]] == tags
    assert named[9:] == [(f"<|buffer{i + 1}|>", 9 + i) for i in range(16)]
    assert set(trained.special_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert (trained.eos_token_id, trained.pad_token_id, trained.eot_token_id) == (2, 0, 0)
    assert trained.bos_token_id is None
    assert trained.stop_token_ids == (2, 0)
    assert trained.vocab_size == 400


def test_the_saved_file_names_the_known_pattern(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    split, level = spec["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": PATTERN} and split["behavior"] == "Isolated"
    assert level["type"] == "ByteLevel" and not level["use_regex"] and not level["add_prefix_space"]
    assert spec["normalizer"] is None and spec["decoder"]["type"] == "ByteLevel"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["eos_token"] == "<|im_end|>"


def test_digits_stand_alone(trained: Tokenizer) -> None:
    assert len(trained.encode("19871987")) == 8


def test_saved_and_loaded_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == trained.fingerprint
    assert [again.encode(t) for t in TEXTS[:3]] == [trained.encode(t) for t in TEXTS[:3]]
    other = train_tokenizer([*TEXTS, "zebra zebra zebra"], 400)[0]
    assert other.fingerprint != trained.fingerprint
    assert Tokenizer.load(tmp_path, chat_template="{{ messages }}").fingerprint != trained.fingerprint


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not set(ids) & set(trained.added_tokens.values())
    assert int(trained.token_bytes()[ids].sum()) == len(text.encode()) if ids else not text


def test_han_runs_are_cut_while_counting() -> None:
    counter = WordCounter(han_cut=2)
    counter.add("我们今天去北京。好的")
    words = counter.finish()
    assert dict(words) == {"我们": 1, "今天": 1, "去北": 1, "京": 1, "。好的": 1}
    counter = WordCounter(han_cut=0)
    counter.add("我们今天去北京。好的")
    assert dict(counter.finish()) == {"我们今天去北京": 1, "。好的": 1}


def test_plain_words_are_counted_as_the_pattern_splits_them() -> None:
    regex = pytest.importorskip("regex")
    texts = [
        "Hello, world! It's 12 o'clock; she'll   come.\n\n  def f(x):\n\treturn x\r\n",
        "naïve café — “quoted” … Привет, мир! مرحبا 3½ x² (a+b)=c // end",
        "a b  c   d\n\n\n e \n f's 'S 'Re",
        "中文，夹 English words 与 数字123。",
    ]
    for text in texts * 2:
        counter = WordCounter(han_cut=0)
        counter.add(text)
        assert counter.finish() == Counter(regex.findall(PATTERN, text)), text


def test_no_word_grows_without_end() -> None:
    rng = random.Random(1)
    blob = "".join(rng.choices("ABCDEFabcdef", k=50_000))
    thai = "".join(rng.choices([chr(c) for c in range(0xE01, 0xE2F)], k=20_000))
    counter = WordCounter()
    for text in (blob, thai, "=" * 10_000, " " * 10_000 + "x", "\n" * 10_000, "ー" * 5000, "ab " * 4000):
        counter.add(text)
    assert max(map(len, counter.finish())) <= 33


def unspaced(count: int, seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    letters = [chr(0x4E00 + i) for i in range(3000)]
    for _ in range(count):
        yield "".join(rng.choices(letters, k=300))


def test_the_word_table_is_bounded() -> None:
    counter = WordCounter(limit=5000)
    common = "国家社会" * 50
    for text in unspaced(200):
        counter.add(text + common)
        assert len(counter.counts) <= 5000
    words = counter.finish()
    assert counter.pruned > 0
    assert words["国家"] > 9000 and words["社会"] > 9000  # what is frequent survives


def test_long_words_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "_BYTES", 200)
    counter = WordCounter()
    counter.add("abcdefghij " * 3 + " ".join(f"{'x' * n}y" for n in range(20)))
    words = counter.finish()
    assert words[" abcdefghij"] == 2
    assert 150 < sum(map(len, words)) <= 200 and counter.pruned > 0


def test_memory_does_not_follow_the_text() -> None:
    def peak(count: int) -> int:
        counter = WordCounter(limit=20_000)
        tracemalloc.start()
        for text in unspaced(count):
            counter.add(text)
        counter.finish()
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(5)  # tables of character classes
    assert peak(900) < 1.5 * peak(300)


def test_a_huge_text_is_counted_in_pieces() -> None:
    whole = WordCounter()
    whole.add("the cat sat. " * 60_000)
    counts = whole.finish()
    assert counts[" cat"] == 60_000 and sum(len(w) * n for w, n in counts.items()) == 13 * 60_000


def test_the_cap_is_kept_and_reported() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield TEXTS[1]

    _, report = train_tokenizer(endless(), 300, max_bytes=10_001)
    assert report.capped and 10_001 - 4 < report.bytes_read <= 10_001
    assert any("max_bytes" in note for note in report.notes())
    _, report = train_tokenizer(TEXTS, 300)
    assert not report.capped and report.bytes_read == sum(len(t.encode()) for t in TEXTS)
    assert report.notes() == []


def test_a_small_text_gives_a_small_vocabulary_and_says_so() -> None:
    tokenizer, report = train_tokenizer(["abab abab"], 1000)
    assert tokenizer.vocab_size == report.vocab_size < 1000
    assert any("1,000" in note for note in report.notes())


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    texts = ["".join(t) for t in unspaced(2000)]
    train_tokenizer(texts, 800, progress=lambda *event: seen.append(event))
    assert {phase for phase, _, _ in seen} == {"count", "merge"}
    assert all(done <= total for _, done, total in seen)


def test_errors() -> None:
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 500)
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(TEXTS, 280)
    with pytest.raises(UserError, match="syntax error"):
        train_tokenizer(TEXTS, 400, chat_template="{% if %}")


def test_half_surrogates_do_no_harm(trained: Tokenizer) -> None:
    tokenizer, _ = train_tokenizer([*TEXTS, "broken \ud800 text"], 400)
    assert tokenizer.decode(tokenizer.encode("a\udc00b")) == "a\ufffdb"
    assert re.fullmatch("x\ufffd", trained.decode(trained.encode_raw("x\ud83d")))
