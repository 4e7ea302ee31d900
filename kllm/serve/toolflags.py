"""The server's tools as the command line names them: found, and able to run here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kllm.errors import UserError
from kllm.serve.errors import ApiError
from kllm.serve.tools import checked_tools
from kllm.tools.registry import find_tools, python

if TYPE_CHECKING:
    from kllm.serve.settings import Settings
    from kllm.tools.tool import Tool


def open_tools(names: Sequence[str], unsafe_python: bool) -> tuple[Tool, ...]:
    """The tools that flags name, if all of them can run here.

    Raises:
        UserError: an unknown tool, one that the API cannot describe, or no sandbox for `python`.
    """
    tools = find_tools(names)
    if unsafe_python and not runs_code(tools):
        raise UserError("there is no python among the tools", where="flag --unsafe-python")
    if runs_code(tools) and not unsafe_python:
        from kllm.tools.sandbox import check_platform

        check_platform()
    try:
        checked_tools([tool.schema() for tool in tools])
    except ApiError as error:
        raise UserError(error.message, where="flag --tools") from None
    return tuple(tools)


def runs_code(tools: Sequence[Tool]) -> bool:
    """Whether one of them is `python`: what a model writes is run."""
    return any(tool.function is python for tool in tools)


def introduced(settings: Settings) -> list[str]:
    """What to say about them at the start."""
    if not settings.tools:
        return []
    lines = [f"tools: {', '.join(tool.name for tool in settings.tools)}"]
    if settings.unsafe_python:
        lines.append("warning: python runs without a sandbox: whoever can ask can do what this user may")
    return lines
