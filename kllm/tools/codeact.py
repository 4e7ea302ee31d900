"""CodeAct (Wang et al. 2024, arXiv:2402.01030): the model acts by writing Python, in fenced blocks.

All blocks of one answer are one piece of code; what it prints is the next message of the user; an answer
without a block is final. Variables live on from turn to turn, in the sandbox.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from kllm.tools.tool import Tool

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([^\s`]*)")
_PYTHON = {"python", "py", "python3", "ipython", "tool_code"}
OUTPUT = "Output:"

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

    Blocks without a language count where none says that it is Python. One that is not closed counts: the
    answer ended with it.
    """
    blocks = [(language, code) for language, code in _blocks(answer) if code.strip()]
    wanted = _PYTHON if any(language in _PYTHON for language, _ in blocks) else {""}
    found = [code for language, code in blocks if language in wanted]
    return "\n\n".join(found) if found else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block; the indentation that it has in a list is taken off."""
    fence = language = ""
    inside: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        mark = _FENCE.match(line)
        if not fence:
            if mark and "`" not in line[mark.end() :]:
                fence, language, inside = mark[1], mark[2].lower(), []
        elif mark and mark[1].startswith(fence) and not line[mark.end(1) :].strip():
            yield language, textwrap.dedent("\n".join(inside))
            fence = ""
        else:
            inside.append(line)
    if fence:
        yield language, textwrap.dedent("\n".join(inside)).rstrip("\n")


def shown(output: str, over: str = "") -> str:
    """What the code printed, as the next message of the user.

    Args:
        over: why no more code is run; the model is asked for its answer then.
    """
    text = f"{OUTPUT}\n{output}" if output.strip() else f"{OUTPUT} (nothing was printed)"
    return f"{text.rstrip()}\n\nNo more code is run ({over}). Say the answer in plain text." if over else text
