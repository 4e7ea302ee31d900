from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers

pytest.importorskip("llguidance")

from grammar_support import PADDING, PERSON, Schemas, Writer, allowed, feed, tokenizer

from kllm.engine import grammar_native
from kllm.engine.grammar import Constraint, GrammarCompiler, fill_masks
from kllm.errors import KllmError, UserError
from kllm.tokenizer.source import Source
from kllm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def small() -> GrammarCompiler:
    tok = tokenizer("trained")
    return GrammarCompiler(tok, tok.vocab_size + PADDING)


# ---- batches and trouble


def test_rows_of_a_batch_do_not_touch_each_other(small: GrammarCompiler) -> None:
    size = small.vocabulary.size
    alone = [small.json_schema(PERSON).matcher(), small.regex("[0-9]+").matcher()]
    expected = [fill_masks([m], size)[0] for m in alone]
    broken, waiting = small.regex("abc").matcher(), small.regex("x", after="</think>").matcher()
    with pytest.raises(KllmError, match="cannot go on"):
        broken.accept(small.vocabulary.text_ids[b"z"])
    masks = fill_masks([alone[0], broken, waiting, alone[1]], size)
    assert (masks[[0, 3]] == expected).all()
    assert set(np.flatnonzero(masks[1])) == set(small.vocabulary.stops)
    assert broken.error and "\n" not in broken.error
    assert masks[2].sum() > size / 2
    wide = fill_masks(alone, size + 64)
    assert wide.shape == (2, size + 64)
    assert not wide[:, size:].any()
    assert fill_masks(alone, size - 10).shape == (2, size - 10)


def test_a_grammar_that_breaks_late_ends_only_its_own_answer(small: GrammarCompiler) -> None:
    late = small.regex(r"(\p{L}{1,500}\w{1,500}){1,50}").matcher()
    fine = small.regex("[a-z]*").matcher()
    letters = [small.vocabulary.text_ids[c.encode()] for c in "abc"]
    for step in range(400):
        masks = fill_masks([late, fine], small.vocabulary.size)
        assert masks.any(axis=1).all()
        if late.error:
            break
        try:
            late.accept(letters[step % 3])
        except KllmError:
            break
        fine.accept(letters[step % 3])
    assert late.error and not fine.error
    assert allowed(late) == set(small.vocabulary.stops)
    assert letters[0] in allowed(fine)


def test_a_copy_goes_its_own_way(small: GrammarCompiler) -> None:
    first = small.choice(["ab", "ac"]).matcher()
    feed(first, "a")
    second = first.copy()
    feed(first, "b")
    assert first.stopped and not second.stopped
    feed(second, "c")
    assert second.stopped


def test_constraints_are_kept_and_shared(small: GrammarCompiler) -> None:
    constraint = small.json_schema(PERSON)
    assert small.json_schema(dict(PERSON)) is constraint
    assert small.json_schema(PERSON, after="</think>") is not constraint
    with pytest.raises(AttributeError):
        constraint.closer = None  # type: ignore[misc]


def test_two_threads_compile_and_match() -> None:
    tok = tokenizer("trained")
    compiler = GrammarCompiler(tok, tok.vocab_size + PADDING)
    shared: list[Constraint] = []
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            schemas, writer = Schemas(seed), Writer(tok, seed)
            for _ in range(10):
                schema = schemas.document(2)
                answer = writer.write(compiler.json_schema(schema))
                assert not answer.ended or jsonschema.validate(json.loads(answer.text), schema) is None
                shared.append(compiler.json_schema(PERSON))
                writer.write(shared[0])
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


# ---- what is refused

DEEP: dict[str, Any] = {"type": "string"}
for _ in range(40):
    DEEP = {"properties": {"a": DEEP}}
