"""The splits of `builtin:reasoning`: problems of the world, thought through step by step before the answer.

`reasoning_content` holds the steps: those of a sum, or the facts that lead from one to the next. Besides
there are conversations of the world whose answers stand behind an empty think block, which is what
`enable_thinking: false` puts into the prompt. In some of them the same problems are answered at once. So
both is learned from the mixture: to think where it helps, and to leave it when asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin.rng import Dice
from kllm.data.builtin.sums import CATEGORY, draw
from kllm.data.builtin.talk import Talk, Turn, messages, talks
from kllm.data.builtin.world import World

CHATS = 10000
THOUGHT = 0.5  # share of the conversations that are a problem thought through
DIRECT = 0.3  # share of the others that may have problems: thinking has to stay the likelier way
PER_CATEGORY = 40  # evaluation problems a category and language
EMPTY = "<think>\n\n</think>\n\n"
PROBLEMS = (("addition", 3), ("subtraction", 3), ("comparison", 3), ("chain", 4))
OPS = {name: op for op, name in CATEGORY.items()}


@dataclass(frozen=True)
class Problem:
    """A question, the steps that lead to its answer, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: str
    category: str

    @property
    def thinking(self) -> str:
        return "\n".join(self.steps)


class Thinker:
    """Draws problems in one language; `held` draws what training never asks."""

    def __init__(self, talk: Talk, dice: Dice, held: bool = False) -> None:
        self.talk, self.dice, self.held = talk, dice, held

    def problem(self, category: str) -> Problem:
        """A sum, a comparison, or what two or three facts answer ("Tom: Paris", "Paris: France")."""
        voice = self.talk.voice
        if category == "chain":
            fact = self.talk.facts["derived"].deal()
            chain = self.talk.world.steps(*fact.key)
            steps = tuple(f"{voice.subject(step)}: {voice.value(step)}" for step in chain)
            return Problem(voice.ask(fact, self.dice), steps, voice.answer(fact), category)
        one = draw(self.dice, OPS[category], self.talk.world, self.held)
        stop = "。" if self.talk.lang == "zh" else "."
        whole = f"{one.result}" if one.op == ">" else f"{one.a}{one.op}{one.b}={one.result}"
        return Problem(one.ask(self.talk.lang, self.dice), tuple(one.steps()), whole + stop, category)

    def unthought(self) -> list[Turn]:
        """A conversation of the world; most of them without any problem."""
        mixed = self.dice.chance(DIRECT)
        while True:
            turns = self.talk.conversation()
            if mixed or not any(turn.category in (*OPS, "derived") for turn in turns):
                return turns


def sft(world: World) -> Iterator[dict[str, Any]]:
    dice = Dice(f"kllm-reasoning/{world.seed}/sft")
    thinkers = {lang: Thinker(talk, dice) for lang, talk in talks(world, dice).items()}
    for i in range(CHATS):
        thinker = thinkers[lex.LANGS[i % 2]]
        if dice.chance(THOUGHT):
            category = dice.weighted(PROBLEMS)
            one = thinker.problem(category)
            said = [
                {"role": "user", "content": one.question},
                {"role": "assistant", "content": one.answer, "reasoning_content": one.thinking},
            ]
        else:
            turns = thinker.unthought()
            category, said = turns[-1].category, messages(turns)
            for message in said[1::2]:
                message["content"] = EMPTY + message["content"]
        yield {"messages": said, "lang": thinker.talk.lang, "category": category}


def eval_(world: World) -> Iterator[dict[str, Any]]:
    """Held-out problems, categories and languages in turn; `reasoning_content` is one right way to think."""
    dice = Dice(f"kllm-reasoning/{world.seed}/eval")
    thinkers = {lang: Thinker(talk, dice, held=True) for lang, talk in talks(world, dice, held=True).items()}
    seen: set[str] = set()
    for _ in range(PER_CATEGORY):
        for category, _weight in PROBLEMS:
            for lang in lex.LANGS:
                problem = thinkers[lang].problem(category)
                while problem.question in seen:
                    problem = thinkers[lang].problem(category)
                seen.add(problem.question)
                yield {
                    "question": problem.question,
                    "answer": _final(problem),
                    "messages": [{"role": "user", "content": problem.question}],
                    "reasoning_content": problem.thinking,
                    "lang": lang,
                    "category": category,
                }


def _final(problem: Problem) -> str:
    """A number is judged by itself, facts by their sentences."""
    return problem.answer if problem.category == "chain" else problem.answer.rstrip(".。").rpartition("=")[2]


SPLITS = {"sft": sft, "eval": eval_}
