"""The facts of the small world, and which questions are kept for the evaluation.

A fact is (kind, attribute, subject) -> value. Base facts are told in the pretraining text. Derived
facts join two base facts (Tom lives in Paris, Paris is in France) and are never stated in one step.

Held out, so that no evaluation question occurs in any training split: of every fact one of its
phrasings in each language (`Voice.ask`); every twelfth pair of numbers; combinations of what the user
said about himself; who is asked for after whom; a quarter of the made-up names; two phrasings of each
question about the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin import names as people
from kllm.data.builtin.rng import Deck, Dice

PEOPLE_PER_LANGUAGE = 60
PERSON_ATTRS = ("city", "job", "pet", "colour", "food", "month")
# derived attribute -> (the person's attribute, the attribute of its value)
DERIVED = {"country": ("city", "country"), "workplace": ("job", "place"), "petfood": ("pet", "diet")}
THING_ATTRS = {
    "animal": ("class", "legs", "home", "diet", "cover"),
    "job": ("place", "tool"),
    "food": ("kind", "colour", "taste"),
    "city": ("country",),
    "country": ("continent", "capital", "language"),
}
VALUE_KIND = {"city": "city", "job": "job", "pet": "animal"}
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
                    self._add("person", attr, name, self.steps("person", attr, name)[1].value, lang)

    def steps(self, kind: str, attr: str, subject: str) -> list[Fact]:
        """The base facts that answer the question: one, or the two that a derived fact joins."""
        if kind == "person" and attr in DERIVED:
            first, second = DERIVED[attr]
            base = self.facts[("person", first, subject)]
            return [base, self.facts[(VALUE_KIND[first], second, base.value)]]
        return [self.facts[(kind, attr, subject)]]

    def select(self, lang: str, kind: str) -> list[Fact]:
        """Facts of `kind` ("person", "derived" or "thing") that `lang` speaks of."""
        return [f for f in self.facts.values() if f.lang in ("", lang) and group(f) == kind]

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
