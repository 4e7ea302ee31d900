"""Sums and comparisons of one- and two-digit numbers, with the carried digit worked out in the answer."""

from __future__ import annotations

from dataclasses import dataclass

from kllm.data.builtin.rng import Dice
from kllm.data.builtin.world import World

ASK = {
    "en": {
        "+": (
            "What is {a}+{b}?",
            "How much is {a} plus {b}?",
            "Add {a} and {b}.",
            "Calculate {a}+{b}.",
            "{a}+{b}=?",
        ),
        "-": ("What is {a}-{b}?", "How much is {a} minus {b}?", "Calculate {a}-{b}.", "{a}-{b}=?"),
        ">": ("Which is larger, {a} or {b}?", "Which number is bigger, {a} or {b}?", "Compare {a} and {b}."),
    },
    "zh": {
        "+": ("{a}+{b}等于多少？", "{a}加{b}是多少？", "请计算{a}+{b}。", "请算一下{a}加{b}。", "{a}+{b}=？"),
        "-": ("{a}-{b}等于多少？", "{a}减{b}是多少？", "请计算{a}-{b}。", "{a}-{b}=？"),
        ">": ("{a}和{b}哪个大？", "{a}和{b}相比，哪个更大？", "请比较{a}和{b}。"),
    },
}
CATEGORY = {"+": "addition", "-": "subtraction", ">": "comparison"}


@dataclass(frozen=True)
class Sum:
    a: int
    op: str
    b: int

    @property
    def result(self) -> int:
        """The value; for a comparison the larger number."""
        if self.op == ">":
            return max(self.a, self.b)
        return self.a + self.b if self.op == "+" else self.a - self.b

    def ask(self, lang: str, dice: Dice) -> str:
        return dice.pick(ASK[lang][self.op]).format(a=self.a, b=self.b)

    def work(self, lang: str) -> str:
        """The worked answer, e.g. "7+8=15, 4+3+1=8, =85." or "4>3, 47>38, =47."."""
        comma, stop = ("，", "。") if lang == "zh" else (", ", ".")
        return comma.join([*self.steps(), f"={self.result}{stop}"])

    def steps(self) -> list[str]:
        """Units first, then tens with the carried or borrowed 1 (a comparison: tens first)."""
        if self.a < 10 and self.b < 10:
            return []
        (a10, a1), (b10, b1) = divmod(self.a, 10), divmod(self.b, 10)
        if self.op == ">":
            digits = [_compared(a10, b10), *([_compared(a1, b1)] if a10 == b10 else [])]
            return [*digits, _compared(self.a, self.b)]
        if self.op == "+":
            carry = a1 + b1 > 9
            tens = f"{a10}" + f"+{b10}" * (b10 > 0) + "+1" * carry
            return [f"{a1}+{b1}={a1 + b1}", *([f"{tens}={a10 + b10 + carry}"] if b10 or carry else [])]
        borrow = a1 < b1
        top = a1 + 10 * borrow
        tens = f"{a10}" + f"-{b10}" * (b10 > 0) + "-1" * borrow
        return [f"{top}-{b1}={top - b1}", *([f"{tens}={a10 - b10 - borrow}"] if b10 or borrow else [])]


def _compared(a: int, b: int) -> str:
    return f"{a}{'<' if a < b else '>' if a > b else '='}{b}"


def draw(dice: Dice, op: str, world: World, held: bool = False, most: int = 9) -> Sum:
    """A random problem, of the held-out pairs of numbers only or of the others only.

    A sum adds (takes) a number of up to `most` to (from) one of two digits; a comparison has two of those.
    """
    while True:
        a = dice.between(10, 99)
        b = dice.between(10, 99) if op == ">" else dice.between(1, most)
        if a != b and world.held_numbers(a, b) == held:
            return Sum(max(a, b), op, min(a, b)) if op == "-" else Sum(a, op, b)
