"""Questions put to a model: in chat turns or in text style, greedily, many side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kllm.engine import Engine, SamplingParams
from kllm.errors import UserError
from kllm.eval.reply import TAGS
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.tokenizer import Tokenizer

_PROBES = 8  # questions that decide whether a model chats

Conversations = Sequence[Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Said:
    """What a model answered; `ended` is false if the room for an answer was too small."""

    text: str
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
        params = SamplingParams(
            max_tokens=self.max_new_tokens, temperature=0.0, stop=stop, shown_special_ids=self._shown
        )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of equal length
        said = [Said("", False)] * len(prompts)
        for at in range(0, len(order), self.batch_size):
            some = order[at : at + self.batch_size]
            done = self.engine.generate([prompts[i] for i in some], params)
            for i, completion in zip(some, done, strict=True):
                said[i] = Said(completion.text.strip(), completion.finish_reason == "stop")
        return said


def text_prompt(messages: Sequence[dict[str, Any]]) -> str:
    """The conversation as the pretraining text writes it, up to the answer to come."""
    turns = [f"{message['role']}:\n{message['content']}" for message in messages]
    return "\n".join([*turns, "assistant:\n"])
