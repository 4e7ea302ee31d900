"""Questions with their answers, and conversations, drawn from the world."""

from __future__ import annotations

from dataclasses import dataclass

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin.names import UNKNOWN as UNKNOWN_NAMES
from kllm.data.builtin.rng import Deck, Dice
from kllm.data.builtin.sums import CATEGORY, draw
from kllm.data.builtin.voice import Voice
from kllm.data.builtin.world import DERIVED, PERSON_ATTRS, Fact, World, group, word

# How often a training question is of each category: the hard ones more often.
MIX = (
    ("person", 11),
    ("derived", 14),
    ("thing", 16),
    ("addition", 11),
    ("subtraction", 12),
    ("comparison", 13),
    ("identity", 8),
    ("unknown", 6),
    ("about", 9),
)
SHAPES = (("plain", 52), ("follow", 16), ("memory", 32))
UNKNOWN_HELD = 4  # one made-up name in so many is kept for the evaluation
MEMORY = {
    "en": {
        "name": ("My name is {v}.", "I am called {v}.", "Hi, I am {v}.", "Call me {v}."),
        "city": ("I live in {v}.", "My home is in {v}.", "I come from {v}."),
        "colour": ("I like the colour {v}.", "My favourite colour is {v}."),
        "pet": ("I have {a} {v}.", "My pet is {a} {v}."),
        "job": ("I am {a} {v}.", "My job is {v}."),
    },
    "zh": {
        "name": ("我叫{v}。", "我的名字是{v}。", "你好，我是{v}。", "叫我{v}吧。"),
        "city": ("我住在{v}。", "我的家在{v}。", "我来自{v}。"),
        "colour": ("我喜欢{v}。", "我最爱的颜色是{v}。"),
        "pet": ("我养了一只{v}。", "我的宠物是{v}。"),
        "job": ("我的工作是{v}。", "我的职业是{v}。"),
    },
}
RECALL = {
    "en": {
        "name": (("What is my name?", "Who am I?", "Do you remember my name?"), "Your name is {v}."),
        "city": (("Where do I live?", "Where is my home?"), "Your home is in {v}."),
        "colour": (("What colour do I like?", "What is my favourite colour?"), "Your colour is {v}."),
        "pet": (("What pet do I have?", "What is my pet?"), "Your pet is {a} {v}."),
        "job": (("What is my job?", "What do I do for a living?"), "Your job is {v}."),
    },
    "zh": {
        "name": (("我叫什么名字？", "我是谁？", "你还记得我的名字吗？"), "你叫{v}。"),
        "city": (("我住在哪里？", "我的家在哪里？"), "你住在{v}。"),
        "colour": (("我喜欢什么颜色？", "我最爱的颜色是什么？"), "你喜欢{v}。"),
        "pet": (("我养了什么宠物？", "我的宠物是什么？"), "你养了{v}。"),
        "job": (("我的工作是什么？", "我的职业是什么？"), "你的工作是{v}。"),
    },
}
NOTED = {
    "en": {"name": "Hello, {v}!", "": "OK."},
    "zh": {"name": "你好，{v}！", "": "好。"},
}
UNKNOWN = {"en": "I don't know.", "zh": "我不知道。"}
ABOUT = {
    "en": ("Tell me about {n}.", "What do you know about {n}?", "Say something about {n}."),
    "zh": ("介绍一下{n}。", "说说{n}。", "关于{n}，你知道什么？"),
}
AND = {
    "en": ("And {n}?", "What about {n}?", "And what about {n}?"),
    "zh": ("{n}呢？", "那{n}呢？", "那么{n}呢？"),
}


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str
    category: str


