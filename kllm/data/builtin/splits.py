"""The splits: pretraining text, conversations, preferences, verifiable prompts, tool calls, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin.extra import preference, rl, tools
from kllm.data.builtin.rng import Deck, Dice
from kllm.data.builtin.talk import MIX, Talk, Turn, messages, talks
from kllm.data.builtin.voice import Voice, voice
from kllm.data.builtin.world import PERSON_ATTRS, Fact, World

DOCUMENTS = 20000
CHATS = 12000
PER_CATEGORY = 40  # evaluation questions a category and language
SHAPES = (("profile", 30), ("card", 14), ("facts", 20), ("things", 8), ("chat", 18), ("sums", 10))


class Writer:
    """Writes pretraining documents in one language."""

    def __init__(self, speaker: Voice, dice: Dice) -> None:
        world = speaker.world
        self.voice, self.dice, self.lang = speaker, dice, speaker.lang
        self.talk = Talk(speaker, dice)
        self.people = Deck(world.people[self.lang], dice)
        self.person_facts = Deck(world.all_of(self.lang, "person"), dice)
        self.thing_facts = Deck(world.all_of(self.lang, "thing") + world.all_of(self.lang, "word"), dice)
        self.space = " " if self.lang == "en" else ""

    def document(self) -> str:
        return str(getattr(self, self.dice.weighted(SHAPES))())

    def _person(self, attr: str, name: str) -> Fact:
        return self.voice.world.facts[("person", attr, name)]

    def profile(self) -> str:
        """All about one person, in any order, the name first and then often a pronoun."""
        name = self.people.deal()
        attrs = self.dice.shuffled(PERSON_ATTRS)
        return self.space.join(
            self.voice.state(self._person(a, name), self.dice, pronoun=i > 0 and self.dice.chance(0.5))
            for i, a in enumerate(attrs)
        )

    def card(self) -> str:
        """Two people in the shortest form."""
        comma, colon, stop = (", ", ": ", ".") if self.lang == "en" else ("，", "：", "。")
        lines = []
        for _ in range(2):
            name = self.people.deal()
            cells = [
                self.voice.card_words[a]
                + (" " if self.lang == "en" else "")
                + self.voice.value(self._person(a, name))
                for a in self.dice.shuffled(PERSON_ATTRS)
            ]
            lines.append(name + colon + comma.join(cells) + stop)
        return "\n".join(lines)

    def facts(self) -> str:
        return self.space.join(self.voice.state(self.person_facts.deal(), self.dice) for _ in range(8))

    def things(self) -> str:
        return self.space.join(self.voice.state(self.thing_facts.deal(), self.dice) for _ in range(8))

    def chat(self) -> str:
        turns = self.talk.plain(4)
        return "\n".join(f"user: {t.question}\nassistant: {t.answer}" for t in turns)

    def sums(self) -> str:
        turns = [self.talk.turn(self.dice.pick(("addition", "subtraction", "comparison"))) for _ in range(4)]
        return "\n".join(f"user: {t.question}\nassistant: {t.answer}" for t in turns)


def pretrain(world: World) -> Iterator[dict[str, Any]]:
    dice = Dice(f"kllm-world/{world.seed}/pretrain")
    writers = [Writer(voice(lang, world), dice) for lang in lex.LANGS]
    for i in range(DOCUMENTS):
        yield {"text": writers[i % 2].document()}


def sft(world: World) -> Iterator[dict[str, Any]]:
    dice = Dice(f"kllm-world/{world.seed}/sft")
    talk = talks(world, dice)
    for i in range(CHATS):
        lang = lex.LANGS[i % 2]
        turns = conversation(talk[lang], dice)
        yield {"messages": messages(turns), "lang": lang, "category": turns[-1].category}


def conversation(talk: Talk, dice: Dice) -> list[Turn]:
    kind = dice.weighted((("plain", 60), ("follow", 18), ("memory", 22)))
    if kind == "plain":
        return talk.plain(1 + dice.below(3))
    if kind == "memory":
        return talk.memory()
    return (talk.plain(1) if dice.chance(0.3) else []) + talk.follow_up()


def eval_(world: World) -> Iterator[dict[str, Any]]:
    dice = Dice(f"kllm-world/{world.seed}/eval")
    talk = talks(world, dice, held=True)
    categories = [name for name, _ in MIX] + ["follow-up", "memory"]
    seen: set[str] = set()
    for _ in range(PER_CATEGORY):
        for category in categories:
            for lang in lex.LANGS:
                for _attempt in range(20):
                    turns = _held_out(talk[lang], category)
                    key = json.dumps([t.question for t in turns], ensure_ascii=False)
                    if key not in seen:
                        break
                else:
                    continue
                seen.add(key)
                *before, last = turns
                yield {
                    "question": last.question,
                    "answer": _final(last),
                    "messages": [*messages(before), {"role": "user", "content": last.question}],
                    "lang": lang,
                    "category": category,
                }


def _held_out(talk: Talk, category: str) -> list[Turn]:
    if category == "follow-up":
        return talk.follow_up()
    return talk.memory() if category == "memory" else [talk.turn(category)]


def _final(turn: Turn) -> str:
    """A sum is judged by its result, everything else by the whole sentence."""
    if turn.category in ("addition", "subtraction"):
        return turn.answer.rstrip(".。").rpartition("=")[2]
    return turn.answer


SPLITS = {"pretrain": pretrain, "sft": sft, "preference": preference, "rl": rl, "tools": tools, "eval": eval_}