PATTERNS = {"allOf": [{"type": "string", "pattern": f"x{i}.{{1,50}}y"} for i in range(30)]}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda g: g.json_schema(False), "allows no value"),
        (lambda g: g.json_schema([]), "an object or true"),
        (lambda g: g.json_schema({"not": {}}), "not"),
        (lambda g: g.json_schema({"type": "strin"}), "strin"),
        (lambda g: g.json_schema({"enum": []}), "empty"),
        (lambda g: g.json_schema({"type": "string", "pattern": "("}), "unclosed"),
        (lambda g: g.json_schema({"type": "integer", "minimum": 2, "maximum": 1}), "minimum"),
        (lambda g: g.json_schema({"$ref": "#/nope"}), "nope"),
        (lambda g: g.json_schema({"$ref": "http://example.com/x"}), "example.com"),
        (lambda g: g.json_schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "anyOf"),
        (lambda g: g.json_schema({"type": "integer", "multipleOf": 999_999}), "multipleOf"),
        (lambda g: g.json_schema({"type": "integer", "multipleOf": float("nan")}), "multipleOf"),
        (lambda g: g.json_schema({"const": float("inf")}), "JSON value"),
        (lambda g: g.json_schema({"const": "\ud800"}), "surrogate"),
        (lambda g: g.json_schema(DEEP), "deep"),
        (lambda g: g.json_schema(PATTERNS), "patterns"),
        (lambda g: g.json_schema({"properties": {f"p{i:05}": {} for i in range(6000)}}), "characters"),
        (lambda g: g.regex("("), "unclosed"),
        (lambda g: g.regex("(?=a)b"), "look-around"),
        (lambda g: g.regex(""), "empty"),
        (lambda g: g.regex("((((a{1,100}){1,100}){1,100}){1,100}){1,100}"), "complex"),
        (lambda g: g.choice([]), "list of strings"),
        (lambda g: g.choice(["a", ""]), "list of strings"),
        (lambda g: g.choice("abc"), "list of strings"),
        (lambda g: g.lark("start: foo"), "foo"),
        (lambda g: g.lark("start: start"), "no text"),
        (lambda g: g.lark("root ::= ("), "GBNF"),
        (lambda g: g.tools([], repeat=True), "no tools"),
        (lambda g: g.tools([{"name": "a", "parameters": {"type": "string"}}], repeat=True), "object"),
    ],
)
def test_refusals_are_one_line(
    small: GrammarCompiler, ask: Callable[[GrammarCompiler], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ask(small)
    text = caught.value.message
    assert "\n" not in text and len(text) <= 230
    assert caught.value.where


def test_large_and_nested_grammars_compile_or_fail_soon(small: GrammarCompiler) -> None:
    started = time.monotonic()
    small.json_schema({"enum": [f"value number {i}" for i in range(20_000)]})
    small.json_schema({"type": "string", "pattern": "(a{1,1000}){1,1000}"})
    chain: dict[str, Any] = {
        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(900)
    }
    small.json_schema({"$defs": {**chain, "d900": {}}, "$ref": "#/$defs/d0"})
    assert time.monotonic() - started < 5


def test_a_long_chain_of_rules_does_not_end_the_process(small: GrammarCompiler) -> None:
    rules = "\n".join(f'a{i}:"x"a{i + 1}' for i in range(4000))
    small.lark(f'start: a0\n{rules}\na4000:"y"')


def test_a_compilation_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_native, "COMPILE_SECONDS", 0.05)
    release = threading.Event()
    with pytest.raises(UserError, match="longer than") as caught:
        grammar_native.bounded(lambda: release.wait(30), "response_format")  # type: ignore[arg-type,return-value]
    assert caught.value.where == "response_format"
    release.set()


def test_a_tokenizer_whose_text_is_not_its_bytes_is_refused() -> None:
    vocab = {w: i for i, w in enumerate(["[UNK]", "[SEP]", "one", "two", "##t", "##hree", ","])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.WordPiece()
    tok = Tokenizer(Source("test", backend.to_str(), {"eos_token": "[SEP]"}))
    with pytest.raises(UserError, match="byte-level or SentencePiece"):
        GrammarCompiler(tok, tok.vocab_size).json_object()
