"""What a conversation needs of a model, whether it runs here or behind an address: one stream of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kllm.errors import UserError
from kllm.tokenizer.parts import Part

Message = dict[str, Any]
NEVER: Callable[[], bool] = lambda: False  # noqa: E731


@dataclass(frozen=True)
class Settings:
    """How answers are drawn.

    Attributes:
        sampling: fields of `SamplingParams` that were given; the others are the model's affair.
        thinking: the template's `enable_thinking`; None leaves it to the template.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None


@dataclass(frozen=True)
class Said:
    """The end of one answer; times in seconds of wall clock.

    Attributes:
        finish_reason: "stop", "length", "tool_calls" or "cancelled".
        prefill_s: from the question to the first token.
        decode_s: from the first token to the last.
        cached_tokens: of the prompt's.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float
    cached_tokens: int = 0


def tokens_per_second(said: Sequence[Said]) -> float | None:
    """Decoding speed of some answers, None where it cannot be told (no answer of two tokens)."""
    steps = sum(max(0, one.completion_tokens - 1) for one in said)
    seconds = sum(one.decode_s for one in said)
    return steps / seconds if steps and seconds > 0 else None


@dataclass(frozen=True)
class Called:
    """A tool that was run, here or (`there`) by the server; `told`: its arguments were part of the answer."""

    name: str
    arguments: str
    text: str
    error: bool
    seconds: float
    there: bool = False
    told: bool = False


class ContextFull(UserError):
    """The conversation and a fair answer do not fit. Raised before anything was said."""


class ChatModel(Protocol):
    """A model to talk with."""

    name: str
    context: int | None
    """Most tokens of prompt and answer; None if nobody says."""
    names: tuple[str, ...]
    """The models at the same place, if it has several."""

    def describe(self) -> str:
        """One line: what it is."""
        ...

    def ask(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        settings: Settings,
        *,
        calls: bool = True,
        interrupted: Callable[[], bool] = NEVER,
    ) -> Iterator[Part | Called | Said]:
        """The next message, as it comes; the last item is `Said`.

        Args:
            messages: OpenAI's, the system prompt included.
            tools: schemas of what it may call.
            calls: whether it may call them now; False also keeps a server from running tools of its own.
            interrupted: asked all the time; True ends the answer, what came stays.

        Raises:
            ContextFull: it does not fit.
            KllmError: nobody answers, or refuses.
        """
        ...

    def prompt(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, settings: Settings
    ) -> str:
        """The text that the model is given, control tokens spelt out.

        Raises:
            UserError: it cannot be seen from here.
        """
        ...

    def shows(self, tools: list[dict[str, Any]]) -> bool:
        """Whether the model is shown them; True where nobody knows."""
        ...

    def close(self) -> None:
        """Lets go of what it holds."""
        ...
