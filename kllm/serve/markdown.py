"""Markdown of a model to HTML that is safe to insert: `render`.

A model's output is hostile input. HTML in it is text (the parser never passes tags on), pictures become
links (fetching one would tell a stranger the conversation), and whatever the parser, the highlighter and
the maths converter made goes through nh3 with a short list of elements, classes and addresses. There are
no style attributes, so the page's content policy needs no exception.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES

from kllm.serve.maths import MATHML, add_maths

MAX_TEXT = 60_000  # characters of one render; the page shows what is longer as plain text
_MAX_CODE = 20_000  # characters of one highlighted block

# Named, since some of Pygments' 500 lexers take forever on text made for it.
_LEXERS = {
    name: lexer
    for lexer, names in {
        "python": "python py python3 pycon",
        "javascript": "javascript js jsx mjs",
        "typescript": "typescript ts tsx",
        "bash": "bash sh shell zsh",
        "console": "console shell-session",
        "json": "json json5 jsonl",
        "yaml": "yaml yml",
        "toml": "toml",
        "ini": "ini cfg",
        "html": "html xhtml vue svelte",
        "xml": "xml svg",
        "css": "css",
        "scss": "scss",
        "sql": "sql sqlite mysql postgresql",
        "c": "c h",
        "cpp": "cpp c++ cc hpp cuda",
        "csharp": "csharp cs c#",
        "java": "java",
        "kotlin": "kotlin kt",
        "swift": "swift",
        "go": "go golang",
        "rust": "rust rs",
        "ruby": "ruby rb",
        "php": "php",
        "r": "r",
        "lua": "lua",
        "perl": "perl pl",
        "scala": "scala",
        "haskell": "haskell hs",
        "julia": "julia jl",
        "matlab": "matlab octave",
        "dockerfile": "dockerfile docker",
        "makefile": "makefile make",
        "cmake": "cmake",
        "diff": "diff patch",
        "latex": "latex tex",
        "powershell": "powershell ps1",
        "batch": "batch bat",
        "dart": "dart",
        "jinja": "jinja",
    }.items()
    for name in names.split()
}
_FORMATTER = HtmlFormatter(nowrap=True)
_ADDRESS = re.compile(r"https?://[^\s<>\"'`，。；：！？、（）《》「」\x00-\x1f]+")
_TEXT = """p br hr h1 h2 h3 h4 h5 h6 strong em s del sup sub code pre blockquote a div span
    ul ol li table thead tbody tr th td"""
_ATTRIBUTES: dict[str, set[str]] = {
    **MATHML,
    "a": {"href", "title"},
    "ol": {"start"},
    "pre": {"data-lang"},
}
_CLASSES = {
    "span": {"math", *STANDARD_TYPES.values()} - {""},
    "div": {"table"},
    "code": {"math-source"},
    "pre": {"math-source"},
    "th": {"left", "right", "center"},
    "td": {"left", "right", "center"},
}


def render(text: str) -> str:
    """The HTML of one message, whole or cut anywhere; at most `MAX_TEXT` characters are read."""
    return nh3.clean(
        _MARKDOWN.render(text[:MAX_TEXT]),
        tags={*_TEXT.split(), *MATHML},
        clean_content_tags={"script", "style"},
        attributes=_ATTRIBUTES,
        allowed_classes=_CLASSES,
        set_tag_attribute_values={"a": {"target": "_blank"}},
        link_rel="noopener noreferrer nofollow",
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
    )


def _parser() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": None})
    md.enable(["table", "strikethrough"])
    add_maths(md)
    md.core.ruler.push("addresses", _link_addresses)
    md.add_render_rule("image", _image)
    md.add_render_rule("fence", _fence)
    md.add_render_rule("code_block", _fence)
    md.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    md.add_render_rule("table_close", lambda *_: "</table></div>\n")
    md.add_render_rule("th_open", _cell)
    md.add_render_rule("td_open", _cell)
    return md


def _fence(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    words = token.info.split(maxsplit=1)
    language = words[0] if words else ""
    name = re.sub(r"[^\w#+.-]", "", language)[:20]
    code = _highlighted(token.content, name.lower())
    return f'<pre data-lang="{escapeHtml(name)}"><code>{code}</code></pre>\n'


@lru_cache(maxsize=256)
def _highlighted(code: str, language: str) -> str:
    lexer = _lexer(language)
    if lexer is None or len(code) > _MAX_CODE:
        return escapeHtml(code)
    return highlight(code, lexer, _FORMATTER)


@cache
def _lexer(language: str) -> Lexer | None:
    name = _LEXERS.get(language)
    return get_lexer_by_name(name, stripnl=False, ensurenl=False) if name else None


def _image(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    label = token.content or str(token.attrGet("src") or "")
    return f'<a href="{escapeHtml(str(token.attrGet("src") or ""))}">{escapeHtml(label)}</a>'


def _cell(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    side = str(token.attrGet("style") or "").removeprefix("text-align:")
    return f'<{token.tag} class="{side}">' if side else f"<{token.tag}>"


def _link_addresses(state: StateCore) -> None:
    """Bare http(s) addresses become links, as on every chat page."""
    for block in state.tokens:
        if block.type != "inline" or "://" not in block.content:
            continue
        children: list[Token] = []
        inside = 0
        for token in block.children or []:
            inside += {"link_open": 1, "link_close": -1}.get(token.type, 0)
            if token.type == "text" and not inside and "://" in token.content:
                children += _linked(token)
            else:
                children.append(token)
        block.children = children


def _linked(token: Token) -> list[Token]:
    tokens: list[Token] = []

    def add_text(text: str) -> None:
        if text:
            tokens.append(Token("text", "", 0, content=text, level=token.level))

    at = 0
    for match in _ADDRESS.finditer(token.content):
        address = match.group().rstrip(".,;:!?*_~")
        if address.endswith(")") and "(" not in address:
            address = address[:-1]
        add_text(token.content[at : match.start()])
        tokens.append(Token("link_open", "a", 1, attrs={"href": address}))
        add_text(address)
        tokens.append(Token("link_close", "a", -1))
        at = match.start() + len(address)
    add_text(token.content[at:])
    return tokens


_MARKDOWN = _parser()
