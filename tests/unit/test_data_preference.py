"""Preference pairs and rated answers: from records to batches with shared beginnings."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tools import Source, byte_tokenizer, pair_shard, sides_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.data.batch import IGNORE, Batch
from kllm.data.encode import Document, EncodeOptions, TooLong
from kllm.data.encode_pairs import PairDocuments, RatedDocuments, sections
from kllm.data.formats import PreferenceRecord, RatedRecord
from kllm.data.messages import BadRow, Message, join_reasoning
from kllm.data.pairsource import PairSource
from kllm.data.shards import Prepared, Shard, prepare
from kllm.errors import UserError
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def bot(text: str) -> Message:
    return {"role": "assistant", "content": text}


def run(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], kind: Any = "preference", **more: Any
) -> Prepared:
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    options = {"cache_dir": tmp_path / "cache", "seq_len": 256, "val_fraction": 0.0, **more}
    return prepare([Source(str(file))], tokenizer, kind=kind, **options)


def row(question: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def encode(tokenizer: Tokenizer, record: Any, **options: Any) -> Document | BadRow:
    kind = PairDocuments if isinstance(record, PreferenceRecord) else RatedDocuments
    (found,) = kind(tokenizer, EncodeOptions(**{"seq_len": 10_000, **options}))([record])
    return found


def segments(batch: Batch) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(batch.cu_seqlens.tolist())]


# ---- a row holds both conversations, and trains the answers


WORDS = st.text("ab \n你<", min_size=1, max_size=6).filter(str.strip)
TURNS = st.lists(st.tuples(WORDS, WORDS), max_size=2)
ANSWER = st.lists(st.tuples(WORDS, WORDS), max_size=1)
PAIRS = st.tuples(st.booleans(), TURNS, WORDS, WORDS, ANSWER, WORDS, ANSWER).filter(lambda x: x[3] != x[5])


def record_of(shape: Any) -> PreferenceRecord:
    """[system] (user, answer)* user, then on each side an answer and perhaps another exchange."""
    system, turns, question, good, more_good, bad, more_bad = shape
    prompt = [{"role": "system", "content": "be"}] if system else []
    for asked, answered in turns:
        prompt += [user(asked), bot(answered)]
    answers = [
        [bot(first), *(m for u, a in more for m in (user(u), bot(a)))]
        for first, more in ((good, more_good), (bad, more_bad))
    ]
    return PreferenceRecord([*prompt, user(question)], *answers)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes=st.lists(PAIRS, min_size=1, max_size=5), packing=st.booleans())
def test_a_batch_gives_back_both_conversations(tokenizer: Tokenizer, shapes: Any, packing: bool) -> None:
    records = [record_of(shape) for shape in shapes]
    documents = [encode(tokenizer, record) for record in records]
    shard = pair_shard(documents)
    source = PairSource([shard], seq_len=1000, rows_per_step=99, micro_rows=99, packing=packing)
    rows = source.rows_per_epoch
    source = PairSource([shard], seq_len=1000, rows_per_step=rows, micro_rows=rows, packing=packing)
    (batch,) = source.take()
    chat = ChatEncoder(tokenizer)
    expected = []
    for record in records:
        sides = []
        for answer in (record.chosen, record.rejected):
            whole = chat.encode([*record.prompt, *answer])
            before = len(chat.prompt(record.prompt))
            last = max(at for at, on in enumerate(whole.mask) if on)
            trained = [t for t, on in zip(whole.ids[before:], whole.mask[before:], strict=True) if on]
            sides.append((whole.ids[: last + 1], trained))
        expected.append(tuple(map(tuple, map(map_tuple, sides))))
    found = [tuple(map(tuple, map(map_tuple, sides))) for sides in sides_of(batch)]
    assert Counter(found) == Counter(expected)


def map_tuple(side: tuple[list[int], list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, side))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes=st.lists(PAIRS, min_size=1, max_size=5))
def test_parents_positions_and_sequences(tokenizer: Tokenizer, shapes: Any) -> None:
    shard = pair_shard([encode(tokenizer, record_of(shape)) for shape in shapes])
    (batch,) = PairSource([shard], seq_len=10_000, rows_per_step=1, micro_rows=1).take()
    assert batch.parents is not None and batch.sequences is not None
    parents, index = batch.parents.tolist(), batch.sequences.index
    assert (batch.parents.dtype, index.dtype) == (torch.int32, torch.int64)
    assert len(parents) == len(batch.cu_seqlens) - 1
    assert batch.sequences.count == 2 * len(shapes) and batch.sequences.good is None
    assert torch.equal(index >= 0, batch.labels != IGNORE)
    assert sorted(set(index.tolist()) - {-1}) == list(range(2 * len(shapes)))
    for number, inside in enumerate(segments(batch)):
        parent = parents[number]
        above = segments(batch)[parent] if parent >= 0 else slice(0, 0)
        begin = above.stop - above.start
        size = inside.stop - inside.start
        assert batch.positions[inside].tolist() == list(range(begin, begin + size)) and size > 0
        assert int(batch.labels[inside.stop - 1]) == IGNORE
        if parent < 0:
            assert bool((batch.labels[inside] == IGNORE).all())
        else:
            assert parent < number and parents[parent] == -1
        for at in range(inside.start, inside.stop - 1):
            assert int(batch.labels[at]) in (IGNORE, int(batch.tokens[at + 1]))


def test_the_shared_beginning_ends_where_the_answers_do(tokenizer: Tokenizer) -> None:
    """Answers that begin alike are trained whole, earlier answers are not, whatever the dialect says."""
    talk = [user("q"), bot("first"), user("r")]
    record = PreferenceRecord([user("q")], [*talk[1:], bot("same, yes")], [*talk[1:], bot("same, no")])
    document = encode(tokenizer, record)
    assert isinstance(document, Document)
    shown = [(name, tokenizer.decode(ids.tolist(), skip_special_tokens=False), mask) for name, ids, mask
             in sections(document)]  # fmt: skip
    assert [(name, text) for name, text, _ in shown] == [
        ("prompt", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
                   "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"),
        ("chosen", "same, yes<|im_end|>"), ("rejected", "same, no<|im_end|>"),
    ]  # fmt: skip
    assert [int(mask.sum()) for _, _, mask in shown] == [0, 10, 9]
    shared, chosen = document.splits[0]
    ids = document.renderings[0][0]
    assert ids[shared] == ids[shared + chosen], "the last common token heads both answers"


def test_a_prompt_of_one_token_has_no_segment_of_its_own(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{% generation %}{{ m.content }}" \
               "<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"  # fmt: skip
    bare = byte_tokenizer(tmp_path / "bare", template=template)
    shard = pair_shard([encode(bare, PreferenceRecord([user("q")], [bot("a")], [bot("bb")])) for _ in "12"])
    (batch,) = PairSource([shard], seq_len=20, rows_per_step=1, micro_rows=1).take()
    assert batch.parents is not None and batch.parents.tolist() == [-1] * 4
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 10, 14]
    assert batch.sequences is not None
    assert batch.sequences.index.tolist() == [0, 0, -1, 1, 1, 1, -1, 2, 2, -1, 3, 3, 3, -1]


# ---- augmentation is drawn for the pair, never for a side


def think(text: str, answer: str) -> Message:
    return {"role": "assistant", "content": answer, "reasoning_content": text}


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_both_sides_have_the_same_system_prompt_and_think_block(
    tmp_path: Path, tokenizer: Tokenizer, keep: float, ratio: float
) -> None:
    rows = [
        {"prompt": f"q{n}", "chosen": [think("", f"yes {n}")], "rejected": [think("", f"no {n}")]}
        for n in range(30)
    ]
    for one in rows:  # an empty think block as data sets write it
        for key in ("chosen", "rejected"):
            one[key] = [bot("<think>\n\n</think>\n\n" + one[key][0]["content"])]
    prepared = run(tmp_path, tokenizer, rows, keep_empty_think=keep, system_prompt_ratio=ratio)
    source = PairSource(prepared.train, seq_len=256, rows_per_step=1, micro_rows=1)
    seen: Counter[tuple[bool, bool]] = Counter()
    for _ in range(4 * source.rows_per_epoch):
        for (good, _), (bad, _) in sides_of(source.take()[0]):
            texts = [tokenizer.decode(list(ids), skip_special_tokens=False) for ids in (good, bad)]
            assert texts[0].replace("yes", "no") == texts[1]
            seen[("<think>" in texts[0], "system" in texts[0])] += 1
    thoughts = {True: {1.0, 0.5}, False: {0.0, 0.5}}
    wanted = {(t, s) for t in thoughts for s in thoughts if keep in thoughts[t] and ratio in thoughts[s]}
    assert set(seen) == wanted


def test_pairs_that_differ_in_nothing_but_an_empty_think_block(tokenizer: Tokenizer) -> None:
    record = PreferenceRecord([user("q")], [bot("<think>\n\n</think>\n\nyes")], [bot("yes")])
    assert isinstance(encode(tokenizer, record), Document)
    for keep in (0.0, 0.5):
        found = encode(tokenizer, record, keep_empty_think=keep)
        assert isinstance(found, BadRow) and "the same tokens" in str(found)


# ---- dialects


DIALECTS = {
    "messages": {"prompt": [user("q")], "chosen": [bot("good")], "rejected": [bot("bad")]},
    "strings": row("q", "good", "bad"),
    "dialogues": {"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]},
    "ultrafeedback": {"prompt": "q", "prompt_id": "1", "chosen": [user("q"), bot("good")],
                      "rejected": [user("q"), bot("bad")], "score_chosen": 8.0, "score_rejected": 3.0},
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}],
                 "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
    "question": {"question": "q", "chosen": "good", "rejected": "bad"},
    "instruction": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
}  # fmt: skip


def test_every_dialect_gives_the_same_pair(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = run(tmp_path, tokenizer, list(DIALECTS.values()), seq_len=64)
    (shard,) = prepared.train
    assert shard.docs == len(DIALECTS) and prepared.stats["bad_rows"] == 0
    docs = {tuple(shard.tokens[a:b].tolist()) for a, b in pairwise(shard.offsets.tolist())}
    assert len(docs) == 1 and shard.splits is not None and len({tuple(s) for s in shard.splits.tolist()}) == 1
    assert prepared.stats["trained_tokens"] == len(DIALECTS) * (5 + 4)


def test_an_instruction_has_its_input_in_the_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = {"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4"}
    (shard,) = run(tmp_path, tokenizer, [one]).train
    assert "user\nadd\n1 2<|im_end|>" in tokenizer.decode(shard.tokens.tolist(), skip_special_tokens=False)


def test_reasoning_is_part_of_the_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = {"prompt": "q", "chosen": [think("why", "good")], "rejected": [bot("bad")]}
    document = encode(tokenizer, PreferenceRecord([user("q")], one["chosen"], one["rejected"]))
    assert isinstance(document, Document)
    _, ids, mask = sections(document)[1]
    assert mask.all() and tokenizer.decode(ids.tolist()).startswith("<think>\nwhy")
    plain = byte_tokenizer(tmp_path / "plain", template="{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}")  # fmt: skip
    (shard,) = run(tmp_path, plain, [one]).train
    assert join_reasoning(one["chosen"])[0]["content"] in plain.decode(shard.tokens.tolist())


# ---- bad rows, wrong kinds, rows that do not fit


def test_bad_pairs_are_reported_with_their_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        row("q", "good", "bad"),
        row("q", "same", "same"),
        {"prompt": "q", "chosen": [bot("a")], "rejected": [bot("a"), user("more"), bot("b")]},
        {"prompt": "q", "chosen": "\ud800", "rejected": "b"},
        {"chosen": "a", "rejected": "b"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    source = Source(str(file))
    options = {"kind": "preference", "cache_dir": tmp_path / "cache", "seq_len": 256, "val_fraction": 0.0}
    stats = prepare([source], tokenizer, max_bad_rows=4, **options).stats
    reasons = {bad["where"].rpartition(":")[2]: bad["reason"] for bad in stats["bad"]}
    assert reasons["2"] == "chosen and rejected are the same"
    assert reasons["3"].endswith("only the other with more turns: nothing to compare")
    assert "surrogate" in reasons["4"] and "no prompt" in reasons["5"]
    assert stats["pairs"] == 1 and stats["docs"] == 1
    with pytest.raises(UserError, match=r"data\.jsonl:2: chosen and rejected are the same"):
        prepare([source], tokenizer, max_bad_rows=0, **options)


def test_equal_tokens_are_bad_even_if_the_records_differ(tokenizer: Tokenizer) -> None:
    record = PreferenceRecord([user("q")], [{**bot("a"), "name": "x"}], [bot("a")])
    found = encode(tokenizer, record)
    assert isinstance(found, BadRow) and str(found) == "chosen and rejected have the same tokens"


def test_data_of_another_kind_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rated = {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(UserError, match="holds a rated answer") as caught:
        run(tmp_path, tokenizer, [rated])
    assert caught.value.hint == "rated answers are for `kllm dpo` with loss kto"
    with pytest.raises(UserError, match="holds a conversation") as caught:
        run(tmp_path, tokenizer, [{"messages": [user("q"), bot("a")]}], "rated")
    assert caught.value.hint == "conversations are for `kllm sft`"
    with pytest.raises(UserError, match="holds a preference pair") as caught:
        run(tmp_path, tokenizer, [row("q", "a", "b")], "chat")
    assert caught.value.hint == "preference pairs are for `kllm dpo`"
    with pytest.raises(UserError, match="pairs or ratings are wanted, the data is chat"):
        PairSource([Shard.empty("chat")], seq_len=8, rows_per_step=1, micro_rows=1)


def test_old_turns_go_and_answers_stay_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    system = {"role": "system", "content": "short"}
    turns = [m for n in range(6) for m in (user(f"question {n}"), bot(f"answer {n}"))]
    prompt = [system, *turns, user("last")]
    whole = ChatEncoder(tokenizer).encode([*prompt, bot("a longer one")]).ids
    for seq_len in range(len(whole) + 5, 60, -7):
        document = encode(
            tokenizer, PreferenceRecord(prompt, [bot("a longer one")], [bot("b")]), seq_len=seq_len
        )
        assert isinstance(document, Document)
        (_, ids, _), (_, good, _), (_, bad, _) = sections(document)
        text = tokenizer.decode(ids.tolist())
        kept = [n for n in range(6) if f"question {n}" in text]
        assert len(ids) + max(len(good), len(bad)) <= seq_len
        assert text.startswith("system\nshort\nuser\n") and text.endswith("user\nlast\nassistant\n")
        assert kept == list(range(6 - len(kept), 6)) and document.cut == (len(kept) < 6)
        oldest = 5 - len(kept)
        if document.cut:  # one turn more would not have fitted
            more = [system, *turns[2 * oldest :], user("last"), bot("a longer one")]
            assert len(ChatEncoder(tokenizer).encode(more).ids) - 1 > seq_len
        rated = encode(tokenizer, RatedRecord(prompt, [bot("a longer one")], True), seq_len=seq_len)
        assert isinstance(rated, Document)
        assert rated.renderings[0][0].tolist() == [*ids.tolist(), *good.tolist()]
    assert isinstance(
        encode(tokenizer, PreferenceRecord(prompt, [bot("x" * 50)], [bot("b")]), seq_len=80), TooLong
    )


def test_what_does_not_fit_is_dropped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row("q", "good", "bad"), row("q", "x" * 90, "bad"), row("q", "a", "y" * 90)]
    prepared = run(tmp_path, tokenizer, rows, seq_len=64)
    assert (prepared.stats["pairs"], prepared.stats["dropped"], prepared.stats["bad_rows"]) == (1, 2, 0)
    assert prepared.stats["mean_shared"] == prepared.train[0].splits[0, 0]
    rated = run(tmp_path, tokenizer, rows, "rated", seq_len=64)
    assert (rated.stats["docs"], rated.stats["dropped"]) == (4, 2) and "pairs" not in rated.stats
    with pytest.raises(UserError, match="3 records are too long, 0 bad; nothing is left"):
        run(tmp_path, tokenizer, rows, seq_len=8)


# ---- ratings


def test_ratings_from_ratings_and_from_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": [user("q"), bot("old"), user("r")], "completion": "fine", "label": True},
        {"prompt": "q", "completion": [bot("poor")], "label": 0},
        row("q", "good", "bad"),
    ]
    (shard,) = run(tmp_path, tokenizer, rows, "rated").train
    assert shard.kind == "rated" and shard.good is not None and shard.good.tolist() == [1, 0, 1, 0]
    (batch,) = PairSource([shard], seq_len=256, rows_per_step=1, micro_rows=1).take()
    assert batch.parents is None and batch.sequences is not None and batch.sequences.good is not None
    said = {}
    for number, inside in enumerate(segments(batch)):
        at = batch.sequences.index == number
        assert bool((at.nonzero() >= inside.start).all()) and bool((at.nonzero() < inside.stop).all())
        said[tokenizer.decode(batch.labels[at].tolist())] = bool(batch.sequences.good[number])
    assert said == {"fine": True, "poor": False, "good": True, "bad": False}
    assert batch.sequences.count == 4 and batch.sequences.good.dtype == torch.bool


@pytest.mark.parametrize("label", [2, -1, "yes", None])
def test_a_label_is_true_or_false(tmp_path: Path, tokenizer: Tokenizer, label: Any) -> None:
    good = {"prompt": "q", "completion": "a", "label": True}
    stats = run(tmp_path, tokenizer, [good, {**good, "label": label}], "rated", max_bad_rows=1).stats
    assert stats["bad_rows"] == 1 and stats["docs"] == 1
