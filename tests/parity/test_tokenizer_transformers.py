"""The tokenizer directories that kllm writes and reads give the same ids in transformers."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from kllm.tokenizer.bpe import learn_merges
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import _spec, _word_arrays, train_tokenizer

transformers = pytest.importorskip("transformers")

LINES = [
    "The quick brown fox jumps over the lazy dog. It's 3.14159, isn't it?",
    "今天天气很好，我们去公园散步；晚上回家吃饭。《红楼梦》第一回",
    "def f(x, *, y=0):\n    # 注释\n\treturn {'a': [x, y]}\r\n\r\n",
    "emoji 🤖👍🏽 flags 🇨🇳 zwj 👩‍👩‍👧, café vs cafe\u0301, ﬁne, ½ ² Ⅷ ٣٤",
    "  leading,   many    spaces \t tabs\u00a0nbsp\u3000ideographic \n\n\n end  ",
    "Привет мир! ภาษาไทย こんにちは カタカナ 한국어 مرحبا שלום हिन्दी",
    "<think>not mine</think> <|im_end|> <|buffer3|> <|endoftext|>",
    "",
    "\x00\x01\x7f control \ufeff bom \u2028 line \u200b zero",
]


def lines(count: int = 400, seed: int = 0) -> list[str]:
    """Mixed lines and random joins of their parts."""
    rng = random.Random(seed)
    out = list(LINES)
    parts = [line[i : i + rng.randint(1, 9)] for line in LINES for i in range(0, len(line), 5)]
    while len(out) < count:
        out.append("".join(rng.choices(parts, k=rng.randint(1, 12))))
    return out


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(lines(), 900)[0]


@pytest.fixture(scope="module")
def saved(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tok")
    trained.save(directory)
    return directory


def same_ids(tokenizer: Tokenizer, other: object, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode_raw(text)
        assert other(text, add_special_tokens=False)["input_ids"] == ids, text  # type: ignore[operator]
        decoded = other.decode(ids, skip_special_tokens=False)  # type: ignore[attr-defined]
        assert decoded == tokenizer.decode(ids, skip_special_tokens=False), text


def test_autotokenizer_reads_our_files(trained: Tokenizer, saved: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    same_ids(trained, theirs, lines())
    assert theirs("a<|im_end|>b")["input_ids"] == trained.encode_raw("a<|im_end|>b")
    assert len(theirs) == trained.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 0, None)
    assert theirs.chat_template == trained.chat_template
    assert theirs.decode([1, 2, 0], skip_special_tokens=True) == ""
    assert theirs.decode(trained.encode_raw("<think>"), skip_special_tokens=True) == "<think>"


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral"])
def test_beside_every_model_type(saved: Path, trained: Tokenizer, tmp_path: Path, model_type: str) -> None:
    """Some model types make transformers rebuild the tokenizer from its own code."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    same_ids(trained, theirs, lines(60, seed=1))


