"""The facts of the small world, and which of them are held out.

A fact is (kind, attribute, subject) -> value. Base facts are told in the pretraining text. Derived
facts join two base facts (Tom lives in Paris, Paris is in France) and are never stated in one step.

Held out: the questions about a fixed share of the facts. A held-out base fact is only ever stated, in
pretraining text; nobody asks for it, in any phrasing or language, in any training split. A held-out
derived fact is neither asked for nor stated. A held-out pair of numbers occurs in no training sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin import names as people
from kllm.data.builtin.rng import Deck, Dice

PEOPLE_PER_LANGUAGE = 120
PERSON_ATTRS = ("city", "job", "pet", "hobby", "colour", "food", "drink", "month")
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
HELD_OUT_THINGS = 8  # one thing question in so many is held out
HELD_OUT_DERIVED = 6
HELD_OUT_SUMS = 12


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
    """All facts for one seed. `held` holds the keys of the facts that are not asked for in training."""

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
        self.held = self._hold_out(Dice(f"kllm-world/{seed}/held-out"))

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
        words += [*lex.HOBBIES, *lex.COLOURS, *lex.DRINKS, *lex.MONTHS]
        self.things["word"] = list(dict.fromkeys(words))
        for w in self.things["word"]:
            self._add("word", "chinese", w, word(w, "zh"), "en")
            self._add("word", "english", w, word(w, "en"), "zh")

    def _tell_people(self, lang: str, dice: Dice) -> None:
        male, female = people.MALE[lang], people.FEMALE[lang]
        half = PEOPLE_PER_LANGUAGE // 2
        names = male[:half] + female[:half]
        self.female.update({n: n in female for n in names})
        self.people[lang] = names
        pools = {
            "city": self.things["city"],
            "job": self.things["job"],
            "pet": self.things["animal"],
            "hobby": lex.HOBBIES,
            "colour": lex.COLOURS,
            "food": self.things["food"],
            "drink": lex.DRINKS,
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

    def _hold_out(self, dice: Dice) -> set[tuple[str, str, str]]:
        held: set[tuple[str, str, str]] = set()
        for lang in lex.LANGS:
            deck = Deck(PERSON_ATTRS, dice)
            for name in self.people[lang]:
                held.add(("person", deck.deal(), name))
            for attr, (base, _) in DERIVED.items():
                # who asks for the country is told the city: hold both or ask both
                held |= {("person", attr, n) for n in self.people[lang] if ("person", base, n) in held}
                held |= {("person", attr, n) for n in self.people[lang] if dice.below(HELD_OUT_DERIVED) == 0}
        for kind, attrs in THING_ATTRS.items():
            for attr in attrs:
                names = self.things[kind]
                held |= {(kind, attr, n) for n in dice.some(names, max(1, len(names) // HELD_OUT_THINGS))}
        for attr in ("chinese", "english"):
            names = self.things["word"]
            held |= {("word", attr, n) for n in dice.some(names, len(names) // HELD_OUT_THINGS)}
        return held

    def select(self, lang: str, kind: str, held: bool) -> list[Fact]:
        """Facts of `kind` ("person", "derived", "thing" or "word") that `lang` speaks of, held out or not."""
        return [
            f
            for f in self.facts.values()
            if f.lang in ("", lang) and group(f) == kind and (f.key in self.held) == held
        ]

    def all_of(self, lang: str, kind: str) -> list[Fact]:
        return self.select(lang, kind, False) + self.select(lang, kind, True)

    def held_numbers(self, a: int, b: int) -> bool:
        """Whether the unordered pair of numbers is kept for the evaluation (two-digit pairs only)."""
        low, high = min(a, b), max(a, b)
        return low > 9 and high < 100 and _mix(low * 100 + high, self.seed) % HELD_OUT_SUMS == 0

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts.values())


def group(fact: Fact) -> str:
    if fact.kind == "person":
        return "derived" if fact.attr in DERIVED else "person"
    return "word" if fact.kind == "word" else "thing"


def _mix(value: int, seed: int) -> int:
    """A small integer hash (multiply and shift), the same everywhere."""
    x = (value * 2654435761 + (seed + 1) * 40503) & 0xFFFFFFFF
    x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


@lru_cache(maxsize=4)
def world(seed: int = 0) -> World:
    return World(seed)
