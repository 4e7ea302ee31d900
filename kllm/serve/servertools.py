"""The tools that the server itself runs: which there are, which of them a request gets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field, WithJsonSchema

from kllm.serve.errors import ApiError, shown
from kllm.serve.fields import Flag, Integer, Text
from kllm.serve.prompt import ConversationFields
from kllm.serve.structured import StructuredFields
from kllm.serve.tools import CHOICE_SCHEMA, chosen_name

if TYPE_CHECKING:
    from kllm.tools.tool import Tool

Body = TypeVar("Body", bound="ServerToolFields")

_THREADS = 16  # for tools that are no python


class ServerToolFields(ConversationFields, StructuredFields):
    """A conversation, and what decides which of the server's own tools the model may call in it."""

    server_tools: Flag | list[Text] | None = Field(
        None,
        description="Of a server with --tools: false for none of its tools, or a list of their names; all "
        "if absent. The server runs the calls and asks the model again; they and their results come as "
        "tool_events. max_tokens bounds the sum of these rounds, usage is their sum, of the prompts too. "
        "Without effect beside tools, n above 1, a format for the answer or continue_final_message; "
        "tool_choice none leaves them in the prompt and bans calls, other choices than auto are refused.",
    )
    n: Integer = Field(1, ge=1)
    tool_choice: Annotated[Any, WithJsonSchema(CHOICE_SCHEMA)] = None


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
        """The tools that a request's prompt has; the server runs their calls unless tool_choice is none.

        None for a request that brings its own, goes on with an answer, or binds the answer otherwise.

        Raises:
            ApiError: 400 as `named`, or a tool_choice that forces a call of them.
        """
        tools = self.named(body.server_tools)
        form = body.response_format
        free = body.structured_outputs is None and (form is None or form.type == "text")
        begins = not body.continue_final_message and body.add_generation_prompt is not False
        if not (tools and free and begins) or body.tools or body.n > 1:
            return []
        if body.tool_choice not in (None, "auto", "none"):
            chosen_name(body.tool_choice)
            message = "the server's own tools run with tool_choice auto only; bring tools to force a call"
            raise ApiError(400, message, param="tool_choice")
        return tools

    def added_to(self, body: Body) -> Body:
        """The request as if it had brought them.

        Raises:
            ApiError: as `shown_to`.
        """
        tools = self.shown_to(body)
        return body.model_copy(update={"tools": [tool.schema() for tool in tools]}) if tools else body
