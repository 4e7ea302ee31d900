"""Questions that a tool answers: what to ask, the call that is right, its result, and the answer.

Held out, so that no evaluation question is asked in training: one number in `HELD_NUMBERS` of those with
three digits or more (no training question has one of them), one list of smaller numbers in `HELD_LISTS`
in any order, and one word in `HELD_WORDS`, made up or real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from typing import Any

from kllm.data.builtin import toolphrases as phrases
from kllm.data.builtin.rng import Dice
from kllm.data.builtin.talk import Turn
from kllm.data.builtin.world import word
from kllm.tools.calculator import calculator

HELD_NUMBERS = 8
HELD_LISTS = 6
HELD_WORDS = 6
Numbers = list[int]
Strings = list[str]
PRINTED = "\n"  # what the python tool hands on goes as `print` wrote it
OPERATORS = (("+", 4), ("-", 4), ("*", 5), ("/", 2))
ECHOES = (("number", 2), ("sum", 3), ("numbers", 2), ("word", 3), ("words", 4), ("made", 4))
FORMS = (("two", 82), ("three", 6), ("mixed", 6), ("decimal", 6))


@dataclass(frozen=True)
class Task:
    """A question, the call that answers it (tool and arguments), what it gives, and what is then said.

    `core` is what a right answer has to say, in whatever words.
    """

    question: str
    tool: str
    arguments: dict[str, str]
    result: str
    answer: str
    core: str
    category: str


@lru_cache(maxsize=1 << 17)
def is_held(key: str, one_in: int) -> bool:
    """Whether something is kept for the evaluation."""
    return Dice(f"kllm-tools/held/{key}").below(one_in) == 0


class Tasks:
    """Draws tasks in one language; `held` draws what training never asks."""

    def __init__(self, lang: str, dice: Dice, held: bool = False) -> None:
        self.lang, self.dice, self.held = lang, dice, held

    # ---- numbers, lists and words, held out or not

    def number(self, most: int = 4, least: int = 3) -> str:
        """A whole number of so many digits; every number of digits is equally likely."""
        digits = self.dice.between(least, most)
        while True:
            number = str(self.dice.between(10 ** (digits - 1), 10**digits - 1))
            if digits < 3 or is_held(number, HELD_NUMBERS) == self.held:
                return number

    def decimal(self) -> str:
        """A number with one or two digits behind the point."""
        while True:
            whole, places = self.dice.between(10, 999), self.dice.between(1, 2)
            number = f"{whole}.{self.dice.between(1, 9 if places == 1 else 99):0{places}d}"
            if not number.endswith("0") and is_held(number, HELD_NUMBERS) == self.held:
                return number

    def numbers(self) -> list[int]:
        """A list; now and then of larger numbers."""
        most = 99
        while True:
            found = [self.dice.between(1, most) for _ in range(self.dice.between(3, 5))]
            large = [str(n) for n in found if n > 99]
            keys = large or [",".join(map(str, sorted(found)))]
            one_in = HELD_NUMBERS if large else HELD_LISTS
            if all(is_held(key, one_in) == self.held for key in keys):
                return found

    def word(self) -> str:
        """A word, real or made up."""
        while True:
            if self.dice.chance(0.2):
                found = self.dice.pick(phrases.WORDS)
            else:
                parts = [self.dice.pick(phrases.SYLLABLES) for _ in range(self.dice.between(2, 3))]
                found = "".join(parts) + self.dice.pick(phrases.ENDINGS)
            if is_held(found, HELD_WORDS) == self.held:
                return found

    # ---- sums

    def sum(self, tool: str = "calculator") -> Task:
        """A sum beyond what the world's conversations teach to work out."""
        form = self.dice.weighted(FORMS if tool == "calculator" else FORMS[:-1])
        if form == "three":
            values = [self.number(4) for _ in range(3)]
            return self._summed(
                self._pick("3", dict(zip("abc", values, strict=True))), "+".join(values), tool
            )
        if form == "mixed":
            written = self._mixed()
            return self._summed(self._pick("e", {"e": written}), written, tool)
        # Python's floats would show more than a calculator does, and a division of decimals never ends
        whole = form == "two" and tool == "calculator"
        op = self.dice.weighted(OPERATORS if whole else OPERATORS[:-1])
        a, b = (self.decimal(), self.decimal()) if form == "decimal" else self._two(op)
        return self._summed(self._pick(op, {"a": a, "b": b}), f"{a}{op}{b}", tool)

    def then(self, before: Task, tool: str = "calculator") -> Task:
        """A question that goes on from the result of the sum before."""
        op = self.dice.pick("+-*")
        value = self.number(4)
        question = self.dice.pick(phrases.SUMS[self.lang]["then"][op]).format(b=value)  # type: ignore[index]
        return self._summed(question, f"{before.core}{op}{value}", tool, "follow-up")

    def by_zero(self) -> Task:
        a = self.number(4)
        question, message = self._pick("/", {"a": a, "b": "0"}), "division by zero"
        answer = phrases.ZERO[self.lang]
        arguments = {"expression": f"{a}/0"}
        return Task(question, "calculator", arguments, f"error: {message}", answer, answer, "error")

    def _two(self, op: str) -> tuple[str, str]:
        """Operands; a division comes out even."""
        if op == "/":
            while True:
                small, large = int(self.number(2, 1)), int(self.number(4))
                even = str(large - large % small)
                if 1 < small < large and self._free(even):
                    return even, str(small)
        a, b = self.number(), self.number(4, 2)
        return (b, a) if self.dice.chance(0.3) else (a, b)

    def _free(self, number: str) -> bool:
        return len(number) < 3 or is_held(number, HELD_NUMBERS) == self.held

    def _mixed(self) -> str:
        """Two operators, with or without parentheses."""
        a, b, c = self.number(4), self.number(4), self.number(2, 2)
        first, last = self.dice.pick("+-"), self.dice.pick("+-*")
        shape = self.dice.pick(("{a}{f}{b}{l}{c}", "({a}{f}{b})*{c}", "{c}*({a}{f}{b})", "{a}*{c}{f}{b}"))
        return shape.format(a=a, b=b, c=c, f=first, l=last)

    def _pick(self, kind: str, values: dict[str, str]) -> str:
        asks = phrases.SUMS[self.lang][kind]
        return str(self.dice.pick(asks)).format(**values)  # type: ignore[arg-type]

    def _summed(self, question: str, expression: str, tool: str, category: str = "sum") -> Task:
        result = calculator(expression)
        answer = phrases.RESULT[self.lang].format(x=result)
        if tool == "python":
            return self._printed(question, expression, result, "python sum")
        return Task(question, tool, {"expression": expression}, result, answer, result, category)

    # ---- lists and words

    def list(self) -> Task:
        name, numbers = self.dice.pick(tuple(phrases.LISTS)), self.numbers()
        result = _LISTS[name](numbers)
        return self._python(
            phrases.LISTS[name], {"x": self._listed(numbers)}, {"x": str(numbers)}, result, "list"
        )

    def text(self) -> Task:
        """A task on a word or on several."""
        if self.dice.chance(0.35):
            return self._several()
        name, one = self.dice.pick(tuple(phrases.TEXTS)), self.word()
        letter = self.dice.pick(one) if self.dice.chance(0.8) else self.dice.pick("abcdefghijklmnoprstuvwz")
        values = {"w": one, "c": letter, "n": str(self.dice.between(2, 3))}
        asked = {**values, "w": self._quoted(one), "c": self._quoted(letter)}
        result = _TEXTS[name](one, letter, int(values["n"]))
        return self._python(phrases.TEXTS[name], asked, values, result, "text")

    def _several(self) -> Task:
        name = self.dice.pick(tuple(phrases.PHRASES))
        words = self._words(3)
        if name == "longest" and len({len(w) for w in words}) < len(words):
            name = "join"  # which of two is longer is no question of order
        values = {"x": str(words), "s": "-".join(words)}
        asked = {"x": self._listed(words), "s": self._quoted(values["s"])}
        return self._python(phrases.PHRASES[name], asked, values, _PHRASES[name](words), "text")

    def _listed(self, items: Sequence[Any]) -> str:
        """The list as Python writes it, or as people do."""
        if self.dice.chance(0.5):
            return str(list(items))
        said = (self._quoted(item) if isinstance(item, str) else str(item) for item in items)
        return ("、" if self.lang == "zh" and self.dice.chance(0.5) else ", ").join(said)

    def _quoted(self, text: str) -> str:
        """In quotes always: a tokenizer cuts a word alike there and in the code that it is copied to."""
        # 's behind Chinese would be taken for English
        marks = (("'", "'") if self.lang == "en" else ("“", "”"), ('"', '"'))
        before, after = self.dice.pick(marks)
        return f"{before}{text}{after}"

    def _python(
        self,
        task: tuple[Sequence[str], Sequence[str], str],
        asked: dict[str, str],
        values: dict[str, str],
        result: object,
        category: str,
    ) -> Task:
        question = self.dice.pick(task[0] if self.lang == "en" else task[1]).format(**asked)
        return self._printed(question, task[2].format(**values), str(result), category)

    def _printed(self, question: str, expression: str, result: str, category: str) -> Task:
        arguments = {"code": f"print({expression})"}
        return Task(question, "python", arguments, result + PRINTED, result, result, category)

    # ---- copying

    def echo(self) -> Turn:
        """Something to repeat: numbers, sums, lists, words, and what tools make of words."""
        kind = self.dice.weighted(ECHOES)
        if kind in ("numbers", "words"):
            items = self.numbers() if kind == "numbers" else self._words(5)
            shown, said = self._listed(items), str(items)
        elif kind in ("word", "made"):
            said = self.word() if kind == "word" else self._made()
            shown = self._quoted(said)
        else:
            said = self.number(4, 1)
            if kind == "sum":
                said += f"{self.dice.pick('+-*/')}{self.number(4, 1)}"
            shown = said
        return Turn(self.dice.pick(phrases.ECHO[self.lang]).format(x=shown), said, "echo")

    def _made(self) -> str:
        """A text as Python answers it: a word in capitals, backwards or repeated, or words with hyphens."""
        name = self.dice.pick(("upper", "backwards", "repeat", "join"))
        if name == "join":
            return "-".join(self._words(3))
        return str(_TEXTS[name](self.word(), "", self.dice.between(2, 3)))

    def _words(self, most: int) -> Strings:
        return [self.word() for _ in range(self.dice.between(2, most))]

    # ---- the clock

    def clock(self) -> Task:
        """What the clock says is made up here; the evaluation has its clock stand still there."""
        kind = self.dice.pick(("time", "date", "day", "place"))
        asks, answer = phrases.CLOCK[self.lang][kind]
        place = self.dice.pick(tuple(phrases.PLACES))
        zone, offset = phrases.PLACES[place] if kind == "place" else ("", "+00:00")
        today, time = self._moment()
        weekday = phrases.DAYS[today.weekday()]
        result = f"{today} {word(weekday, 'en')} {time} UTC{offset}"
        said = {"time": time[:5], "date": str(today), "day": word(weekday, self.lang)}
        question = self.dice.pick(asks).format(place=word(place, self.lang))
        arguments = {"timezone": zone} if zone else {}
        core = said["time" if kind == "place" else kind]
        return Task(question, "clock", arguments, result, answer.format(**said), core, "clock")

    def _moment(self) -> tuple[date, str]:
        while True:
            today = date(2024, 1, 1) + timedelta(days=self.dice.below(4000))
            second = self.dice.below(24 * 3600)
            time = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
            if is_held(f"{today} {time}", HELD_LISTS) == self.held:
                return today, time


_LISTS: dict[str, Callable[[Numbers], object]] = {
    "sort": sorted,
    "down": lambda x: sorted(x, reverse=True),
    "sum": sum,
    "max": max,
    "min": min,
    "reverse": lambda x: x[::-1],
    "square": lambda x: [n * n for n in x],
    "double": lambda x: [2 * n for n in x],
    "even": lambda x: [n for n in x if n % 2 == 0],
    "count": len,
}
_TEXTS: dict[str, Callable[[str, str, int], object]] = {
    "length": lambda w, c, n: len(w),
    "backwards": lambda w, c, n: w[::-1],
    "upper": lambda w, c, n: w.upper(),
    "letter": lambda w, c, n: w.count(c),
    "repeat": lambda w, c, n: w * n,
}
_PHRASES: dict[str, Callable[[Strings], object]] = {
    "alphabet": sorted,
    "join": "-".join,
    "split": list,
    "longest": lambda x: max(x, key=len),
    "words": len,
}
