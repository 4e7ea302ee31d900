"""Reading tokenizer directories: what is understood, and each fault as one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kllm.errors import KllmError, UserError
from kllm.tokenizer.inspect import inspect, token_texts
from kllm.tokenizer.source import Source
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

TEXTS = ["the cat and the dog sat on the mat. ", "猫和狗坐在垫子上。", "x = [1, 22, 333]\n"] * 30


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)[0]


@pytest.fixture
def home(trained: Tokenizer, tmp_path: Path) -> Path:
    trained.save(tmp_path / "tok")
    return tmp_path / "tok"


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


def refused(match: str, *args: Any, **kwargs: Any) -> UserError:
    with pytest.raises(UserError, match=match) as caught:
        Tokenizer.load(*args, **kwargs)
    assert caught.value.where and "\n" not in str(caught.value)
    return caught.value


def test_what_is_not_there(tmp_path: Path) -> None:
    refused("no such tokenizer directory", tmp_path / "nowhere")
    refused("no tokenizer.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert "convert" in str(refused("no tokenizer.json", tmp_path).hint)
    (tmp_path / "a.txt").write_text("x")
    refused("not a tokenizer", tmp_path / "a.txt")


def test_a_hub_name_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kllm.export.tokenizers import load_tokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KllmError) as caught:
        load_tokenizer("nobody/nothing-here")
    assert caught.value.where == "nobody/nothing-here" and "\n" not in str(caught.value)


def test_broken_files(home: Path) -> None:
    good = (home / "tokenizer.json").read_text()
    (home / "tokenizer.json").write_text(good[:3000])
    assert "tokenizer.json:" in str(refused("broken JSON", home).where)
    (home / "tokenizer.json").write_text("[1]")
    refused("not a JSON object", home)
    (home / "tokenizer.json").write_text('{"a": 1}')
    refused("no 'model'", home)
    (home / "tokenizer.json").write_text('{"model": {"type": "BPE"}, "added_tokens": []}')
    refused("cannot read it", home)
    (home / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    refused("not UTF-8", home)
    (home / "tokenizer.json").write_text(good)
    (home / "tokenizer_config.json").write_text("{,}")
    assert "tokenizer_config.json:1" in str(refused("broken JSON", home).where)


def test_no_end_token(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert "eos_token" in str(refused("no end-of-text token", tmp_path).hint)


def test_chat_template_sources(home: Path, tmp_path: Path) -> None:
    (home / "chat_template.jinja").unlink()
    edit(home / "tokenizer_config.json", chat_template="from config")
    assert Tokenizer.load(home).chat_template == "from config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit(home / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.load(home).chat_template == "plain"
    (home / "chat_template.jinja").write_text("from file")
    assert Tokenizer.load(home).chat_template == "from file"
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ messages }}")
    assert Tokenizer.load(home, chat_template=str(mine)).chat_template == "{{ messages }}"
    assert Tokenizer.load(home, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    mine.write_text("a\n{% if %}")
    assert str(refused("syntax error", home, chat_template=str(mine)).where).endswith("mine.jinja:2")
    refused("cannot be read", home, chat_template=str(tmp_path / "none.jinja"))


def test_special_ids_follow_the_config(home: Path) -> None:
    edit(home / "tokenizer_config.json", pad_token=None, bos_token={"content": "<|im_start|>"})
    tokenizer = Tokenizer.load(home)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.bos_token_id == 1
    assert tokenizer.role_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (home / "generation_config.json").write_text('{"eos_token_id": [2, 0, 7, 999999]}')
    assert Tokenizer.load(home).stop_token_ids == (2, 0, 7)
    (home / "tokenizer_config.json").unlink()
    (home / "special_tokens_map.json").unlink()
    assert Tokenizer.load(home).eos_token_id == 2


def test_added_tokens_named_only_in_the_config_count(home: Path) -> None:
    listed = json.loads((home / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    listed["320"] = {"content": "<|extra|>", "special": True, "normalized": False}
    edit(home / "tokenizer_config.json", added_tokens_decoder=listed)
    tokenizer = Tokenizer.load(home)
    assert tokenizer.vocab_size == 321
    assert tokenizer.encode_raw("<|extra|>") == [320]
    assert 320 not in tokenizer.encode("<|extra|>")


def test_stage_directory_and_file_path(home: Path, tmp_path: Path) -> None:
    home.rename(tmp_path / "final")
    assert Tokenizer.load(tmp_path).vocab_size == 320
    assert Tokenizer.load(tmp_path / "final" / "tokenizer.json").vocab_size == 320


def test_text_never_becomes_an_added_token(trained: Tokenizer) -> None:
    for token, index in trained.added_tokens.items():
        text = f"a{token} {token}b"
        ids = trained.encode(text)
        assert index not in ids and trained.decode(ids) == text
        assert trained.encode_raw(text).count(index) == 2
    assert trained.encode_batch(["", "a<think>"]) == [[], trained.encode("a<think>")]


def test_whole_word_models_hide_added_tokens() -> None:
    """Unigram and ignore_merges models match vocabulary entries as they stand."""
    unigram = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "</s>a")], 0)
    )
    unigram.add_special_tokens(["</s>"])
    merging = tokenizers.Tokenizer(
        models.BPE({"</s>": 0, **{c: i + 1 for i, c in enumerate("</s>a")}}, [], ignore_merges=True)
    )
    merging.add_special_tokens(["</s>"])
    for backend in (unigram, merging):
        tokenizer = Tokenizer(Source("x", backend.to_str(), {"eos_token": "</s>"}))
        eos = tokenizer.eos_token_id
        assert eos not in tokenizer.encode("a</s>") and len(tokenizer.encode("a</s>")) == 5
        assert tokenizer.encode_raw("a</s>")[-1] == eos


def test_white_space_tokens_are_text() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"</s>": 0, "a": 1, " ": 2}, []))
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["    "])
    tokenizer = Tokenizer(Source("x", backend.to_str(), {"eos_token": "</s>"}))
    assert tokenizer.encode("a    a") == [1, 3, 1]
    assert "    " not in tokenizer.control_tokens


def test_token_bytes(trained: Tokenizer) -> None:
    sizes = trained.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (trained.vocab_size,)
    assert sizes[:3].tolist() == [0, 0, 0]
    assert sizes[trained.added_tokens["<think>"]] == len("<think>")
    text = "猫和狗 the cat 🤖"
    assert sizes[trained.encode(text)].sum() == len(text.encode())


def test_inspect(trained: Tokenizer) -> None:
    coarse = train_tokenizer(TEXTS, 282)[0]
    rows = inspect({"fine": trained, "coarse": coarse}, {"en": TEXTS[:1] * 3, "zh": [TEXTS[1], "\ufeff龘"]})
    fine, rough = rows
    assert [row["name"] for row in rows] == ["fine", "coarse"]
    english = fine["languages"]["en"]
    assert english["tokens"] == 3 * len(trained.encode(TEXTS[0])) and english["round_trip"] == 1.0
    assert english["bytes_per_token"] == pytest.approx(len(TEXTS[0]) / len(trained.encode(TEXTS[0])))
    assert english["bytes_per_token"] > rough["languages"]["en"]["bytes_per_token"]
    assert fine["versus"]["coarse"]["tokens"]["en"] < 1 < rough["versus"]["fine"]["tokens"]["en"]
    assert fine["versus"]["coarse"]["shared"] == rough["versus"]["fine"]["shared"] == 257
    assert "在垫" in fine["longest_han"] and 0 < fine["vocab_used"] < 1
    assert fine["coverage"][1000] == pytest.approx(1.0)


def test_inspect_tells_a_lossy_tokenizer() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "cat": 2}, "[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    figures = inspect({"x": Tokenizer(Source("x", backend.to_str(), {}))}, {"en": ["cat", "Cat dog"]})[0][
        "languages"
    ]
    assert figures["en"]["round_trip"] == 0.5 and figures["en"]["failures"] == ["Cat dog"]


def test_token_texts(trained: Tokenizer) -> None:
    assert "".join(token_texts(trained, trained.encode("the cat"))) == "the cat"
    assert token_texts(trained, trained.encode("🤖")) == ["<f0>", "<9f>", "<a4>", "<96>"]
    assert token_texts(trained, [2]) == ["<|im_end|>"]


def sentencepiece_like(strip: bool = True) -> Tokenizer:
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "你", "\n"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(vocab)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(Source("x", backend.to_str(), {"bos_token": "<s>", "eos_token": "</s>"}))


def test_sentencepiece_spaces() -> None:
    tokenizer = sentencepiece_like()
    for text in ("a b", " a", "é a", "你 <s> b\n", "龘🤖"):
        ids = tokenizer.encode(text)
        assert 1 not in ids
        assert tokenizer.decode(ids) == text == tokenizer._backend.decode(ids)
    assert tokenizer.encode_raw("a", add_special_tokens=True)[0] == 1
    ids = tokenizer.encode("b a")
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.put, ids)) + stream.flush() == "b a"
    later = tokenizer.stream_decoder(prompt=ids)
    more = [tokenizer.token_to_id("▁a")]
    assert later.put(more[0]) == " a"  # after a prompt the space belongs to the text
    assert tokenizer.decode(more) == "a"
