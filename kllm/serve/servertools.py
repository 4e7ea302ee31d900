"""The tools that the server itself runs: which there are, which of them a request gets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from kllm.serve.errors import ApiError, shown
from kllm.serve.fields import Flag, Text
from kllm.serve.prompt import ConversationFields

if TYPE_CHECKING:
    from kllm.serve.job import ChatRequest
    from kllm.tools.tool import Tool

_THREADS = 16  # for tools that are no python


class ServerToolFields(ConversationFields):
    """A conversation, and which of the server's own tools the model may call in it."""

    server_tools: Flag | list[Text] | None = Field(
        None,
        description="Of a server with --tools: false for none of its tools, or a list of their names; all "
        "if absent. The server runs the calls and asks the model again; they and their results come as "
        "tool_events. max_tokens bounds the sum of these rounds, usage is their sum, of the prompts too. "
        "Without effect beside tools, n above 1, a tool_choice other than auto, a format for the answer or "
        "continue_final_message.",
    )


class ServerTools:
    """What `kllm serve --tools` names.

    Args:
        tools: none switches all of this off.
        unsafe_python: `python` needs no lock.
        sandboxes: how many requests may have one at once.

    Attributes:
        places: one for each sandbox.
        threads: one for each message whose calls are run. A tool that hangs keeps its own after its client
            has left: they must not become many.
    """

    def __init__(self, tools: Sequence[Tool] = (), unsafe_python: bool = False, sandboxes: int = 4) -> None:
        self.unsafe_python = unsafe_python
        self.places = asyncio.Semaphore(sandboxes)
        self.threads = asyncio.Semaphore(sandboxes + _THREADS)
        self._tools = {tool.name: tool for tool in tools}

    def named(self, server_tools: bool | list[str] | None) -> list[Tool]:
        """The tools that a request's field means, in the server's order.

        Raises:
            ApiError: 400, a name that is none of them.
        """
        if isinstance(server_tools, list):
            unknown = next((name for name in server_tools if name not in self._tools), None)
            if unknown is not None:
                has = ", ".join(self._tools) or "none"
                message = f"this server runs no tool {shown(unknown)}; it has: {has}"
                raise ApiError(400, message, param="server_tools")
            return [tool for name, tool in self._tools.items() if name in server_tools]
        return [] if server_tools is False else list(self._tools.values())

    def shown_to(self, body: ServerToolFields) -> list[Tool]:
        """The tools for a conversation; none for one that brings its own or goes on with an answer.

        Raises:
            ApiError: as `named`.
        """
        tools = self.named(body.server_tools)
        begins = not body.continue_final_message and body.add_generation_prompt is not False
        return tools if begins and not body.tools else []

    def wanted(self, body: ChatRequest) -> list[Tool]:
        """The tools that the server runs for a request; none for one whose answer is bound otherwise.

        Raises:
            ApiError: as `named`.
        """
        tools = self.shown_to(body)
        form = body.response_format
        free = body.structured_outputs is None and (form is None or form.type == "text")
        return tools if free and body.n == 1 and body.tool_choice in (None, "auto") else []
