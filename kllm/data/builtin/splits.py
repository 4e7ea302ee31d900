"""The splits: pretraining text, conversations, preferences, verifiable prompts, tool calls, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin import tools
from kllm.data.builtin.extra import rl
from kllm.data.builtin.preference import preference, preference_eval
from kllm.data.builtin.rng import Deck, Dice
from kllm.data.builtin.talk import MIX, Talk, Turn, messages, talks
from kllm.data.builtin.voice import Voice, voice
from kllm.data.builtin.world import PERSON_ATTRS, Fact, World

DOCUMENTS = 30000
CHATS = 20000
PER_CATEGORY = 40  # evaluation questions a category and language
SHAPES = (
    ("profile", 12),
    ("card", 12),
    ("facts", 8),
    ("things", 12),
    ("chat", 40),
    ("sums", 8),
    ("echo", 8),
)


class Writer:
    """Writes pretraining documents in one language."""

    def __init__(self, speaker: Voice, dice: Dice) -> None:
        world = speaker.world
        self.voice, self.dice, self.lang = speaker, dice, speaker.lang
        self.talk = Talk(speaker, dice)
        self.people = Deck(world.people[self.lang], dice)
        self.person_facts = Deck(world.select(self.lang, "person"), dice)
        self.thing_facts = Deck(world.select(self.lang, "thing"), dice)
        self.space = " " if self.lang == "en" else ""

    def document(self) -> str:
        return str(getattr(self, self.dice.weighted(SHAPES))())

    def _person(self, attr: str, name: str) -> Fact:
        return self.voice.world.facts[("person", attr, name)]

    def profile(self) -> str:
        """All about one person, in any order, by name or pronoun."""
        name = self.people.deal()
        lines = [f"About {name}." if self.lang == "en" else f"关于{name}。"]
        for i, attr in enumerate(self.dice.shuffled(PERSON_ATTRS)):
            pronoun = i > 0 and self.dice.chance(0.4)
            lines.append(self.voice.state(self._person(attr, name), self.dice, pronoun))
        return self.space.join(lines)

    def card(self) -> str:
        """Two people in the shortest form."""
        comma, stop, head = (", ", ".", "Name ") if self.lang == "en" else ("，", "。", "姓名")
        lines = []
        for _ in range(2):
            name = self.people.deal()
            cells = [
                self.voice.card_words[attr] + self.space + self.voice.value(self._person(attr, name))
                for attr in self.dice.shuffled(PERSON_ATTRS)
            ]
            lines.append(comma.join([head + name, *cells]) + stop)
        return "\n".join(lines)

    def facts(self) -> str:
        head = "People: " if self.lang == "en" else "人们："
        return head + self.space.join(self.voice.state(self.person_facts.deal(), self.dice) for _ in range(8))

    def things(self) -> str:
        head = "Facts: " if self.lang == "en" else "知识："
        return head + self.space.join(self.voice.state(self.thing_facts.deal(), self.dice) for _ in range(8))

    def chat(self) -> str:
        return transcript(self.talk.conversation())

    def sums(self) -> str:
        kinds = ("addition", "subtraction", "comparison")
        return transcript([self.talk.turn(self.dice.pick(kinds)) for _ in range(3)])

    def echo(self) -> str:
        """The same list twice: nothing teaches looking back sooner."""
        words = self.talk.words(self.dice.between(3, 8))
        return (
            f"Words: {words}.\nAgain: {words}." if self.lang == "en" else f"词语：{words}。\n再来：{words}。"
        )


def transcript(turns: list[Turn]) -> str:
    """A conversation as plain text; `kllm.eval` asks models without chat turns in this form."""
    return "\n".join(f"user:\n{t.question}\nassistant:\n{t.answer}" for t in turns)


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
        turns = talk[lang].conversation()
        yield {"messages": messages(turns), "lang": lang, "category": turns[-1].category}


def eval_(world: World) -> Iterator[dict[str, Any]]:
    dice = Dice(f"kllm-world/{world.seed}/eval")
    talk = talks(world, dice, held=True)
    categories = [name for name, _ in MIX if name != "about"] + ["follow-up", "memory"]
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
    if turn.category in ("addition", "subtraction", "comparison"):
        return turn.answer.rstrip(".。").rpartition("=")[2]
    return turn.answer


SPLITS = {
    "pretrain": pretrain,
    "sft": sft,
    "preference": preference,
    "rl": rl,
    "tools": tools.sft,  # the name of old; builtin:tools is a subject of its own
    "eval": eval_,
    "preference-eval": preference_eval,
}
