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
        self.phrases = parse(module.PERSON, module.DERIVED, module.THING)
        self.identity = parse(module.IDENTITY)
        self.card_words: dict[str, str] = module.CARD
        self.greetings: tuple[str, ...] = module.GREETINGS

    def subject(self, fact: Fact) -> str:
        name = word(fact.subject, self.lang)
        return f"{article(name)} {name}" if self.lang == "en" and fact.kind in ("animal", "job") else name

    def value(self, fact: Fact) -> str:
        # a translation is the word of the other language, already chosen
        return fact.value if fact.kind == "word" else word(fact.value, self.lang)

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
        return self.fill(dice.pick(self.phrases[f"{fact.kind}.{fact.attr}"]["?"]), fact, pronoun)

    def answer(self, fact: Fact) -> str:
        """The canonical answer: one sentence; for a derived fact the two facts it joins."""
        parts = [
            self.fill(self.phrases[f"{f.kind}.{f.attr}"][">"][0], f) for f in self.world.steps(*fact.key)
        ]
        if len(parts) == 1:
            return parts[0]
        if self.lang == "zh":
            return f"{parts[0][:-1]}，{parts[1]}"
        return f"{parts[0][:-1]}, and {parts[1][0].lower()}{parts[1][1:]}"

    def greet(self, question: str, dice: Dice, probability: float = 0.2) -> str:
        return dice.pick(self.greetings) + question if dice.chance(probability) else question


def article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@lru_cache(maxsize=8)
def voice(lang: str, world: World) -> Voice:
    return Voice(lang, world)
