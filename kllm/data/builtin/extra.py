"""The split for reinforcement learning: prompts whose answers can be checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin.rng import Dice
from kllm.data.builtin.sums import draw
from kllm.data.builtin.talk import talks
from kllm.data.builtin.world import World

PROMPTS = 4000


def rl(world: World) -> Iterator[dict[str, Any]]:
    """Prompts whose answer can be checked: sums (the number) and facts (the sentence)."""
    dice = Dice(f"kllm-world/{world.seed}/rl")
    talk = talks(world, dice)
    for i in range(PROMPTS):
        speaker = talk[lex.LANGS[i % 2]]
        if dice.chance(0.75):
            problem = draw(dice, dice.pick(("+", "-")), world, most=99)
            question, answer = problem.ask(speaker.lang, dice), str(problem.result)
        else:
            turn = speaker.turn(dice.pick(("person", "derived", "thing", "unknown")))
            question, answer = turn.question, turn.answer
        yield {"messages": [{"role": "user", "content": question}], "answer": answer}
