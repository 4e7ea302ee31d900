"""The splits for reinforcement learning and tools: verifiable prompts, tool calls; from open questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kllm.data.builtin import lexicon as lex
from kllm.data.builtin.rng import Dice
from kllm.data.builtin.sums import draw
from kllm.data.builtin.talk import messages, talks
from kllm.data.builtin.world import World

PROMPTS = 4000
TOOL_CHATS = 3000

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Computes an arithmetic expression.",
            "parameters": {
                "type": "object",
                "required": ["expression"],
                "properties": {"expression": {"type": "string"}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Runs Python code and returns what it prints.",
            "parameters": {
                "type": "object",
                "required": ["code"],
                "properties": {"code": {"type": "string"}},
            },
        },
    },
]


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


def tools(world: World) -> Iterator[dict[str, Any]]:
    """Chats with the two tools offered; in a quarter of them none is needed."""
    dice = Dice(f"kllm-world/{world.seed}/tools")
    talk = talks(world, dice)
    for i in range(TOOL_CHATS):
        speaker = talk[lex.LANGS[i % 2]]
        if dice.chance(0.25):
            turns = [speaker.turn(dice.pick(("person", "thing", "identity", "unknown")))]
            yield {"messages": messages(turns), "tools": TOOLS}
        else:
            make = _calculator if dice.chance(0.6) else _python
            yield {"messages": make(speaker.lang, dice), "tools": TOOLS}


def _call(
    question: str, name: str, arguments: dict[str, str], result: str, answer: str
) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]


def _calculator(lang: str, dice: Dice) -> list[dict[str, Any]]:
    a, b, op = dice.between(100, 9999), dice.between(100, 9999), dice.pick(("+", "-", "*"))
    result = a + b if op == "+" else a - b if op == "-" else a * b
    ask = {
        "en": ("What is {e}?", "Calculate {e}.", "Please work out {e}."),
        "zh": ("{e}等于多少？", "请计算{e}。", "帮我算一下{e}。"),
    }[lang]
    expression = f"{a}{op}{b}"
    stop = "。" if lang == "zh" else "."
    answer = f"{expression}={result}{stop}"
    return _call(
        dice.pick(ask).format(e=expression), "calculator", {"expression": expression}, str(result), answer
    )


def _numbers(dice: Dice) -> list[int]:
    return [dice.between(1, 99) for _ in range(dice.between(4, 7))]


Task = tuple[dict[str, str], str, Callable[[list[int]], object]]
PYTHON: tuple[Task, ...] = (
    ({"en": "Sort the numbers {x}.", "zh": "把{x}从小到大排序。"}, "print(sorted({x}))", sorted),
    ({"en": "What is the sum of {x}?", "zh": "{x}的和是多少？"}, "print(sum({x}))", sum),
    ({"en": "Which is the largest of {x}?", "zh": "{x}里最大的是哪个？"}, "print(max({x}))", max),
    ({"en": "Which is the smallest of {x}?", "zh": "{x}里最小的是哪个？"}, "print(min({x}))", min),
    ({"en": "Reverse the list {x}.", "zh": "把{x}倒过来。"}, "print({x}[::-1])", lambda x: x[::-1]),
    (
        {"en": "Square each of {x}.", "zh": "求{x}中每个数的平方。"},
        "print([n * n for n in {x}])",
        lambda x: [n * n for n in x],
    ),
)


def _python(lang: str, dice: Dice) -> list[dict[str, Any]]:
    ask, code, run = dice.pick(PYTHON)
    numbers = _numbers(dice)
    result = str(run(numbers))
    answer = f"结果是 {result}。" if lang == "zh" else f"The result is {result}."
    return _call(ask[lang].format(x=numbers), "python", {"code": code.format(x=numbers)}, result, answer)