class Talk:
    """Draws turns in one language; `held` draws what training never asks."""

    def __init__(self, voice: Voice, dice: Dice, held: bool = False) -> None:
        self.voice, self.world, self.dice, self.held = voice, voice.world, dice, held
        self.lang = voice.lang
        self.facts = {
            kind: Deck(self.world.asked(self.lang, kind, held), dice)
            for kind in ("person", "derived", "thing")
        }
        self.by_subject: dict[tuple[str, str], list[Fact]] = {}
        for fact in (*self.world.select(self.lang, "person"), *self.world.select(self.lang, "thing")):
            self.by_subject.setdefault((fact.kind, fact.subject), []).append(fact)
        self.subjects = Deck([key for key in self.by_subject if key[0] == "person"], dice)
        self.things = Deck(
            [key for key, facts in self.by_subject.items() if len(facts) > 1 and key[0] != "person"], dice
        )
        self.identity = Deck(
            [(topic, q) for topic, lines in voice.identity.items() for q in lines["!" if held else "?"]], dice
        )

    def turn(self, category: str) -> Turn:
        if category in self.facts:
            return self.ask(self.facts[category].deal())
        if category == "identity":
            topic, question = self.identity.deal()
            return Turn(question, self.voice.identity[topic][">"][0], category)
        if category == "unknown":
            return self.unknown()
        if category == "about":
            return self.about()
        op = next(op for op, name in CATEGORY.items() if name == category)
        problem = draw(self.dice, op, self.world, self.held)
        answer = problem.work(self.lang)
        question = problem.ask(self.lang, self.dice)
        return Turn(self.voice.greet(question, self.dice, 0.1), answer, category)

    def ask(self, fact: Fact, pronoun: bool = False) -> Turn:
        question = self.voice.ask(fact, self.dice, pronoun)
        if not pronoun:
            question = self.voice.greet(question, self.dice)
        return Turn(question, self.voice.answer(fact), group(fact))

    def about(self) -> Turn:
        """All there is to tell about a person or a thing, also what only the evaluation asks for."""
        subject = self.subjects.deal() if self.dice.chance(0.6) else self.things.deal()
        facts = [f for f in self.by_subject[subject] if group(f) != "derived"]
        question = self.dice.pick(ABOUT[self.lang]).format(n=self.voice.subject(facts[0]))
        return Turn(question, self.voice.space.join(self.voice.tell(f) for f in facts), "about")

    def made_up(self) -> str:
        """A name that nobody in the world has; some are kept for the evaluation."""
        first, second = UNKNOWN_NAMES[self.lang]
        while True:
            i, j = self.dice.below(len(first)), self.dice.below(len(second))
            if ((3 * i + j) % UNKNOWN_HELD == 0) == self.held:
                return first[i] + second[j]

    def unknown(self) -> Turn:
        name = self.made_up()
        attr = self.dice.pick((*PERSON_ATTRS, *DERIVED))
        fact = Fact("person", attr, name, "")
        question = self.voice.greet(self.voice.ask(fact, self.dice), self.dice)
        return Turn(question, UNKNOWN[self.lang], "unknown")

    def words(self, n: int) -> str:
        """A list of `n` different words and names, read aloud."""
        pool = [*self.world.people[self.lang], *(word(w, self.lang) for w in self.world.things["word"])]
        return (", " if self.lang == "en" else "、").join(self.dice.some(pool, n))

    # conversations

    def conversation(self) -> list[Turn]:
        """A conversation as training has them: single questions, follow-ups, memory."""
        shape = self.dice.weighted(SHAPES)
        if shape == "memory":
            return self.memory()
        if shape == "follow":
            return (self.plain(1) if self.dice.chance(0.3) else []) + self.follow_up()
        return self.plain(self.dice.between(1, 3))

    def plain(self, turns: int) -> list[Turn]:
        return [self.turn(self.dice.weighted(MIX)) for _ in range(turns)]

    def follow_up(self) -> list[Turn]:
        """A question about somebody, then one that only makes sense after it."""
        fact = self.facts[self.dice.pick(("person", "person", "derived"))].deal()
        if self.dice.chance(0.6):  # another attribute of the same person
            opener = self._opener([("person", a, fact.subject) for a in PERSON_ATTRS if a != fact.attr])
            question = self.voice.ask(fact, self.dice, pronoun=True)
        else:  # the same attribute of somebody else
            people = self.world.people[self.lang]
            opener = self._opener([("person", fact.attr, n) for n in people if n != fact.subject])
            question = self.dice.pick(AND[self.lang]).format(n=fact.subject)
        return [self.ask(opener), Turn(question, self.voice.answer(fact), "follow-up")]

    def _opener(self, keys: list[tuple[str, str, str]]) -> Fact:
        """One of the facts, none that only the evaluation asks for."""
        return self.world.facts[self.dice.pick([key for key in keys if key not in self.world.held])]

    def memory(self) -> list[Turn]:
        """The user says something about himself and asks for it later."""
        topics = self.dice.some(("name", "city", "colour", "pet", "job"), 1 + self.dice.below(2))
        while True:
            values = [self._memory_value(t) for t in topics]
            if self._kept(values) == self.held:
                break
        told = [self._tell(t, v) for t, v in zip(topics, values, strict=True)]
        between = [] if self.dice.chance(0.5) else [self._filler()]
        return [*told, *between, self._recall(*self.dice.pick(list(zip(topics, values, strict=True))))]

    def _filler(self) -> Turn:
        talk = self if not self.held else Talk(self.voice, self.dice)
        return talk.turn(self.dice.pick(("person", "thing", "identity", "addition")))

    def _kept(self, values: list[str]) -> bool:
        """Whether this combination of things said is kept for the evaluation."""
        return Dice("/".join(values)).below(6) == 0

    def _memory_value(self, topic: str) -> str:
        if topic == "name":
            return self.dice.pick(self.world.people[self.lang])
        pools = {
            "city": self.world.things["city"],
            "colour": lex.COLOURS,
            "pet": self.world.things["animal"],
            "job": self.world.things["job"],
        }
        return word(self.dice.pick(pools[topic]), self.lang)

    def _tell(self, topic: str, value: str) -> Turn:
        said = _fill(self.dice.pick(MEMORY[self.lang][topic]), value)
        noted = NOTED[self.lang]
        return Turn(said, _fill(noted.get(topic, noted[""]), value), "memory")

    def _recall(self, topic: str, value: str) -> Turn:
        questions, answer = RECALL[self.lang][topic]
        return Turn(self.dice.pick(questions), _fill(answer, value), "memory")


def _fill(template: str, value: str) -> str:
    from kllm.data.builtin.voice import article

    return template.replace("{a}", article(value)).replace("{v}", value)


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """The turns as chat messages, user and assistant in alternation."""
    return [
        m
        for t in turns
        for m in ({"role": "user", "content": t.question}, {"role": "assistant", "content": t.answer})
    ]


def talks(world: World, dice: Dice, held: bool = False) -> dict[str, Talk]:
    from kllm.data.builtin.voice import voice

    return {lang: Talk(voice(lang, world), dice, held) for lang in lex.LANGS}
