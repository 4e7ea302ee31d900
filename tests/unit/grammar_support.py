"""A random-logit writer, a generator of JSON schemas and the tokenizers for the grammar tests."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from chat_support import TEXT

from kllm.engine.grammar import Constraint, Matcher, fill_masks
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.tokenizer.train import train_tokenizer

DATA = Path(os.environ.get("KLLM_DATA_KIT", Path(__file__).parents[3] / "shared" / "data"))
REAL = {"minimind": DATA / "tokenizers/minimind", "stories260K": DATA / "models/stories260K"}
PADDING = 40  # logits wider than the tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
}


@cache
def tokenizer(name: str) -> Tokenizer:
    if name == "trained":
        return train_tokenizer(TEXT * 5, 320, max_bytes=1_000_000, min_frequency=1)[0]
    return Tokenizer.load(REAL[name])


def available() -> list[str]:
    return ["trained", *(name for name, path in REAL.items() if path.is_dir())]


@dataclass
class Answer:
    ids: list[int]
    text: str
    ended: bool  # by the grammar or an end token, not by the length
    matcher: Matcher


class Writer:
    """Draws from random logits: the worst model there is. Structural characters get a little help."""

    def __init__(self, tok: Tokenizer, seed: int = 0, favour: dict[int, float] | None = None) -> None:
        self.tok, self.size = tok, tok.vocab_size + PADDING
        self.random = np.random.default_rng(seed)
        self.bonus = np.zeros(self.size)
        for i in range(tok.vocab_size):
            if tok.bytes_of(i) in (b'"', b"}", b"]", b"'"):
                self.bonus[i] = np.log(self.size / 8)
        self.bonus[list(tok.stop_token_ids)] = np.log(self.size / 8)
        for i, value in (favour or {}).items():
            self.bonus[i] = value

    def draw(self, allowed: np.ndarray) -> int:
        logits = self.random.gumbel(size=self.size) + self.bonus
        return int(np.where(allowed, logits, -np.inf).argmax())

    def write(self, constraint: Constraint, limit: int = 300) -> Answer:
        matcher, ids = constraint.matcher(), []
        for _ in range(limit):
            allowed = fill_masks([matcher], self.size)[0]
            assert allowed.any()
            assert not matcher.error, (matcher.error, self.tok.decode(ids, False))
            token = self.draw(allowed)
            matcher.accept(token)
            if token in self.tok.stop_token_ids:
                return Answer(ids, self.text(ids), True, matcher)
            ids.append(token)
            if matcher.stopped:
                return Answer(ids, self.text(ids), True, matcher)
        return Answer(ids, self.text(ids), False, matcher)

    def text(self, ids: list[int]) -> str:
        return b"".join(self.tok.bytes_of(i) for i in ids).decode("utf-8", "replace")


def feed(matcher: Matcher, text: str) -> None:
    """Takes `text` as ordinary tokens."""
    for token in matcher.vocabulary.cut(text):
        matcher.accept(token)


def allowed(matcher: Matcher) -> set[int]:
    """The ids that may come next."""
    return set(np.flatnonzero(fill_masks([matcher], matcher.vocabulary.size)[0]).tolist())


def outside_strings(text: str) -> str:
    """A JSON text without its strings."""
    return re.sub(r'"(?:\\.|[^"\\])*(?:"|$)', '""', text)


class Schemas:
    """Random JSON schemas of at most `depth` levels that the compiler supports and some value satisfies."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def pick(self, *options: Any) -> Any:
        return options[int(self.random.integers(len(options)))]

    def number(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))

    def document(self, depth: int = 4) -> dict[str, Any]:
        schema = self.schema(self.number(1, depth))
        if self.random.random() < 0.3:
            leaf = {"type": "integer", "minimum": 0, "maximum": 9}
            tree = {
                "type": "object",
                "properties": {"v": leaf, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
                "required": ["v", "next"],
            }
            schema = {
                "type": "object",
                "properties": {"tree": {"$ref": "#/$defs/tree"}, "rest": schema},
                "required": ["tree", "rest"],
                "$defs": {"tree": tree},
            }
        return schema

    def schema(self, depth: int) -> dict[str, Any]:
        leaves = [self.string, self.integer, self.decimal, self.enum, self.plain]
        inner = [self.array, self.array, self.object, self.object, self.object, self.union]
        if depth <= 1 or self.random.random() < 0.35:
            return self.pick(*leaves)()
        return self.pick(*inner)(depth - 1)

    def string(self) -> dict[str, Any]:
        low = self.number(0, 5)
        return self.pick(
            {"type": "string"},
            {"type": "string", "minLength": low, "maxLength": low + self.number(0, 9)},
            {"type": "string", "pattern": self.pick(r"^[a-z]{2,5}$", r"\d{3}", "^(ab|cd)+$", "^é.*ü$")},
            {"type": "string", "format": self.pick("date", "uuid", "ipv4", "int32")},
        )

    def integer(self) -> dict[str, Any]:
        low = self.number(-1000, 1000)
        schema = {"type": "integer", self.pick("minimum", "exclusiveMinimum"): low}
        if self.random.random() < 0.7:
            schema[self.pick("maximum", "exclusiveMaximum")] = low + self.number(20, 5000)
        if self.random.random() < 0.3:
            schema["multipleOf"] = self.pick(2, 3, 5)
        return schema

    def decimal(self) -> dict[str, Any]:
        low = self.number(-50, 50) / 4
        return {"type": "number", "minimum": low, "maximum": low + self.number(1, 9)}

    def enum(self) -> dict[str, Any]:
        values = [
            "a",
            "bb",
            '"quoted" \\ \n',
            "囍🤖龘",
            "<|im_end|>",
            1,
            -2.5,
            None,
            True,
            [1, "x"],
            {"k": [0]},
        ]
        chosen = [values[i] for i in self.random.permutation(len(values))[: self.number(1, 5)]]
        return self.pick({"enum": chosen}, {"const": chosen[0]})

    def plain(self) -> dict[str, Any]:
        return self.pick({"type": "boolean"}, {"type": "null"}, {"type": ["string", "null", "boolean"]})

    def array(self, depth: int) -> dict[str, Any]:
        low = self.number(0, 2)
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth)}
        if self.random.random() < 0.3:
            schema |= {
                "prefixItems": [self.schema(1), self.schema(1)],
                "items": self.pick(False, {"type": "null"}),
            }
            low = 2
        return schema | {"minItems": low, "maxItems": low + self.number(0, 2)}

    def object(self, depth: int) -> dict[str, Any]:
        names = ["id", "名字", 'qu"ote', "last name", "$ref", "x/y"]
        chosen = [names[i] for i in self.random.permutation(len(names))[: self.number(1, 4)]]
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth) for name in chosen},
            "required": [name for name in chosen if self.random.random() < 0.6],
        }
        extra = self.random.random()
        if extra < 0.3:
            schema["additionalProperties"] = False
        elif extra < 0.5:
            schema["additionalProperties"] = self.schema(1)
        elif extra < 0.6:
            schema = {"allOf": [schema, {"properties": {"more": {"type": "boolean"}}, "required": ["more"]}]}
        elif extra < 0.7:
            schema = {
                "type": "object",
                "patternProperties": {"^k[0-9]$": self.schema(1)},
                "additionalProperties": False,
            }
        return schema

    def union(self, depth: int) -> dict[str, Any]:
        if self.random.random() < 0.3:
            return {
                "oneOf": [{"type": "string", "maxLength": 5}, {"type": "integer", "minimum": 0, "maximum": 9}]
            }
        return {"anyOf": [self.schema(depth) for _ in range(self.number(2, 3))]}
