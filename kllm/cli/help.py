"""The help page: sections like the recipe's, flags never cut short, plain text in a pipe.

Typer's own page needs rich (0.1 s to import) and shortens long flags to `--model.hidden_s...`; this one
starts at once and shows what has to be typed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

_LEFT = 34
_NO_BREAK = "\N{NO-BREAK SPACE}"
_OTHER = "Other options"


class HelpCommand(TyperCommand):
    """A command with this help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx))


class HelpGroup(TyperGroup):
    """A group of commands with this help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx))


def page(command: Any, ctx: Any) -> str:
    """The whole help page of a command or group."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))
    group = isinstance(command, TyperGroup)
    pieces = " ".join(_arguments(command)) or ("COMMAND ..." if group else "")
    text = [f"{_bold('Usage:')} {ctx.command_path} [OPTIONS] {pieces}".rstrip(), ""]
    for paragraph in (command.help or "").strip().split("\n\n"):
        text += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
    if group:
        for title, rows in _commands(command, ctx).items():
            text += _section(title, rows, width)
    for title, rows in _options(command, ctx).items():
        text += _section(title, rows, width)
    return "\n".join(text).rstrip() + "\n"


def _arguments(command: Any) -> list[str]:
    return [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]


def _commands(group: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    sections: dict[str, list[tuple[str, str]]] = {}
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        panel = getattr(command, "rich_help_panel", None)
        title = panel if isinstance(panel, str) else "Commands"
        sections.setdefault(title, []).append((name, command.help or ""))
    return sections


def _options(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    sections: dict[str, list[tuple[str, str]]] = {}
    last: list[tuple[str, str]] = []
    for param in command.get_params(ctx):
        if getattr(param, "hidden", False):
            continue
        row = (_left(param), _right(param))
        title = getattr(param, "rich_help_panel", None)
        if param.param_type_name == "argument":
            row, title = (param.metavar or param.name.upper(), param.help or ""), "Arguments"
        if isinstance(title, str):
            sections.setdefault(title, []).append(row)
        else:
            last.append(row)
    if last:
        sections[_OTHER if sections else "Options"] = last
    return sections


def _left(param: Any) -> str:
    names = list(param.opts)
    if param.secondary_opts:  # --x/--no-x
        names = ["--[no-]" + name[2:] for name in names]
    short = [name for name in names if not name.startswith("--")]
    long = [name for name in names if name.startswith("--")]
    metavar = f" {param.metavar}" if param.metavar else ""
    return ", ".join(short + long) + metavar


def _right(param: Any) -> str:
    default = param.show_default if isinstance(param.show_default, str) else None
    # A no-break space keeps the default on one line; `_section` turns it back.
    kept = f"[default: {default}]".replace(" ", _NO_BREAK)
    return f"{param.help or ''} {kept}" if default else param.help or ""


def _section(title: str, rows: list[tuple[str, str]], width: int) -> list[str]:
    left = min(_LEFT, max(len(flag) for flag, _ in rows) + 2)
    lines = [_bold(title)]
    for flag, text in rows:
        wrapped = _wrap(text, max(24, width - left - 2))
        if len(flag) + 2 <= left:
            lines.append(f"  {_colour(flag)}{' ' * (left - len(flag))}{_dim_default(wrapped.pop(0))}")
        else:
            lines.append(f"  {_colour(flag)}")
        lines += [" " * (left + 2) + _dim_default(line) for line in wrapped]
    return [line.rstrip() for line in lines] + [""]


def _wrap(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split(" ")), width, break_on_hyphens=False)
    return [line.replace(_NO_BREAK, " ") for line in lines] or [""]


def coloured() -> bool:
    """Does stdout take colours?"""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _style(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if coloured() else text


def _bold(text: str) -> str:
    return _style(text, "1")


def _colour(flag: str) -> str:
    return _style(flag, "36")


def _dim_default(text: str) -> str:
    return re.sub(r"\[default: [^\]]*\]?$", lambda m: _style(m.group(), "2"), text)
