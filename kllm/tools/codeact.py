"""CodeAct (Wang et al. 2024, arXiv:2402.01030): the model acts by writing Python, in fenced blocks.

All blocks of one answer are one piece of code; what it prints is the next message of the user; an answer
without a block is final. Variables live on from turn to turn, in the sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kllm.tools.tool import Tool

_FENCE = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,})[ \t]*(?P<lang>[^\s`]*)[^\n`]*\n"
    r"(?P<code>.*?)(?:^ {0,3}(?P=fence)[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
_PYTHON = {"", "python", "py", "python3", "ipython", "tool_code"}

_PROMPT = """\
You solve tasks by writing Python code. Put code into a block that starts with ```python and ends with ```. \
It is run and you are shown what it prints; variables and functions stay defined for the next block. Use \
print() for what you need to see. When you know the answer, say it in plain text without any code block.\
"""
_FUNCTIONS = "\n\nBesides Python's standard library these functions are defined already:\n\n"


def system_prompt(tools: Sequence[Tool], own: str | None = None) -> str:
    """What the model is told: how to act, and the functions as signatures with their docstrings.

    Args:
        own: the user's system prompt; it goes first.
    """
    text = _PROMPT
    if tools:
        text += _FUNCTIONS + "\n\n".join(tool.prompt() for tool in tools)
    return f"{own}\n\n{text}" if own else text


def code_of(answer: str) -> str | None:
    """The Python of an answer: its fenced blocks, joined; None if there is none.

    A block that is not closed counts: the answer was stopped at its end. Blocks of other languages do not.
    """
    blocks = [
        match["code"].rstrip("\n") for match in _FENCE.finditer(answer) if match["lang"].lower() in _PYTHON
    ]
    return "\n\n".join(blocks) if any(block.strip() for block in blocks) else None


def shown(output: str) -> str:
    """What the code printed, as the next message of the user."""
    return f"Output:\n{output}" if output.strip() else "Output: (nothing was printed)"
