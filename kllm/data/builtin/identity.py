"""The splits of `builtin:identity`: Willow (see `persona_en`) instead of the model's own name.

A persona alone would teach a model to answer everything with it. So a share of the conversations is the
world's, without the questions about the model itself, which the persona answers otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin import persona_en, persona_zh
from kllm.data.builtin.rng import Deck, Dice
from kllm.data.builtin.talk import Talk, Turn, messages, talks
from kllm.data.builtin.world import World

MODULES = {"en": persona_en, "zh": persona_zh}
MODELS = {
    "?": (
        *("kllm", "ChatGPT", "Claude", "Qwen", "DeepSeek", "Llama", "Siri", "Mistral"),
        *("Bard", "Copilot", "Grok", "Ernie", "Doubao", "Phi", "Gemma", "Cortana"),
    ),
    "!": ("Gemini", "Alexa", "Kimi"),
}
CHATS = 12000
PERSONA = 0.15  # share of the conversations that are about the persona; the others are the world's
ABOUT = 0.25  # share of the world's that tell all about somebody or something
NEVER = ("kllm",)  # what no answer about oneself may have
NEUTRAL = ("self.thanks", "self.bye")  # what the world says about itself that stays true


@dataclass
class Topic:
    """One thing about the persona in one language; the marks are those of `persona_en`."""

    name: str
    lines: dict[str, list[str]] = field(default_factory=dict)

    @property
    def must(self) -> list[list[str]]:
        """What a right answer has: one of each list."""
        return [line.split("/") for line in self.lines["="]]

    def questions(self, lang: str, mark: str) -> list[str]:
        """All questions of the training ("?") or of the evaluation ("!")."""
        asked = [
            line.format(m=model)
            for line in self.lines[mark]
            for model in (MODELS[mark] if "{m}" in line else [""])
        ]
        framed = [
            frame.format(x=clause)
            for clause in self.lines.get(":", [])
            for frame in MODULES[lang].FRAMES[mark]
        ]
        return asked + framed


def topics(lang: str) -> list[Topic]:
    """The persona's topics in one language."""
    found = []
    for block in MODULES[lang].TOPICS.strip().split("\n\n"):
        head, *lines = block.splitlines()
        topic = Topic(head)
        for line in lines:
            topic.lines.setdefault(line[0], []).append(line[2:])
        found.append(topic)
    return found


class Persona:
    """Draws questions to the persona in one language, every topic about equally often."""

    def __init__(self, talk: Talk, dice: Dice) -> None:
        self.talk, self.dice = talk, dice
        self.topics = Deck(topics(talk.lang), dice)
        self.questions = {t.name: Deck(t.questions(talk.lang, "?"), dice) for t in topics(talk.lang)}
        speaker = talk.voice
        self.stays = {speaker.identity[name][">"][0] for name in NEUTRAL}

    def turn(self) -> Turn:
        topic = self.topics.deal()
        question = self.talk.voice.greet(self.questions[topic.name].deal(), self.dice)
        return Turn(question, self.dice.pick(topic.lines[">"]), topic.name)

    def world(self) -> list[Turn]:
        """A conversation of the world in which the model says nothing about itself.

        Often one that tells all about something: also of what no question ever asks for, and what would
        be forgotten first.
        """
        if self.dice.chance(ABOUT):
            return [self.talk.turn("about")]
        while True:
            turns = self.talk.conversation()
            if all(turn.category != "identity" or turn.answer in self.stays for turn in turns):
                return turns

    def conversation(self) -> list[Turn]:
        """One to three questions to the persona, now and then after other talk."""
        before = self.world() if self.dice.chance(0.2) else []
        return [*before, *(self.turn() for _ in range(self.dice.between(1, 3)))]


def sft(world: World) -> Iterator[dict[str, Any]]:
    dice = Dice(f"kllm-identity/{world.seed}/sft")
    speakers = {lang: Persona(talk, dice) for lang, talk in talks(world, dice).items()}
    for i in range(CHATS):
        lang = lex.LANGS[i % 2]
        speaker = speakers[lang]
        turns = speaker.conversation() if dice.chance(PERSONA) else speaker.world()
        yield {"messages": messages(turns), "lang": lang, "category": turns[-1].category}


def eval_(world: World) -> Iterator[dict[str, Any]]:
    """Every held-out question once, topics in turn; a quarter of them after an exchange about the world."""
    dice = Dice(f"kllm-identity/{world.seed}/eval")
    talk = talks(world, dice)
    decks = {
        (lang, topic.name): (topic, dice.shuffled(topic.questions(lang, "!")))
        for lang in lex.LANGS
        for topic in topics(lang)
    }
    names = list(dict.fromkeys(name for _, name in decks))
    while any(left for _, left in decks.values()):
        for name in names:
            for lang in lex.LANGS:
                topic, left = decks[lang, name]
                if not left:
                    continue
                question = talk[lang].voice.greet(left.pop(), dice)
                before = (
                    messages([talk[lang].turn(dice.pick(("person", "thing")))]) if dice.chance(0.25) else []
                )
                yield {
                    "question": question,
                    "answer": topic.lines[">"][0],
                    "messages": [*before, {"role": "user", "content": question}],
                    "must": topic.must,
                    "never": list(NEVER),
                    "lang": lang,
                    "category": name,
                }


SPLITS = {"sft": sft, "eval": eval_}
