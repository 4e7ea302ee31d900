"""The splits of `builtin:tools`: conversations in which the model may call tools, and learns when to.

The tools are offered by their real schemas, in varied sets and orders, now and then beside one that is of
no use. What a tool answers (calculator: sums; python: lists and words, and sums where there is no
calculator; clock) is called for; what needs none is answered at once; what has no tool here is said to
have none; and when a tool fails the answer says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin import othertools
from kllm.data.builtin import toolphrases as phrases
from kllm.data.builtin.rng import Dice
from kllm.data.builtin.talk import Talk, Turn, messages, talks
from kllm.data.builtin.tooltasks import Task, Tasks
from kllm.data.builtin.world import World
from kllm.tokenizer.template import DEFAULT_TEMPLATE, render
from kllm.tools.registry import schemas

CHATS = 9000
PRACTICE = 30000
OFFERED = 2000
ECHO = 0.35  # of the turns of `practice`
PER_CATEGORY = 40  # evaluation questions a category and language
# What is offered: "other" stands for a tool of `othertools`.
OFFERS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("calculator",), 30),
    (("python",), 22),
    (("calculator", "python"), 28),
    (("clock",), 4),
    (("calculator", "clock"), 8),
    (("calculator", "clock", "python"), 8),
    (("calculator", "other"), 3),
    (("python", "other"), 3),
    ((), 2),
)
ALL = ("calculator", "python", "clock")
MOST_TURNS = (6, 5, 4, 2)
KINDS = (
    ("sum", 38),
    ("list", 26),
    ("text", 30),
    ("clock", 12),
    ("direct", 8),
    ("error", 3),
    ("failure", 1),
)
NEEDS = {"sum": "calculator", "list": "python", "text": "python", "clock": "clock", "error": "calculator"}
DIRECT = ("person", "derived", "thing", "addition", "subtraction", "unknown")
MISSING = 0.5  # how many of the questions whose tool is not on offer are asked all the same
THEN = 0.3  # how often a sum goes on from its result
CATEGORIES = ("sum", "follow-up", "python sum", "list", "text", "clock", "direct", "missing", "error")

Messages = list[dict[str, Any]]


@lru_cache(maxsize=16)
def _schema(name: str) -> dict[str, Any]:
    return schemas([name])[0]


class Talker:
    """Draws questions and their answers, with tools or without, in one language."""

    def __init__(self, talk: Talk, dice: Dice, held: bool = False) -> None:
        self.talk, self.dice = talk, dice
        self.lang = talk.lang
        self.tasks = Tasks(self.lang, dice, held)
        self.others = othertools.HELD_OUT if held else othertools.TRAINED

    def offer(self, names: Sequence[str]) -> tuple[str, ...]:
        """Tools in any order, those that stand for others chosen."""
        chosen = [self.dice.pick(self.others) if name == "other" else name for name in names]
        return tuple(self.dice.shuffled(chosen))

    def task(self, kind: str, offered: Sequence[str]) -> Task | None:
        """A task that one of the tools on offer is for; None if none is."""
        if kind == "sum" and "calculator" not in offered and "python" in offered:
            return self.tasks.sum("python")
        if NEEDS[kind] not in offered:
            return None
        return self.tasks.by_zero() if kind == "error" else getattr(self.tasks, kind)()  # type: ignore[no-any-return]

    def turn(self, offered: Sequence[str]) -> tuple[Messages, str]:
        """One question to its answer, or two that belong together; and its category."""
        while True:
            kind = self.dice.weighted(KINDS)
            if kind == "direct":
                return messages([self.direct()]), kind
            if kind == "failure":
                if offered and (task := self.task(self.dice.pick(("sum", "list", "text")), offered)):
                    return called(task, self.dice.pick(phrases.FAILURES), phrases.FAILED[self.lang]), "error"
                continue
            task = self.task(kind, offered)
            if task is None:
                if kind != "error" and self.dice.chance(MISSING):
                    return messages([self.missing(kind)]), "missing"
                continue
            if kind == "sum" and "." not in task.core and self.dice.chance(THEN):
                after = self.tasks.then(task, task.tool)
                return [*called(task), *called(after)], after.category
            return called(task), task.category

    def echo(self) -> Messages:
        return messages([self.tasks.echo()])

    def direct(self) -> Turn:
        return self.talk.turn(self.dice.pick(DIRECT))

    def missing(self, kind: str) -> Turn:
        """A question whose tool is not there."""
        return Turn(getattr(self.tasks, kind)().question, phrases.MISSING[self.lang], "missing")


def called(task: Task, result: str | None = None, answer: str | None = None) -> Messages:
    """A task's question, the call, what comes of it, and the answer."""
    call = {"type": "function", "function": {"name": task.tool, "arguments": task.arguments}}
    return [
        {"role": "user", "content": task.question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": task.result if result is None else result},
        {"role": "assistant", "content": task.answer if answer is None else answer},
    ]


def copying(world: World) -> Iterator[dict[str, Any]]:
    """Things to repeat: digits and words that a small model has to learn to copy before it can call."""
    yield from _unoffered(world, "copy", 1.0, 4)


def practice(world: World) -> Iterator[dict[str, Any]]:
    """Calls without the schemas that make a prompt long, among things to repeat.

    So there are five times as many calls in as many tokens as in `sft`, which teaches to heed what is on
    offer afterwards.
    """
    yield from _unoffered(world, "practice", ECHO, 3)


def _unoffered(world: World, split: str, echo: float, most: int) -> Iterator[dict[str, Any]]:
    dice = Dice(f"kllm-tools/{world.seed}/{split}")
    talkers = {lang: Talker(talk, dice) for lang, talk in talks(world, dice).items()}
    for i in range(PRACTICE):
        talker = talkers[lex.LANGS[i % 2]]
        said: Messages = []
        for _ in range(dice.between(1, most)):
            said += talker.echo() if dice.chance(echo) else talker.turn(ALL)[0]
        yield {"messages": said, "tools": [], "lang": talker.lang, "category": split}


def offers(world: World) -> Iterator[dict[str, Any]]:
    """What the default template writes of tools on offer: a tokenizer that read it keeps prompts short."""
    dice = Dice(f"kllm-tools/{world.seed}/offers")
    for _ in range(OFFERED):
        names = dice.shuffled(list(ALL))[: dice.between(1, len(ALL))]
        offered = [_schema(name) for name in [*names, dice.pick(othertools.TRAINED)]]
        asked = [{"role": "user", "content": "."}]
        text = render(asked, DEFAULT_TEMPLATE, tools=offered)
        yield {"text": text.partition("system\n")[2].partition("<|im_end|>")[0]}


def sft(world: World) -> Iterator[dict[str, Any]]:
    """Conversations of one to five questions; of fewer where more tools fill the prompt."""
    dice = Dice(f"kllm-tools/{world.seed}/sft")
    talkers = {lang: Talker(talk, dice) for lang, talk in talks(world, dice).items()}
    for i in range(CHATS):
        talker = talkers[lex.LANGS[i % 2]]
        offered = talker.offer(dice.weighted(OFFERS))
        said: Messages = []
        category = ""
        for _ in range(dice.between(1, MOST_TURNS[len(offered)])):
            turn, category = talker.turn(offered)
            said += turn
        tools = [_schema(name) for name in offered]
        yield {"messages": said, "tools": tools, "lang": talker.lang, "category": category}


def eval_(world: World) -> Iterator[dict[str, Any]]:
    """Held-out questions, categories and languages in turn; a quarter come after another exchange.

    `tools` are the names of those on offer, `tool` is the right one ("" if none is), `answer` what a right
    answer says, and `results` what a tool is to say where that is not always the same (the clock).
    """
    dice = Dice(f"kllm-tools/{world.seed}/eval")
    talkers = {lang: Talker(talk, dice, held=True) for lang, talk in talks(world, dice, held=True).items()}
    seen: set[str] = set()
    for _ in range(PER_CATEGORY):
        for category in CATEGORIES:
            for lang in lex.LANGS:
                while True:
                    row = _question(talkers[lang], category)
                    key = f"{row['question']} {row['results']}"  # the clock is asked the same at other times
                    if key not in seen:
                        break
                seen.add(key)
                yield row


def _question(talker: Talker, category: str) -> dict[str, Any]:
    dice = talker.dice
    kind = {"follow-up": "sum", "python sum": "sum"}.get(category, category)
    if kind == "missing":
        kind = dice.pick(("list", "text"))
        offers = [names for names, _ in OFFERS if names and "python" not in names]
        return _row(talker, talker.offer(dice.pick(offers)), [], talker.missing(kind), category)
    offered = talker.offer(dice.pick(_fitting(category, NEEDS.get(kind, ""))))
    if kind == "direct":
        return _row(talker, offered, [], talker.direct(), category)
    task = talker.task(kind, offered)
    assert task is not None
    before: Messages = []
    if category == "follow-up":
        while "." in task.core:
            task = talker.tasks.sum()
        before, task = called(task), talker.tasks.then(task)
    elif dice.chance(0.25):
        before = talker.turn(offered)[0]
    return _row(talker, offered, before, task, category)


def _fitting(category: str, tool: str) -> list[tuple[str, ...]]:
    """The offers for a category, those of one tool as often as all others."""
    if category == "python sum":
        return [("python",), ("python", "other")]
    fit = [names for names, _ in OFFERS if names and (not tool or tool in names)]
    single = [names for names in fit if len(names) == 1]
    return fit + single * max(0, len(fit) - 2 * len(single))


def _row(
    talker: Talker, offered: Sequence[str], before: Messages, asked: Task | Turn, category: str
) -> dict[str, Any]:
    task = asked if isinstance(asked, Task) else None
    return {
        "question": asked.question,
        "answer": task.core if task else _final(asked.answer),
        "messages": [*before, {"role": "user", "content": asked.question}],
        "tools": list(offered),
        "tool": task.tool if task else "",
        "results": {task.tool: task.result} if task and task.tool == "clock" else {},
        "lang": talker.lang,
        "category": category,
    }


def _final(answer: str) -> str:
    """Of a worked sum its result."""
    tail = answer.rstrip(".。").rpartition("=")[2]
    return tail if "=" in answer and tail.isdigit() else answer


SPLITS = {"offers": offers, "copy": copying, "practice": practice, "sft": sft, "eval": eval_}
