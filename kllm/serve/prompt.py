"""From a conversation in a request to the tokens that the model continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, WithJsonSchema

from kllm.errors import UserError
from kllm.serve.errors import ApiError, context_error, from_user_error
from kllm.serve.fields import Fields, Flag, Integer, Text
from kllm.serve.messages import MESSAGES_SCHEMA, checked_messages
from kllm.serve.tools import TOOLS_SCHEMA, checked_tools
from kllm.serve.worker import TookTooLong, limited
from kllm.tokenizer.thinking import starts_thinking

if TYPE_CHECKING:
    from kllm.serve.runtime import EngineRuntime
    from kllm.serve.settings import Settings
    from kllm.tokenizer.chat import ChatEncoder
    from kllm.tokenizer.tokenizer import Tokenizer

SECONDS = 2.0
_CHARS_PER_TOKEN = 16
_EFFORTS = {"none": False, "minimal": True, "low": True, "medium": True, "high": True, "xhigh": True}
# Not for a request to decide, or names of the renderer's own parameters.
_RESERVED = {
    "messages",
    "tools",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "conversations",
    "chat_template",
    "template",
    "self",
}

Messages = Annotated[list[Any], WithJsonSchema(MESSAGES_SCHEMA)]
Tools = Annotated[list[Any], WithJsonSchema(TOOLS_SCHEMA)]


class ConversationFields(Fields):
    """A conversation, and how it becomes a prompt."""

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: Flag | None = Field(
        None, description="Begin the assistant's turn; true if absent."
    )
    continue_final_message: Flag = Field(False, description="Go on with the last message, an assistant's.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables for the template, e.g. enable_thinking."
    )
    reasoning_effort: Text | None = Field(None, description="none switches thinking off, low to high on.")
    chat_template: Text | None = Field(None, description="Only with --allow-request-template.")
    truncate_prompt_tokens: Integer | None = Field(
        None, ge=1, description="Keep only so many of the prompt's last tokens."
    )

    def variables(self) -> dict[str, Any]:
        """The template's variables that the request sets."""
        given = {k: v for k, v in (self.chat_template_kwargs or {}).items() if k not in _RESERVED}
        effort = _EFFORTS.get(self.reasoning_effort or "")
        if effort is not None:
            given.setdefault("enable_thinking", effort)
        if "enable_thinking" in given:
            given.setdefault("open_thinking", given["enable_thinking"])  # MiniMind's name for it
        return given


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Attributes:
        ids: its tokens.
        thinking: the answer starts inside a think block.
    """

    ids: list[int]
    thinking: bool

    def text(self, tokenizer: Tokenizer) -> str:
        """The prompt with its control tokens spelt out."""
        return tokenizer.decode(self.ids, skip_special_tokens=False)


async def rendered(body: ConversationFields, runtime: EngineRuntime, settings: Settings) -> Prompt:
    """The prompt of a conversation, made in a worker thread; its length is not checked against the context.

    Raises:
        ApiError: 400: a message, a tool or an option is wrong, the model has no chat template, the template
            refuses the conversation or takes more than two seconds, or a text so long that it cannot fit.
    """
    if body.add_generation_prompt and body.continue_final_message:
        message = "add_generation_prompt and continue_final_message exclude each other"
        raise ApiError(400, message, param="continue_final_message")
    messages = checked_messages(body.messages)
    last = messages[-1]
    if body.continue_final_message and (last["role"] != "assistant" or "tool_calls" in last):
        message = "continue_final_message needs an assistant's text as the last message"
        raise ApiError(400, message, param="continue_final_message")
    if body.truncate_prompt_tokens is None:
        _check_length(body, messages, runtime.max_context)
    encoder = _encoder(runtime.encoder)
    try:
        return await limited(SECONDS, _render, body, messages, encoder, settings)
    except TookTooLong:
        message = f"the chat template takes longer than {SECONDS:g} s on this conversation"
        raise ApiError(400, message, param="messages") from None
    except UserError as e:
        raise ApiError(400, from_user_error(e).message, param="messages") from None


def _encoder(encoder: ChatEncoder | None) -> ChatEncoder:
    if encoder is None:
        message = "This model has no chat template, so it takes no messages; use /v1/completions."
        raise ApiError(400, message, param="messages")
    return encoder


def _check_length(body: ConversationFields, messages: Sequence[dict[str, Any]], context: int) -> None:
    """Refuses text that cannot fit before time is spent on it."""
    chars = sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in messages)
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    chars += sum(len(json.dumps(given)) for given in (calls, body.tools) if given)
    if chars > _CHARS_PER_TOKEN * context:
        raise context_error(context, max(chars // _CHARS_PER_TOKEN, context + 1))


def _render(
    body: ConversationFields, messages: list[dict[str, Any]], encoder: ChatEncoder, settings: Settings
) -> Prompt:
    tokenizer = encoder.tokenizer
    checked_tools(body.tools)
    if body.chat_template is not None:
        encoder = _own_template(body.chat_template, tokenizer, settings)
    tools = body.tools or None
    if body.continue_final_message:
        ids = _open_end(encoder.encode(messages, tools, **body.variables()).ids, encoder)
    elif body.add_generation_prompt is False:
        ids = encoder.encode(messages, tools, **body.variables()).ids
    else:
        ids = encoder.prompt(messages, tools, **body.variables())
    if body.truncate_prompt_tokens is not None:
        ids = ids[-body.truncate_prompt_tokens :]
    return Prompt(ids, starts_thinking(tokenizer, ids))


def _own_template(text: str, tokenizer: Tokenizer, settings: Settings) -> ChatEncoder:
    from kllm.tokenizer.chat import ChatEncoder

    if not settings.allow_request_template:
        message = "this server takes no chat_template in requests (--allow-request-template)"
        raise ApiError(400, message, param="chat_template")
    try:
        return ChatEncoder(tokenizer.with_chat_template(text))
    except UserError as e:
        raise ApiError(400, from_user_error(e).message, param="chat_template") from None


def _open_end(ids: list[int], encoder: ChatEncoder) -> list[int]:
    """The conversation up to the last words of its last turn: what ends the turn is cut off."""
    special = set(encoder.tokenizer.special_tokens.values())
    end = len(ids)
    while end and ids[end - 1] not in special:
        end -= 1
    while end and ids[end - 1] in special:
        end -= 1
    if not end:
        message = "this model's chat template does not show where a message ends"
        raise ApiError(400, message, param="continue_final_message")
    return ids[:end]