def test_plain_text_equals_splitting_special_tokens(trained: Tokenizer, saved: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(saved, split_special_tokens=True)
    for text in ("a<|im_end|>b", "<|im_start|>system", "x <|endoftext|>"):
        assert theirs(text)["input_ids"] == trained.encode(text)


def test_merges_equal_the_librarys_trainer() -> None:
    """Given the same words, our merges are those of `tokenizers`' BpeTrainer, ties included."""
    rng = random.Random(3)
    syllables = ["ka", "to", "mi", "ran", "é", "s", "你", "好吗", "0", "==", "ing", "aa"]
    counts = Counter("".join(rng.choices(syllables, k=rng.choice([1, 2, 3, 3, 4, 8]))) for _ in range(20_000))
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\x1f", "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    library.train_from_iterator(("\x1f".join([word] * n) for word, n in counts.items()), trainer)
    learnt = learn_merges(*_word_arrays(Counter(counts)), tokens=1000 - 256, min_frequency=2)
    theirs = json.loads(library.to_str())["model"]["merges"]
    assert len(theirs) >= 744
    assert _spec([], learnt)["model"]["merges"] == theirs


# ---- tokenizers of the data kit

MINIMIND_IDS = {
    "<|im_start|>assistant\n": [1, 1388, 570, 811, 234],
    "<|im_start|>user\n": [1, 832, 311, 234],
    "<|im_end|>\n": [2, 234],
    "<think>\n\n</think>\n\n": [25, 234, 234, 26, 234, 234],
    "<think>\n": [25, 234],
    "<tool_call>": [21],
    "<answer>": [63, 1106, 122, 311, 65],
    "</answer>": [4573, 1106, 122, 311, 65],
    "你好，世界！": [1968, 294, 1950, 1364],
    "白日依山尽": [2178, 1053, 2472, 2302, 1932],
    "The sun sets in the west": [750, 3150, 2139, 118, 353, 309, 339, 611],
    "1234567": [6318, 4374, 6303],
    "def f(x):\n    return x+1": [2092, 341, 43, 123, 1647, 725, 1398, 1390, 46, 52],
    "<|im_start|>assistant\n    code": [1, 1388, 570, 811, 725, 1491],
    "\n": [234],
    "\n\n": [234, 234],
    "\t": [233],
    "\r\n": [237, 234],
    " hello": [582, 111, 722],
    "hello  world": [6170, 256, 1707],
}


def test_minimind_ids(data_kit: Path) -> None:
    tokenizer = Tokenizer.load(data_kit / "tokenizers/minimind")
    assert tokenizer.vocab_size == 6400 and len(tokenizer.added_tokens) == 36
    for text, ids in MINIMIND_IDS.items():
        assert tokenizer.encode_raw(text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


load = lru_cache(Tokenizer.load)

KIT = ["tokenizers/minimind", "tokenizers/smollm2", "tokenizers/qwen3", "models/stories260K"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "qwen3" in name else name for name in KIT]
)
def test_imported_tokenizers_agree_before_and_after_saving(data_kit: Path, tmp_path: Path, name: str) -> None:
    source = data_kit / name
    tokenizer = load(source)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    original = transformers.AutoTokenizer.from_pretrained(source)
    resaved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == len(original) == len(resaved)
    texts = lines(40, seed=2)
    for text in texts:
        ids = original(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode_raw(text) == ids, text
        assert resaved(text)["input_ids"] == original(text)["input_ids"], text
        assert tokenizer.encode_raw(text, add_special_tokens=True) == original(text)["input_ids"]
    assert tokenizer.eos_token_id == original.eos_token_id == resaved.eos_token_id
    assert tokenizer.bos_token_id == original.bos_token_id == resaved.bos_token_id
    if original.pad_token_id is not None:
        assert tokenizer.pad_token_id == original.pad_token_id == resaved.pad_token_id
    assert original.chat_template == resaved.chat_template == tokenizer.chat_template
    clean = [text for text in texts if "<" not in text]
    for text, ids in zip(clean, tokenizer.encode_batch(clean), strict=True):
        assert ids == tokenizer.encode_raw(text), text


@pytest.mark.parametrize("name", ["tokenizers/minimind", "models/stories260K", "tokenizers/gpt2"])
def test_kit_tokenizers_stream_what_they_decode(data_kit: Path, name: str) -> None:
    tokenizer = load(data_kit / name)
    for text in lines(60, seed=4):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream_decoder()
        whole = "".join(map(stream.put, ids)) + stream.flush()
        assert whole == tokenizer.decode(ids) == tokenizer._backend.decode(ids)
        assert whole == text


def test_gpt2_files(data_kit: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(data_kit / "tokenizers/gpt2")
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode_raw("<|endoftext|>") == [50256] == [tokenizer.eos_token_id]
    tokenizer.save(tmp_path)
    same_ids(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path), lines(40))


def test_stories260k_reference_text(data_kit: Path) -> None:
    home = data_kit / "models/stories260K"
    reference = json.loads((home / "greedy_reference.json").read_text())
    ids, text = reference["greedy_token_ids"], reference["greedy_text"]
    tokenizer = Tokenizer.load(home)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.put, ids)) + stream.flush() == tokenizer.decode(ids)
