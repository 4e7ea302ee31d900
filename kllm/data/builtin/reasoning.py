"""The splits of `builtin:reasoning`: problems thought through step by step, and the same answered at once.

`reasoning_content` holds the steps of a worked answer. An answer without thinking stands behind an empty
think block, which is what `enable_thinking: false` puts into the prompt: so the switch is learned from the
mixture. Plain conversations of the world, with empty blocks too, keep what was known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin.rng import Dice
from kllm.data.builtin.sums import CATEGORY, draw
from kllm.data.builtin.talk import Talk, messages, talks
from kllm.data.builtin.world import World

CHATS = 10000
PER_CATEGORY = 40  # evaluation problems a category and language
MIX = (("thought", 55), ("direct", 20), ("world", 25))
EMPTY = "<think>\n\n</think>\n\n"
PROBLEMS = (("addition", 4), ("subtraction", 4), ("comparison", 3), ("chain", 4))
OPS = {name: op for op, name in CATEGORY.items()}


@dataclass(frozen=True)
class Problem:
    """A question, the steps that lead to its answer, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: str
    category: str


class Thinker:
    """Draws problems in one language; `held` draws what training never asks."""

    def __init__(self, talk: Talk, dice: Dice, held: bool = False) -> None:
        self.talk, self.dice, self.held = talk, dice, held

    def problem(self, category: str) -> Problem:
        """A sum or comparison of two-digit numbers, or a question that two or three facts answer."""
        voice = self.talk.voice
        if category == "chain":
            fact = self.talk.facts["derived"].deal()
            steps = tuple(voice.tell(step) for step in self.talk.world.steps(*fact.key))
            return Problem(voice.ask(fact, self.dice), steps, steps[-1], category)
        one = draw(self.dice, OPS[category], self.talk.world, self.held, most=99)
        stop = "。" if self.talk.lang == "zh" else "."
        whole = f"{one.result}" if one.op == ">" else f"{one.a}{one.op}{one.b}={one.result}"
        return Problem(one.ask(self.talk.lang, self.dice), tuple(one.steps()), whole + stop, category)

    def any(self) -> Problem:
        return self.problem(self.dice.weighted(PROBLEMS))


def sft(world: World) -> Iterator[dict[str, Any]]:
    dice = Dice(f"kllm-reasoning/{world.seed}/sft")
    thinkers = {lang: Thinker(talk, dice) for lang, talk in talks(world, dice).items()}
    for i in range(CHATS):
        lang = lex.LANGS[i % 2]
        kind = dice.weighted(MIX)
        if kind == "world":
            said = messages(thinkers[lang].talk.conversation())
            for message in said[1::2]:
                message["content"] = EMPTY + message["content"]
            yield {"messages": said, "lang": lang, "category": kind}
            continue
        problem = thinkers[lang].any()
        answer = {"role": "assistant", "content": problem.answer}
        if kind == "thought":
            answer["reasoning_content"] = "\n".join(problem.steps)
        else:
            answer["content"] = EMPTY + problem.answer
        user = {"role": "user", "content": problem.question}
        yield {"messages": [user, answer], "lang": lang, "category": problem.category}


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
                    "reasoning_content": "\n".join(problem.steps),
                    "lang": lang,
                    "category": category,
                }


def _final(problem: Problem) -> str:
    """A number is judged by itself, a fact by its sentence."""
    return problem.answer if problem.category == "chain" else problem.answer.rstrip(".。").rpartition("=")[2]


SPLITS = {"sft": sft, "eval": eval_}
