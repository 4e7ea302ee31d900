"""The facts of the small world, and which questions are kept for the evaluation.

A fact is (kind, attribute, subject) -> value. Base facts are told in the pretraining text. Derived
facts chain base facts (Tom lives in Paris, Paris is in France) and are never stated in one step.

Held out, so that no evaluation question occurs in any training split: one base fact in `HELD_OUT_BASE`
and one derived fact in `HELD_OUT_DERIVED`, which no question asks for in any words (base facts are told
in texts, in answers to "Tell me about Tom." and on the way to derived ones); every twelfth pair of
numbers; combinations of what the user said about himself; a quarter of the made-up names; two phrasings
of each question about the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin import names as people
from kllm.data.builtin.rng import Deck, Dice

PEOPLE_PER_LANGUAGE = 100
PERSON_ATTRS = ("city", "job", "pet", "colour", "food", "month")
# derived attribute -> the attributes that lead to it: one of the person's, then of each value in turn
DERIVED = {
    "country": ("city", "country"),
    "continent": ("city", "country", "continent"),
    "language": ("city", "country", "language"),
    "workplace": ("job", "place"),
    "tool": ("job", "tool"),
    "petclass": ("pet", "class"),
    "petfood": ("pet", "diet"),
    "petlegs": ("pet", "legs"),
    "taste": ("food", "taste"),
}
THING_ATTRS = {
    "animal": ("class", "legs", "home", "diet", "cover"),
    "job": ("place", "tool"),
    "food": ("kind", "colour", "taste"),
    "city": ("country",),
    "country": ("continent", "capital", "language"),
}
VALUE_KIND = {"city": "city", "country": "country", "job": "job", "pet": "animal", "food": "food"}
HELD_OUT_BASE = 10  # one base fact in so many is told but never asked for outside the evaluation
HELD_OUT_DERIVED = 4  # one derived fact in so many is never asked for outside the evaluation
HELD_OUT_SUMS = 12  # one pair of numbers in so many is kept for the evaluation


@dataclass(frozen=True)
class Fact:
    """`lang` is "en" or "zh" for people, "" for what both languages know. Words are "english/chinese"."""

    kind: str
    attr: str
    subject: str
    value: str
    lang: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.kind, self.attr, self.subject)


def word(text: str, lang: str) -> str:
    """The form of "english/chinese" in `lang`; a text without a slash is the same in both."""
    english, _, chinese = text.partition("/")
    return (chinese or english) if lang == "zh" else english


def table(block: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")] for row in block.strip().splitlines()]


class World:
    """All facts for one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        dice = Dice(f"kllm-world/{seed}/facts")
        self.facts: dict[tuple[str, str, str], Fact] = {}
        self.female: dict[str, bool] = {}
        self.people: dict[str, list[str]] = {}
        self.things: dict[str, list[str]] = {}
        self._tell_things()
        for lang in lex.LANGS:
            self._tell_people(lang, dice)
        self._derive()
        self.held = {fact.key for fact in self if self._hold(fact)}

    def _add(self, kind: str, attr: str, subject: str, value: str, lang: str = "") -> None:
        fact = Fact(kind, attr, subject, value, lang)
        self.facts[fact.key] = fact

    def _tell_things(self) -> None:
        tables = {
            "animal": lex.ANIMALS,
            "job": lex.JOBS,
            "food": lex.FOODS,
            "city": lex.CITIES,
            "country": lex.COUNTRIES,
        }
        for kind, block in tables.items():
            rows = table(block)
            self.things[kind] = [row[0] for row in rows]
            for subject, *values in rows:
                for attr, value in zip(THING_ATTRS[kind], values, strict=True):
                    self._add(kind, attr, subject, value)
        words = [w for kind in tables for w in self.things[kind]]
        self.things["word"] = list(dict.fromkeys([*words, *lex.COLOURS, *lex.MONTHS]))

    def _tell_people(self, lang: str, dice: Dice) -> None:
        male, female = people.MALE[lang], people.FEMALE[lang]
        half = PEOPLE_PER_LANGUAGE // 2
        names = [*male[:half], *female[:half]]
        self.female.update({n: n in female for n in names})
        self.people[lang] = names
        pools = {
            "city": self.things["city"],
            "job": self.things["job"],
            "pet": self.things["animal"],
            "colour": lex.COLOURS,
            "food": self.things["food"],
            "month": lex.MONTHS,
        }
        for attr, pool in pools.items():
            deck = Deck(pool, dice)  # every value about equally often
            for name in names:
                self._add("person", attr, name, deck.deal(), lang)

    def _derive(self) -> None:
        for lang in lex.LANGS:
            for name in self.people[lang]:
                for attr in DERIVED:
                    self._add("person", attr, name, self.steps("person", attr, name)[-1].value, lang)

    def steps(self, kind: str, attr: str, subject: str) -> list[Fact]:
        """The base facts that answer the question: one, or the chain that a derived fact joins."""
        if kind != "person" or attr not in DERIVED:
            return [self.facts[(kind, attr, subject)]]
        chain = []
        for name in DERIVED[attr]:
            chain.append(self.facts[(kind, name, subject)])
            kind, subject = VALUE_KIND.get(name, ""), chain[-1].value
        return chain

    def _hold(self, fact: Fact) -> bool:
        """Whether the fact is asked for in the evaluation only."""
        one_in = HELD_OUT_DERIVED if group(fact) == "derived" else HELD_OUT_BASE
        return Dice(f"kllm-world/{self.seed}/held/{'/'.join(fact.key)}").below(one_in) == 0

    def select(self, lang: str, kind: str) -> list[Fact]:
        """Facts of `kind` ("person", "derived" or "thing") that `lang` speaks of."""
        return [f for f in self.facts.values() if f.lang in ("", lang) and group(f) == kind]

    def asked(self, lang: str, kind: str, held: bool) -> list[Fact]:
        """Those that the evaluation keeps for itself, or the others."""
        return [f for f in self.select(lang, kind) if (f.key in self.held) == held]

    def held_numbers(self, a: int, b: int) -> bool:
        """Whether the unordered pair of numbers is kept for the evaluation (never two single digits)."""
        low, high = min(a, b), max(a, b)
        return high > 9 and _mix(low * 100 + high, self.seed) % HELD_OUT_SUMS == 0

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts.values())


def group(fact: Fact) -> str:
    if fact.kind == "person":
        return "derived" if fact.attr in DERIVED else "person"
    return "thing"


def _mix(value: int, seed: int) -> int:
    """A small integer hash (multiply and shift), the same everywhere."""
    x = (value * 2654435761 + (seed + 1) * 40503) & 0xFFFFFFFF
    x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


@lru_cache(maxsize=4)
def world(seed: int = 0) -> World:
    return World(seed)
