"""Every dialect of thinking in one form, and the switch that turns it off as training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_tools import Source, byte_tokenizer, chat
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.data.encode import ChatDocuments, Document, EncodeOptions
from kllm.data.encode_pairs import PairDocuments
from kllm.data.formats import ChatRecord, PreferenceRecord
from kllm.data.messages import BadRow, join_reasoning, split_reasoning
from kllm.data.reasoning import (
    EMPTY_THINK,
    ThinkOptions,
    one_form,
    place_empty,
    split_thinking,
    untag_answer,
    without_reasoning,
)
from kllm.data.shards import prepare
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

U = {"role": "user", "content": "why?"}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", (None, "plain")),
        ("<think>\nwhy\n</think>\n\nso", ("why", "so")),
        ("<think>why</think>so", ("why", "so")),
        ("\n <think> why \n</think> \n so\n", ("why", "so\n")),
        ("<think>\n\n</think>\n\nso", ("", "so")),
        ("why\n</think>\n\nso", ("why", "so")),  # DeepSeek-R1: the prompt opened it
        ("</think>\n\nso", ("", "so")),
        ("why</think>so", ("why", "so")),
        ("<think>a</think>b</think>c", ("a", "b</think>c")),
        ("<thinking>why</thinking>so", ("why", "so")),
        ("[THINK]why[/THINK]so", ("why", "so")),
        ("<|begin_of_thought|>\nwhy\n<|end_of_thought|>\n\nso", ("why", "so")),
        ("The tag `</think>` ends it.", (None, "The tag `</think>` ends it.")),
        ("Write <think>x</think> there.", (None, "Write <think>x</think> there.")),
        ("", (None, "")),
    ],
)
def test_thinking_is_told_from_the_answer(text: str, expected: tuple[str | None, str]) -> None:
    assert split_thinking(text) == expected


@pytest.mark.parametrize("text", ["<think>\nwhy", "<thinking>why</think>", "<think>"])
def test_thinking_that_never_ends_is_refused(text: str) -> None:
    with pytest.raises(BadRow, match="never ends"):
        split_thinking(text)


@pytest.mark.parametrize(
    ("content", "strip", "keep", "add"),
    [
        ("so", "so", "so", "<answer>\nso\n</answer>"),
        ("<answer>so</answer>", "so", "<answer>\nso\n</answer>", "<answer>\nso\n</answer>"),
        ("\n<answer>\n so \n</answer>\n", "so", "<answer>\nso\n</answer>", "<answer>\nso\n</answer>"),
        ("<answer>\nso", "so", "<answer>\nso\n</answer>", "<answer>\nso\n</answer>"),
        ("<|begin_of_solution|>so<|end_of_solution|>", "so", "<answer>\nso\n</answer>", "<answer>\nso\n</answer>"),
        ("It is <answer>4</answer>.",) * 3 + ("<answer>\nIt is <answer>4</answer>.\n</answer>",),
        ("<answer>a</answer><answer>b</answer>",) * 3 + ("<answer>\n<answer>a</answer><answer>b</answer>\n</answer>",),
        ("",) * 4,
    ],
)  # fmt: skip
def test_answer_tags(content: str, strip: str, keep: str, add: str) -> None:
    assert (untag_answer(content, "strip"), untag_answer(content, "keep")) == (strip, keep)
    assert untag_answer(content, "add") == add


@pytest.mark.parametrize(
    "message",
    [
        said("<think>\nwhy\n</think>\n\nso"), said("<think>why</think><answer>so</answer>"), said("why\n</think>\n\nso"),
        said("so", reasoning_content="why"), said("so", reasoning="why\n"), said("so", thinking="\nwhy"),
        said("<think>\nwhy\n</think>\n\nso", reasoning_content="why"), said("\n</think>\n\nso", reasoning_content="why"),
        said("<answer>\nso\n</answer>", reasoning_content="why", reasoning=None),
    ],
)  # fmt: skip
def test_every_dialect_gives_the_same_message(message: dict[str, Any]) -> None:
    assert one_form(message) == said("so", reasoning_content="why")


def test_what_has_no_reasoning_gets_none() -> None:
    assert one_form(said("so")) == one_form(said("so", reasoning_content=None)) == said("so")
    assert (
        one_form(said(EMPTY_THINK + "so"))
        == one_form(said("so", reasoning_content=""))
        == said("so", reasoning_content="")
    )
    assert one_form({"role": "user", "content": "<think>x</think>y"}) == {
        "role": "user",
        "content": "<think>x</think>y",
    }
    kept = said("a </think> b", reasoning_content="why")
    assert one_form(kept) == kept, "other words before the tag are the answer's"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab \n"), st.text(alphabet="ab \n"))
def test_the_one_form_is_what_templates_write_back(thought: str, words: str) -> None:
    """Whatever spaces a model puts, the result survives rendering and reading."""
    message = one_form(said(f"<think>{thought}</think>{words}"), "strip")
    if message.get("reasoning_content") and message["content"]:
        text = join_reasoning([message])[0]["content"]
        assert split_reasoning(text) == (message["reasoning_content"], message["content"])


def test_empty_blocks_move_between_field_and_words_unchanged() -> None:
    talk = [U, said("so", reasoning_content=""), U, said("plain"), U, said("x", reasoning_content="why")]
    words = place_empty(talk, in_field=False)
    assert words == [U, said(EMPTY_THINK + "so"), U, said("plain"), U, said("x", reasoning_content="why")]
    assert place_empty(words, in_field=True) == talk
    assert join_reasoning(talk)[1] == words[1]


# ---- the switch


SHARE = ThinkOptions(add_empty=0.5, drop=0.25)


def test_shares_are_drawn_by_words_and_seed() -> None:
    plain = [[{**U, "content": f"q{n}"}, said("so"), U, said("more")] for n in range(400)]
    deep = [
        [{**U, "content": f"q{n}"}, said("so", reasoning_content="why"), U, said("more")] for n in range(400)
    ]

    def changed(talks: list[Any], seed: int) -> list[bool]:
        out = [SHARE.apply([talk], talk, seed)[0] for talk in talks]
        both = [[m.get("reasoning_content") for m in talk if m["role"] == "assistant"] for talk in out]
        assert all(one in (["", ""], [None, None], ["why", None]) for one in both), "all answers alike"
        return [one == ["", ""] for one in both]

    for talks, share in ((plain, 0.5), (deep, 0.25)):
        first = changed(talks, 1)
        assert first == changed(talks, 1) != changed(talks, 2)
        assert np.mean(first) == pytest.approx(share, abs=0.08)
    assert changed(plain, 1) != changed(deep, 1)


def test_a_dialect_counts_as_reasoning_and_loses_it_too() -> None:
    talk = [U, said("<think>why</think>so")]
    assert ThinkOptions(drop=1.0).apply([talk], talk) == [[U, said("so", reasoning_content="")]]
    assert ThinkOptions(add_empty=1.0).apply([talk], talk) == [talk]
    assert ThinkOptions(unify=True).apply([talk], talk) == [[U, said("so", reasoning_content="why")]]
    empty = [U, said(EMPTY_THINK + "so")]
    assert ThinkOptions(drop=1.0).apply([empty], empty) == [empty], "it had none to lose"
    assert without_reasoning(empty) == [U, said("so", reasoning_content="")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["so it is. why? because of that.\n\nso", "<think>\n\n</think>\n\nso"]
    return train_tokenizer(texts * 5, 320, max_bytes=100_000, min_frequency=1)[0]


def document(tokenizer: Tokenizer, messages: list[Any], **options: Any) -> tuple[list[int], list[int]]:
    (found,) = ChatDocuments(tokenizer, EncodeOptions(512, **options))([ChatRecord(messages)])
    assert isinstance(found, Document)
    ids, mask = found.renderings[0]
    assert mask is not None
    return ids.tolist(), mask.tolist()


@pytest.mark.parametrize("answer", [said("so", reasoning_content=""), said(EMPTY_THINK + "so")])
def test_the_blank_line_is_one_token_in_prompt_and_row(tmp_path: Path, answer: dict[str, Any]) -> None:
    """GPT-2's rule joins a blank line only where no words follow it; the block's end is a border."""
    plain = byte_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    config = json.loads(file.read_text())
    config["model"]["vocab"]["\u010a\u010a"] = len(config["model"]["vocab"])
    config["model"]["merges"] = [["\u010a", "\u010a"]]
    file.write_text(json.dumps(config))
    joined = Tokenizer.load(tmp_path)
    assert len(joined.encode("\n\nso")) == len(plain.encode("\n\nso")) > len(joined.encode("\n\n")) + 2
    prompt = ChatEncoder(joined).prompt([U], enable_thinking=False)
    ids, mask = document(joined, [U, answer], think=ThinkOptions())
    assert ids[: len(prompt)] == prompt and sum(mask[: len(prompt)]) == 0


@pytest.mark.parametrize("answer", [said("so", reasoning_content=""), said(EMPTY_THINK + "so")])
def test_a_training_row_begins_with_the_prompt_that_switches_thinking_off(
    tokenizer: Tokenizer, answer: dict[str, Any]
) -> None:
    prompt = ChatEncoder(tokenizer).prompt([U], enable_thinking=False)
    ids, _ = document(tokenizer, [U, answer])
    assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)


def test_the_empty_block_is_context_and_the_thinking_is_learned(tokenizer: Tokenizer) -> None:
    """With the switch off the block is in the prompt; without it the model must learn to think."""
    off = ChatEncoder(tokenizer).prompt([U], enable_thinking=False)
    on = ChatEncoder(tokenizer).prompt([U], enable_thinking=True)
    think = ThinkOptions(add_empty=1.0)
    ids, mask = document(tokenizer, [U, said("so")], think=think)
    assert ids[: len(off)] == off and mask == [0] * len(off) + [1] * (len(ids) - len(off))
    ids, mask = document(tokenizer, [U, said("so", reasoning_content="why")], think=think)
    assert ids[: len(on)] == on and mask == [0] * len(on) + [1] * (len(ids) - len(on))
    learned = document(tokenizer, [U, said("so")], think=ThinkOptions(add_empty=1.0, train_empty=True))[1]
    assert sum(learned) > sum(document(tokenizer, [U, said("so")], think=think)[1])
    assert document(tokenizer, [U, said("so")], think=ThinkOptions()) == document(tokenizer, [U, said("so")])


@pytest.mark.parametrize(
    "condition", ["message.reasoning_content", "message.reasoning_content is string", "false"]
)
def test_the_block_reaches_the_text_whatever_the_template_knows(tmp_path: Path, condition: str) -> None:
    """Templates that ask for a true value would drop an empty reasoning silently."""
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% generation %}{% if " + condition + " %}"
        "<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>"
        "{% endgeneration %}{% endfor %}"
    )  # fmt: skip
    plain = byte_tokenizer(tmp_path, template=template)
    ids, _ = document(plain, [U, said("so")], think=ThinkOptions(add_empty=1.0))
    text = plain.decode(ids, skip_special_tokens=False)
    assert text == f"<|im_start|>user\nwhy?<|im_end|><|im_start|>assistant\n{EMPTY_THINK}so<|im_end|>"


def test_the_two_sides_of_a_pair_are_switched_together(tokenizer: Tokenizer) -> None:
    think = ThinkOptions(add_empty=0.5)
    seen = set()
    for n in range(20):
        record = PreferenceRecord([{**U, "content": f"why {n}?"}], [said("so")], [said("it is")])
        (found,) = PairDocuments(tokenizer, EncodeOptions(512, think=think))([record])
        assert isinstance(found, Document)
        ids, mask = found.renderings[0]
        assert mask is not None
        seen.add(tokenizer.decode(ids.tolist(), skip_special_tokens=False).count("<think>"))
        assert "think" not in tokenizer.decode(ids[mask.astype(bool)].tolist(), skip_special_tokens=False)
    assert seen == {0, 2}


def test_a_bad_row_is_counted_and_shards_of_other_options_are_others(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [chat(f"q{n}", f"<think>r</think><answer>a{n}</answer>") for n in range(4)] + [
        chat("q", "<think>open")
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def text(think: ThinkOptions | None) -> tuple[str, int]:
        options: dict[str, Any] = {"kind": "chat", "seq_len": 512, "val_fraction": 0.0, "max_bad_rows": 1}
        done = prepare([Source(str(file))], tokenizer, cache_dir=tmp_path / "cache", think=think, **options)
        words = tokenizer.decode(done.train[0].tokens.tolist(), skip_special_tokens=False)
        return words, done.stats["bad_rows"]

    words, bad = text(ThinkOptions(unify=True, answer_tags="strip"))
    assert bad == 1 and words.count("<think>\nr\n</think>\n\na") == 4 and "<answer>" not in words
    assert text(None) == (text(None)[0], 0) and "<think>r</think><answer>a0</answer>" in text(None)[0]
    assert text(ThinkOptions(unify=True, drop=1.0))[0].count(EMPTY_THINK + "<answer>\na") == 4
