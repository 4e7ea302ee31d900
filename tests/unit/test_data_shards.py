"""Shards: what is stored, when it is built again, what is held out, and what counts as a bad row."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_tools import Source, byte_tokenizer, chat, write_jsonl

from kllm.data import build as build_module
from kllm.data.encode import SYSTEM_PROMPTS
from kllm.data.loader import PackedSource
from kllm.data.shards import Prepared, Shard, prepare
from kllm.errors import KllmError, UserError
from kllm.tokenizer.tokenizer import Tokenizer

EOT, START, END, THINK, UNTHINK = range(5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[Any] | Path, kind: Any = "text", **options: Any
) -> Prepared:
    file = rows if isinstance(rows, Path) else write_jsonl(tmp_path / "data.jsonl", rows)
    settled = {"cache_dir": tmp_path / "cache", "seq_len": 64, "val_fraction": 0.0, **options}
    return prepare([Source(str(file))], tokenizer, kind=kind, **settled)


def docs(shard: Shard, tokenizer: Tokenizer) -> list[str]:
    bounds = zip(shard.offsets, shard.offsets[1:], strict=False)
    return [tokenizer.decode(shard.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in bounds]


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"document {number}"} for number in range(count)]


# ---- what is stored


def test_texts_end_with_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = run(tmp_path, tokenizer, [{"text": "one"}, {"text": "二"}])
    (shard,) = prepared.train
    assert docs(shard, tokenizer) == ["one<|endoftext|>", "二<|endoftext|>"]
    assert shard.mask is None and shard.tokens.dtype == np.uint16
    assert shard.meta["tokens"] == 8 and shard.meta["trained_tokens"] == 6 and shard.meta["bytes"] == 6
    assert prepared.val.docs == 0


def test_control_words_in_texts_are_plain_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (shard,) = run(tmp_path, tokenizer, [{"text": "<|endoftext|>x<|im_end|>"}]).train
    assert (shard.tokens == EOT).sum() == 1 and END not in shard.tokens


def test_long_texts_are_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "".join(f"line {number} of a long text\n" for number in range(20_000))
    (shard,) = run(tmp_path, tokenizer, [{"text": text}, {"text": "x" * 250_000}]).train
    assert docs(shard, tokenizer) == [f"{text}<|endoftext|>", "x" * 250_000 + "<|endoftext|>"]


def test_text_files_end_only_at_their_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "a word and another\n\n" * 10_000
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(text.encode()))
    (shard,) = run(tmp_path, tokenizer, tmp_path / "book.txt.gz").train
    assert shard.docs > 1
    assert "".join(docs(shard, tokenizer)) == f"{text}<|endoftext|>"
    assert np.flatnonzero(shard.tokens == EOT).tolist() == [len(shard.tokens) - 1]


def test_chats_have_the_assistants_words_as_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (shard,) = run(tmp_path, tokenizer, [chat("hi", "hello")], "chat").train
    assert docs(shard, tokenizer) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    ]
    assert shard.mask is not None
    assert (
        tokenizer.decode(shard.tokens[shard.mask == 1].tolist(), skip_special_tokens=False)
        == "hello<|im_end|>"
    )
    assert shard.meta["trained_tokens"] == 6 and shard.meta["bytes"] == 7


def test_reasoning_gives_the_same_tokens_inside_and_outside_the_content(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    inside = chat("q", "<think>\nwhy\n</think>\n\nso")
    outside = chat("q", "so")
    outside["messages"][1]["reasoning_content"] = "why"
    (shard,) = run(tmp_path, tokenizer, [inside, outside], "chat").train
    first, second = docs(shard, tokenizer)
    assert first == second and "<think>\nwhy\n</think>\n\nso" in first


def test_reasoning_survives_a_template_that_does_not_know_it(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% endfor %}"
    )
    plain = byte_tokenizer(tmp_path / "plain", template=template)
    row = chat("q", "so")
    row["messages"][1]["reasoning_content"] = "why"
    (shard,) = run(tmp_path, plain, [row], "chat").train
    assert "<think>\nwhy\n</think>\n\nso" in docs(shard, plain)[0]


def test_big_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    big = byte_tokenizer(tmp_path / "big", extra_id=70_000)
    (shard,) = run(tmp_path, big, texts(3)).train
    assert shard.tokens.dtype == np.uint32
    assert docs(shard, big)[0] == "document 0<|endoftext|>"


# ---- vocabulary and dtype


def test_ids_and_vocabulary_must_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (shard,) = run(tmp_path, tokenizer, texts(3)).train
    shard.check_vocab(65_536)
    with pytest.raises(UserError, match="16-bit token shards cannot hold a vocabulary of 65537"):
        shard.check_vocab(65_537)
    with pytest.raises(UserError, match=r"the data has token id \d+, the vocabulary only 100 entries"):
        shard.check_vocab(100)


def test_an_id_beyond_the_dtype_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lying = byte_tokenizer(tmp_path / "big", extra_id=70_000)
    lying.vocab_size = 1000
    monkeypatch.setattr(lying, "encode_batch", lambda texts: [[70_000, 1] for _ in texts])
    with pytest.raises(UserError, match="token id 70000 does not fit the 16-bit shard"):
        run(tmp_path, lying, texts(3))


# ---- the cache


def test_shards_are_built_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, tokenizer, texts(20), val_fraction=0.2)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
    second = run(tmp_path, tokenizer, texts(20), val_fraction=0.2)
    assert [row["cached"] for row in (first.stats["sources"][0], second.stats["sources"][0])] == [False, True]
    assert second.train[0].tokens.tolist() == first.train[0].tokens.tolist()
    assert second.val.docs == first.val.docs > 0
    different = {"cached", "seconds", "sources"}
    assert {k: v for k, v in first.stats.items() if k not in different} == {
        k: v for k, v in second.stats.items() if k not in different
    }


def test_data_tokenizer_and_options_make_another_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = byte_tokenizer(tmp_path / "other", extra_id=300)
    rows = [chat("q", "a" * n) for n in range(1, 30)]
    prepared = [
        run(tmp_path, tokenizer, rows, "chat"),
        run(tmp_path, other, rows, "chat"),
        run(tmp_path, tokenizer, rows, "chat", seq_len=65),
        run(tmp_path, tokenizer, rows, "chat", val_fraction=0.1),
        run(tmp_path, tokenizer, rows, "chat", system_prompt_ratio=0.5, seq_len=1024),
        run(tmp_path, tokenizer, rows, "chat", max_bytes=500),
        run(tmp_path, tokenizer, rows[:-1], "chat"),
    ]
    assert len({p.train[0].meta["hash"] for p in prepared}) == len(prepared)
    assert run(tmp_path, tokenizer, rows, "chat").stats["sources"][0]["cached"]
    # A text's tokens do not depend on seq_len.
    run(tmp_path, tokenizer, texts(3))
    assert run(tmp_path, tokenizer, texts(3), seq_len=128).stats["sources"][0]["cached"]


def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "BATCH_DOCS", 2)
    with pytest.raises(UserError):
        run(tmp_path, tokenizer, [*texts(5), {"text": ""}])
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []


def test_torn_builds_are_removed_and_damaged_ones_rebuilt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run(tmp_path, tokenizer, texts(5))
    (folder,) = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    torn = folder.with_name(f".{folder.name}.tmp-999999999")
    torn.mkdir()
    (folder / "train.tokens.bin").write_bytes(b"short")
    again = run(tmp_path, tokenizer, texts(5))
    assert not again.stats["sources"][0]["cached"] and not torn.exists()
    assert docs(again.train[0], tokenizer)[0] == "document 0<|endoftext|>"


def test_a_full_disk_is_one_line(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(build_module._Writer, "add", full)
    with pytest.raises(KllmError, match="no space left on the device") as caught:
        run(tmp_path, tokenizer, texts(5))
    assert caught.value.exit_code == 1


# ---- the validation split


def test_the_split_depends_on_the_record_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = texts(400)
    first = run(tmp_path, tokenizer, rows, val_fraction=0.1, seed=1)
    second = run(tmp_path, tokenizer, [*reversed(rows), *rows[:50]], val_fraction=0.1, seed=2)
    held = set(docs(first.val, tokenizer))
    assert 20 < len(held) < 70
    assert set(docs(second.val, tokenizer)) == held
    assert not held & set(docs(second.train[0], tokenizer))
    assert first.train[0].docs + first.val.docs == 400


def test_small_data_still_gives_a_validation_record(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*texts(12), *texts(12)]
    prepared = run(tmp_path, tokenizer, rows, val_fraction=1e-6)
    held = docs(prepared.val, tokenizer)
    assert len(set(held)) == 1
    trained = docs(prepared.train[0], tokenizer)
    assert sorted(held + trained) == sorted(f"{row['text']}<|endoftext|>" for row in rows)
    assert not set(held) & set(trained), "copies of a held-out record are held out too"
    assert run(tmp_path, tokenizer, texts(9), val_fraction=1e-6).val.docs == 0
    assert run(tmp_path, tokenizer, texts(12), val_fraction=0.0).val.docs == 0


def test_separate_validation_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held = write_jsonl(tmp_path / "val.jsonl", [{"text": "held out"}])
    prepared = run(tmp_path, tokenizer, texts(50), val_fraction=0.5, val_data=[Source(str(held))])
    assert prepared.train[0].docs == 50
    assert docs(prepared.val, tokenizer) == ["held out<|endoftext|>"]


def test_validation_data_of_several_sources_is_joined(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = [
        write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n} {row['text']}"} for row in texts(40)])
        for n in "ab"
    ]
    prepared = prepare(
        [Source(str(file), 0.5) for file in files], tokenizer, kind="text", cache_dir=tmp_path / "cache",
        seq_len=64, val_fraction=0.2,
    )  # fmt: skip
    assert prepared.weights == [0.5, 0.5] and len(prepared.train) == 2
    assert {text[0] for text in docs(prepared.val, tokenizer)} == {"a", "b"}
    assert prepared.val.meta["tokens"] == len(prepared.val.tokens) == prepared.stats["val_tokens"]
    part = Shard.concat([prepared.train[0], prepared.train[1]], limit=100)
    assert {text[0] for text in docs(part, tokenizer)} == {"a", "b"} and len(part.tokens) <= 100


# ---- bad rows


def test_bad_rows_fail_with_their_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n{"text": ""}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: broken JSON.*no bad row is allowed.*max_bad_rows"):
        run(tmp_path, tokenizer, file)
    with pytest.raises(UserError, match=r"data\.jsonl:2: .*max_bad_rows allows 1 here"):
        run(tmp_path, tokenizer, file, max_bad_rows=1)
    prepared = run(tmp_path, tokenizer, file, max_bad_rows=2)
    assert prepared.stats["bad_rows"] == 2
    assert [entry["where"] for entry in prepared.stats["bad"]] == [f"{file}:2", f"{file}:3"]
    assert prepared.stats["bad"][1]["reason"] == "the text is empty"
    with pytest.raises(UserError, match=r"data\.jsonl:2: broken JSON"):
        run(tmp_path, tokenizer, file)  # the shard is ready now, but the limit is not what it was


def test_the_limit_is_for_all_sources_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "a"}, {"text": ""}]
    files = [Source(str(write_jsonl(tmp_path / f"{n}.jsonl", [*rows, {"text": n}]))) for n in "ab"]
    options: dict[str, Any] = {"kind": "text", "cache_dir": tmp_path / "cache", "seq_len": 8}
    assert prepare(files, tokenizer, max_bad_rows=2, **options).stats["bad_rows"] == 2
    with pytest.raises(UserError, match=r"b\.jsonl:2: the text is empty"):
        prepare(files, tokenizer, max_bad_rows=1, **options)


def test_a_file_of_another_kind_is_an_error_whatever_the_limit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3
    with pytest.raises(
        UserError, match=r"data\.jsonl:1: the row holds a preference pair .*fine-tuning \(sft\) wants"
    ):
        run(tmp_path, tokenizer, pairs, "chat", max_bad_rows=100)
    with pytest.raises(UserError, match="conversations are for `kllm sft`"):
        run(tmp_path, tokenizer, [chat("q", "a")], "text", max_bad_rows=100)
    with pytest.raises(UserError, match="plain text is for `kllm pretrain`"):
        run(tmp_path, tokenizer, texts(2), "chat")
    mixed = run(tmp_path, tokenizer, [chat("q", "a"), *pairs], "chat", max_bad_rows=3)
    assert mixed.stats["bad_rows"] == 3


def test_chats_that_do_not_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = chat("q", "one")
    long["messages"] += [*chat("q", "two")["messages"], *chat("x" * 100, "b")["messages"]]
    rows = [chat("q", "fits"), long, chat("p" * 200, "a"), chat("q", "a" * 200)]
    prepared = run(tmp_path, tokenizer, rows, "chat", seq_len=100, max_bad_rows=1)
    *whole, part = (text.split("assistant\n")[-1] for text in docs(prepared.train[0], tokenizer))
    assert whole == ["fits<|im_end|>", "two<|im_end|>"]
    assert set(part) == {"a"}, "as much of the only answer as fits, and no end of turn that would lie"
    assert len(prepared.train[0].tokens) - int(prepared.train[0].offsets[2]) == 100
    assert prepared.stats["cut_chats"] == 2
    (entry,) = prepared.stats["bad"]
    assert entry["reason"].startswith("the prompt alone has 2") and entry["reason"].endswith("seq_len is 100")


def test_a_conversation_that_the_template_refuses_is_one_bad_row(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no such thing') }}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    picky = byte_tokenizer(tmp_path / "picky", template=template)
    prepared = run(
        tmp_path, picky, [chat("q", "good"), chat("q", "bad"), chat("q", "fine")], "chat", max_bad_rows=1
    )
    assert prepared.train[0].docs == 2
    assert prepared.stats["bad"][0]["where"].endswith(":2")
    assert "no such thing" in prepared.stats["bad"][0]["reason"]


def test_short_texts_are_passed_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = run(tmp_path, tokenizer, [{"text": "ab"}, {"text": "abcdef"}], min_chars=5)
    assert (
        prepared.train[0].docs == 1 and prepared.stats["short_docs"] == 1 and prepared.stats["bad_rows"] == 0
    )


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "the file is empty"), (b"\n\n", "there are no records")]
)
def test_nothing_to_train_on(tmp_path: Path, tokenizer: Tokenizer, content: bytes, reason: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.jsonl: {reason}"):
        run(tmp_path, tokenizer, tmp_path / "data.jsonl")


# ---- augmentation


def seen(prepared: Prepared, tokenizer: Tokenizer, epoch: int, seed: int = 0) -> list[str]:
    (shard,) = prepared.train
    everything = docs(shard, tokenizer)
    return [everything[number] for number in shard.select(seed, epoch)]


def test_system_prompts_are_drawn_anew_each_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [chat(f"question {n}", "a") for n in range(300)]
    rows[0]["messages"].insert(0, {"role": "system", "content": "mine"})
    rows[1]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    prepared = run(tmp_path, tokenizer, rows, "chat", system_prompt_ratio=0.3, seq_len=2048)
    epochs = [seen(prepared, tokenizer, epoch) for epoch in range(4)]
    with_system = np.array([["<|im_start|>system\n" in text for text in texts[2:]] for texts in epochs])
    assert with_system.mean() == pytest.approx(0.3, abs=0.06)
    assert (with_system.sum(axis=0) < 4).mean() > 0.9 and (with_system.sum(axis=0) > 0).any()
    assert all("mine" in texts[0] and "# Tools" in texts[1] for texts in epochs)
    used = {prompt for prompt in SYSTEM_PROMPTS if any(prompt in text for text in epochs[0])}
    assert len(used) >= 8
    assert seen(prepared, tokenizer, 2) == epochs[2] and seen(prepared, tokenizer, 2, seed=1) != epochs[2]
    # The seed is what the loader draws with; the packed rows follow.
    source = PackedSource(prepared.train, seq_len=2048, rows_per_step=1, micro_rows=1, seed=0)
    tokens = [int(t) for _ in range(source.rows_per_epoch) for b in source.take() for t in b.tokens]
    assert len(tokens) == sum(len(tokenizer.encode_raw(text)) for text in epochs[0])


def test_system_prompts_for_all_or_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [chat(f"question {n}", "a") for n in range(5)]
    for ratio in (0.0, 1.0):
        prepared = run(tmp_path, tokenizer, rows, "chat", system_prompt_ratio=ratio, seq_len=2048)
        assert prepared.train[0].variants is None
        assert all(("system\n" in text) == bool(ratio) for text in seen(prepared, tokenizer, 0))


def test_empty_think_blocks_are_kept_by_chance(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = "<think>\n\n</think>\n\n"
    rows = [chat(f"{block} {n}", f"{block}answer") for n in range(200)] + [chat("q", "no block")]
    prepared = run(tmp_path, tokenizer, rows, "chat", keep_empty_think=0.2, seq_len=2048)
    kept = np.array([[t.count(block) == 2 for t in seen(prepared, tokenizer, e)[:-1]] for e in range(5)])
    assert kept.mean() == pytest.approx(0.2, abs=0.05)
    assert (kept[0] != kept[1]).any()
    assert all(t.count(block) in (1, 2) for t in seen(prepared, tokenizer, 0)[:-1]), "the user's words stay"
    for chance in (0.0, 1.0):
        prepared = run(tmp_path, tokenizer, rows, "chat", keep_empty_think=chance, seq_len=2048)
        assert prepared.train[0].variants is None
        assert all((t.count(block) == 2) == bool(chance) for t in seen(prepared, tokenizer, 0)[:-1])
        assert prepared.train[0].docs == len(prepared.train[0].offsets) - 1


def test_empty_think_blocks_of_the_user_stay_where_they_are_ordinary_words(tmp_path: Path) -> None:
    block = "<think>\n\n</think>\n\n"
    wordy = byte_tokenizer(tmp_path / "wordy", think=False)
    prepared = run(tmp_path, wordy, [chat(block, f"{block}a")], "chat", keep_empty_think=0, seq_len=200)
    (text,) = docs(prepared.train[0], wordy)
    assert text.count(block) == 1 and text.startswith(f"<|im_start|>user\n{block}")


def test_both_augmentations_are_independent(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [chat(f"q {n}", "<think>\n\n</think>\n\na") for n in range(300)]
    prepared = run(
        tmp_path, tokenizer, rows, "chat", keep_empty_think=0.5, system_prompt_ratio=0.5, seq_len=2048
    )
    forms = [("system\n" in text, "<think>" in text) for text in seen(prepared, tokenizer, 0)]
    shares = [
        forms.count(form) / 300 for form in ((False, False), (False, True), (True, False), (True, True))
    ]
    assert all(share == pytest.approx(0.25, abs=0.08) for share in shares)


def test_a_system_prompt_that_does_not_fit_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = run(tmp_path, tokenizer, [chat("q", "a")], "chat", system_prompt_ratio=0.9, seq_len=50)
    assert prepared.train[0].docs == 1
    assert not any("system\n" in text for epoch in range(5) for text in seen(prepared, tokenizer, epoch))


# ---- the kit's real conversations


def test_real_conversations_pack_to_97_percent(tmp_path: Path, tokenizer: Tokenizer, data_kit: Path) -> None:
    minimind = Tokenizer.load(data_kit / "tokenizers" / "minimind")
    prepared = prepare(
        [Source(str(data_kit / "sft" / f"{lang}.jsonl.gz")) for lang in ("zh", "en")], minimind, kind="chat",
        cache_dir=tmp_path, seq_len=1024, max_bad_rows=100, max_bytes=1_000_000,
    )  # fmt: skip
    source = PackedSource(prepared.train, prepared.weights, seq_len=1024, rows_per_step=8, micro_rows=8)
    assert source.efficiency > 0.97
    assert json.dumps(prepared.stats)
