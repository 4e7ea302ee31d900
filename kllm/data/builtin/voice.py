"""Puts facts, questions and answers into words."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from kllm.data.builtin import phrases_en, phrases_zh
from kllm.data.builtin.rng import Dice
from kllm.data.builtin.world import Fact, World, word

MODULES: dict[str, ModuleType] = {"en": phrases_en, "zh": phrases_zh}
Phrases = dict[str, dict[str, list[str]]]  # "kind.attr" -> {">": statements, "?": questions, "!": held out}


def parse(*blocks: str) -> Phrases:
    """Reads the phrase blocks of `phrases_en` / `phrases_zh`."""
    out: Phrases = {}
    for block in blocks:
        for paragraph in block.strip().split("\n\n"):
            head, *lines = paragraph.splitlines()
            out[head] = {mark: [line[2:] for line in lines if line[0] == mark] for mark in ">?!"}
    return out


class Voice:
    """One language's way to speak about one world."""

    def __init__(self, lang: str, world: World) -> None:
        module = MODULES[lang]
        self.lang, self.world = lang, world
        self.space = " " if lang == "en" else ""  # between sentences
        self.phrases = parse(module.PERSON, module.DERIVED, module.THING)
        self.identity = parse(module.IDENTITY)
        self.card_words: dict[str, str] = module.CARD
        self.greetings: tuple[str, ...] = module.GREETINGS

    def subject(self, fact: Fact) -> str:
        name = word(fact.subject, self.lang)
        return f"{article(name)} {name}" if self.lang == "en" and fact.kind in ("animal", "job") else name

    def value(self, fact: Fact) -> str:
        return word(fact.value, self.lang)

    def fill(self, template: str, fact: Fact, pronoun: bool = False) -> str:
        name, value = self.subject(fact), self.value(fact)
        if self.lang == "zh":
            he = ("她" if self.world.female.get(fact.subject) else "他") if fact.kind == "person" else "它"
            return template.replace("{n}", he if pronoun else name).replace("{v}", value)
        forms = (name, f"{name}'s", name)
        if pronoun:
            forms = ("it", "its", "it")
            if fact.kind == "person":
                forms = ("she", "her", "her") if self.world.female.get(fact.subject) else ("he", "his", "him")
        out = template.replace("{n}", forms[0]).replace("{p}", forms[1]).replace("{o}", forms[2])
        return capital(out.replace("{a}", article(value)).replace("{v}", value))

    def state(self, fact: Fact, dice: Dice, pronoun: bool = False) -> str:
        """A sentence that states a base fact, in any phrasing."""
        ways = self.phrases[f"{fact.kind}.{fact.attr}"][">"]
        if pronoun:
            ways = [way for way in ways if " of {n}" not in way]
        return self.fill(dice.pick(ways), fact, pronoun)

    def ask(self, fact: Fact, dice: Dice, pronoun: bool = False) -> str:
        """A question for the fact, in any phrasing."""
        return self.fill(dice.pick(self.phrases[f"{fact.kind}.{fact.attr}"]["?"]), fact, pronoun)

    def tell(self, fact: Fact) -> str:
        """The sentence in which an answer states a base fact."""
        return self.fill(self.phrases[f"{fact.kind}.{fact.attr}"][">"][0], fact)

    def answer(self, fact: Fact) -> str:
        """The canonical answer: the fact; for a derived one the facts that lead to it, one after another."""
        return self.space.join(self.tell(step) for step in self.world.steps(*fact.key))

    def greet(self, question: str, dice: Dice, probability: float = 0.2) -> str:
        return dice.pick(self.greetings) + question if dice.chance(probability) else question


def article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@lru_cache(maxsize=8)
def voice(lang: str, world: World) -> Voice:
    return Voice(lang, world)
