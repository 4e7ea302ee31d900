"""Markdown as a model writes it, on a terminal: nothing is dropped, nothing is a link or a tag."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from kllm.errors import harmless

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline
    from rich.console import ConsoleRenderable

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_GOES_ON = re.compile(r"\s|[-*+>|]\s?|\d{1,9}[.)]?(\s|$)")
_MATHS = ("\\(", "\\)", "\\[", "\\]")


def markdown(text: str) -> ConsoleRenderable:
    """`text` ready to print. Tags of HTML are text, a line break is one, and TeX keeps its backslashes."""
    from rich.markdown import Markdown

    shown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    shown.markup, shown.parsed = text, _parser().parse(text)
    for token in shown.parsed:
        token.content = harmless(token.content)
        for child in token.children or ():
            child.content = harmless(child.content)  # an entity may have become a control character
            if child.type == "softbreak":
                child.type = "hardbreak"
    return shown


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import escape

    def keep_maths(state: StateInline, silent: bool) -> bool:
        if state.src[state.pos : state.pos + 2] not in _MATHS:
            return bool(escape(state, silent))
        if not silent:
            state.pending += state.src[state.pos : state.pos + 2]
        state.pos += 2
        return True

    parser = MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline"])
    parser.inline.ruler.at("escape", keep_maths)
    return parser


def split_blocks(text: str) -> tuple[str, str]:
    """(finished blocks of markdown, the one that may still grow): cut at a blank line outside of code.

    A list goes on after a blank line, and code that is indented too, so neither is cut.
    """
    fence = ""
    at = cut = 0
    for line in text.splitlines(keepends=True):
        fence = _after(line, fence)
        at += len(line)
        if not fence and not line.strip() and line.endswith("\n") and not _goes_on(text[at : at + 16]):
            cut = at
    return text[:cut], text[cut:]


def last_lines(text: str, lines: int, width: int) -> str:
    """The end of a block: at most so many lines of this width, with the fence that its code stands in."""
    start = max(0, len(text) - lines * width)
    at = len(text)
    for _ in range(lines):
        at = text.rfind("\n", start, at)
        if at < 0:
            break
    start = at + 1 if at >= 0 else start
    return _with_fence(text, start) if start else text


def _with_fence(text: str, at: int) -> str:
    fence = opened = ""
    for line in text[:at].splitlines():
        was, fence = fence, _after(line, fence)
        opened = line if fence and not was else opened
    return f"{opened}\n{text[at:]}" if fence else text[at:]


def _after(line: str, fence: str) -> str:
    """The fence that is open behind a line."""
    match = _FENCE.match(line)
    if match and not fence:
        return match[1]
    if match and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
        return ""
    return fence


def _goes_on(rest: str) -> bool:
    """Whether what follows a blank line may belong to what stands before it, as far as can be seen."""
    return not rest or bool(_GOES_ON.match(rest))
