r"""LaTeX in markdown: `$…$`, `$$…$$`, `\(…\)`, `\[…\]`, as rules of markdown-it, rendered to MathML.

What cannot be converted, or is not closed yet, is shown as its source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from html import unescape
from typing import Any
from xml.etree.ElementTree import tostring

from latex2mathml.converter import Converter
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

MAX_FORMULA = 2_000  # characters; a longer one is shown as its source
_MAX_DEPTH = 40  # of braces and environments: the converter recurses on them
_MACROS = re.compile(r"\\(re|provide)?newcommand|\\[gex]?def\b|\\let\b")  # could grow without bound
_ENVIRONMENTS = (  # those the converter lacks, by those it has
    (re.compile(r"\\(begin|end)\{(?:aligned|align\*?|alignedat|eqnarray\*?)\}"), r"\\\1{align*}"),
    (re.compile(r"\\(begin|end)\{(?:gathered|gather\*?|smallmatrix)\}"), r"\\\1{matrix}"),
    (re.compile(r"\\(?:begin|end)\{(?:equation\*?|displaymath|math)\}|\\(?:label|tag)\{[^{}]*\}"), ""),
)

_INLINE = (("$$", "$$", "block"), ("\\[", "\\]", "block"), ("\\(", "\\)", "inline"), ("$", "$", "inline"))
_BLOCK = (("$$", "$$"), ("\\[", "\\]"))
_LIMITS = {"lim", "max", "min", "sup", "inf", "argmax", "argmin", "arg\u2009max", "arg\u2009min"}

MATHML = {
    "math": {"display"},
    "mo": {"stretchy", "fence", "separator", "largeop", "movablelimits", "minsize", "maxsize", "form"},
    "mi": {"mathvariant"},
    "mfrac": {"linethickness"},
    "mspace": {"width", "linebreak"},
    "mstyle": {"displaystyle", "scriptlevel", "mathcolor"},
    "mtable": {"columnalign", "columnspacing", "rowspacing", "displaystyle", "columnlines", "rowlines"},
    "mtd": {"columnalign"},
    "mover": {"accent"},
    "munder": {"accentunder"},
    "munderover": set(),
    "menclose": {"notation"},
    "mpadded": {"width", "height", "depth", "lspace"},
    **{tag: set() for tag in ("mrow", "mn", "mtext", "msup", "msub", "msubsup", "msqrt", "mroot", "mtr")},
    **{tag: set() for tag in ("mphantom", "mmultiscripts", "mprescripts", "none")},
}
"""The elements that may come out, each with its attributes (none of which holds an address)."""


def add_maths(md: MarkdownIt) -> None:
    """Teach a parser the four ways of writing formulas."""
    md.inline.ruler.before("escape", "maths", _inline_rule)
    md.block.ruler.before(
        "fence", "maths_block", _block_rule, {"alt": ["paragraph", "reference", "blockquote"]}
    )
    md.add_render_rule("maths", _render)


@lru_cache(maxsize=512)
def formula(latex: str, display: str) -> str:
    """The MathML of one formula, or its source as code when it has no reading.

    Args:
        display: `inline` or `block`.
    """
    if len(latex) <= MAX_FORMULA and not _MACROS.search(latex) and _depth(latex) <= _MAX_DEPTH:
        try:
            return _mathml(latex, display)
        except Exception:  # a dozen kinds for malformed input, some of them IndexError
            pass
    return f'<code class="math-source">{escapeHtml(latex)}</code>'


def _mathml(latex: str, display: str) -> str:
    for pattern, replacement in _ENVIRONMENTS:
        latex = pattern.sub(replacement, latex)
    tree = Converter(display=display).convert_to_element(latex)
    tree.attrib.pop("xmlns", None)
    for element in tree.iter():  # its symbols are references inside text; its own writer leaves "<" bare
        element.text = unescape(element.text) if element.text else None
        if display == "block" and element.tag == "msub" and element[0].text in _LIMITS:
            element.tag = "munder"
    return tostring(tree, encoding="unicode", short_empty_elements=False)


def _depth(latex: str) -> int:
    deepest = depth = 0
    for step in re.findall(r"[{}]|\\left\b|\\right\b|\\begin\b|\\end\b", latex):
        depth += 1 if step in ("{", "\\left", "\\begin") else -1
        deepest = max(deepest, depth)
    return deepest


def _render(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    if token.markup == "unclosed":
        return f'<pre class="math-source">{escapeHtml(token.content)}</pre>\n'
    if token.info == "inline":
        return formula(token.content, "inline")
    box = f'<span class="math">{formula(token.content, "block")}</span>'
    return f"<p>{box}</p>\n" if token.block else box


def _inline_rule(state: StateInline, silent: bool) -> bool:
    source, start = state.src, state.pos
    if source[start] not in "$\\":
        return False
    kind = next((kind for kind in _INLINE if source.startswith(kind[0], start)), None)
    if kind is None:
        return False
    opener, closer, display = kind
    first = start + len(opener)
    end = _closing(source, closer, first, min(state.posMax, first + MAX_FORMULA))
    if end < 0:
        return False
    latex = source[first:end]
    after = source[end + 1 : end + 2]
    if opener == "$" and (latex != latex.strip() or after.isdigit()):
        return False  # prices: "$5 and $10", "$5-$10"
    if not latex.strip():
        return False
    if not silent:
        token = state.push("maths", "math", 0)
        token.content, token.info = latex.strip(), display
    state.pos = end + len(closer)
    return True


def _closing(source: str, closer: str, start: int, limit: int) -> int:
    """Where the closer stands unescaped, else -1."""
    end = source.find(closer, start, limit)
    while end > start and source[end - 1] == "\\" and not closer.startswith("\\"):
        end = source.find(closer, end + 1, limit)
    return end


def _block_rule(state: StateBlock, line: int, end_line: int, silent: bool) -> bool:
    if state.is_code_block(line):
        return False
    start = state.bMarks[line] + state.tShift[line]
    pair = next((pair for pair in _BLOCK if state.src.startswith(pair[0], start)), None)
    if pair is None:
        return False
    opener, closer = pair
    last, found = line, False
    lines: list[str] = []
    for last in range(line, end_line):
        text = state.src[state.bMarks[last] + state.tShift[last] : state.eMarks[last]].rstrip()
        if last == line:
            text = text[len(opener) :]
        elif not text or state.sCount[last] < state.blkIndent:
            return False  # a blank line ends the try: one stray `$$` must not swallow the rest
        if closer in text:
            text, _, rest = text.partition(closer)
            if rest.strip(" .,;。，；"):
                return False
            found = True
        lines.append(text)
        if found:
            break
    latex = "\n".join(lines).strip()
    if found and not latex:
        return False
    if not silent:
        token = state.push("maths", "math", 0)
        token.block, token.info = True, "block"
        token.content = latex if found else f"{opener}{latex}"
        token.markup = "" if found else "unclosed"
        token.map = [line, last + 1]
        state.line = last + 1
    return True
