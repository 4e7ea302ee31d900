"""Questions put to a model: in chat turns (with tools, too) or in text style, greedily, many side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kllm.engine import Completion, Engine, Event, SamplingParams
from kllm.engine.answer import Answer, Reading, message_of, no_calls
from kllm.errors import UserError
from kllm.eval.reply import TAGS
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.thinking import starts_thinking
from kllm.tokenizer.tokenizer import Tokenizer

_PROBES = 8  # questions that decide whether a model chats

Conversations = Sequence[Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Said:
    """What a model answered; `ended` is false if the room for an answer was too small."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Reply:
    """An answer as a message, its tool calls read; `ended` is false if there was too little room for it."""

    message: dict[str, Any]
    ended: bool


class Asker:
    """Asks one model.

    Args:
        max_new_tokens: longest answer.
        batch_size: questions answered side by side.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, max_new_tokens: int = 64, batch_size: int = 64
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        special = tokenizer.special_tokens
        self._shown = tuple(special[tag] for tag in TAGS if tag in special)

    def chat(self, conversations: Conversations, **variables: Any) -> list[Said]:
        """Answers in chat turns; `variables` are the template's (`enable_thinking`)."""
        encoder = ChatEncoder(self.tokenizer)
        return self._ask([encoder.prompt(messages, **variables) for messages in conversations])

    def text(self, conversations: Conversations) -> list[Said]:
        """Answers in the style of the pretraining text: what comes on the line after "assistant:"."""
        return self._ask([self.tokenizer.encode(text_prompt(m)) for m in conversations], stop=("\n",))

    def replies(
        self, conversations: Sequence[tuple[Sequence[dict[str, Any]], list[dict[str, Any]] | None, bool]]
    ) -> list[Reply]:
        """Answers in chat turns, as `kllm chat` asks for them and reads them.

        Args:
            conversations: messages, schemas of the tools on offer, and whether they may be called now.

        One whose prompt fills the context is empty.
        """
        encoder = ChatEncoder(self.tokenizer)
        prompts = [encoder.prompt(messages, tools) for messages, tools, _ in conversations]
        biases = [no_calls(self.tokenizer) if tools and not may else () for _, tools, may in conversations]
        fit = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.engine.max_context]
        shown = Reading(self.tokenizer, thinking=False, split=True, parsed=True).shown()
        done = self._complete([prompts[i] for i in fit], shown=shown, biases=[biases[i] for i in fit])
        replies = [Reply({"role": "assistant", "content": ""}, False)] * len(prompts)
        for i, completion in zip(fit, done, strict=True):
            replies[i] = self._read(prompts[i], completion, parsed=conversations[i][1] is not None)
        return replies

    def _read(self, prompt: list[int], completion: Completion, parsed: bool) -> Reply:
        reading = Reading(
            self.tokenizer,
            thinking=starts_thinking(self.tokenizer, prompt),
            split=True,
            parsed=parsed,
            stop_ids=frozenset(self.tokenizer.stop_token_ids),
            prompt=prompt,
        )
        reason = completion.finish_reason
        event = Event(0, tuple(completion.token_ids), completion.text, reason)
        parts = Answer(reading).take(event)
        return Reply(message_of(parts, "reasoning_content"), reason == "stop")

    def knows_turns(self, conversations: Conversations) -> bool:
        """Whether the model ends a chat answer with its end-of-turn token, which no pretraining text has."""
        try:
            encoder = ChatEncoder(self.tokenizer)
        except UserError:
            return False  # no chat template
        prompts = [encoder.prompt(messages) for messages in conversations[:_PROBES]]
        params = SamplingParams(max_tokens=self.max_new_tokens, temperature=0.0)
        done = self.engine.generate(prompts, params)
        return any(c.token_ids and c.token_ids[-1] == self.tokenizer.eos_token_id for c in done)

    def _ask(self, prompts: list[list[int]], stop: tuple[str, ...] = ()) -> list[Said]:
        done = self._complete(prompts, stop, self._shown)
        return [Said(one.text.strip(), one.finish_reason == "stop") for one in done]

    def _complete(
        self,
        prompts: list[list[int]],
        stop: tuple[str, ...] = (),
        shown: tuple[int, ...] = (),
        biases: Sequence[tuple[tuple[int, float], ...]] | None = None,
    ) -> list[Completion]:
        params = SamplingParams(
            max_tokens=self.max_new_tokens, temperature=0.0, stop=stop, shown_special_ids=shown
        )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of equal length
        found = [Completion()] * len(prompts)
        for at in range(0, len(order), self.batch_size):
            some = order[at : at + self.batch_size]
            each = [params if biases is None else replace(params, logit_bias=biases[i]) for i in some]
            done = self.engine.generate([prompts[i] for i in some], each)
            for i, completion in zip(some, done, strict=True):
                found[i] = completion
        return found


def text_prompt(messages: Sequence[dict[str, Any]]) -> str:
    """The conversation as the pretraining text writes it, up to the answer to come."""
    turns = [f"{message['role']}:\n{message['content']}" for message in messages]
    return "\n".join([*turns, "assistant:\n"])
