"""A conversation with a model: its memory, what fits into the context, and one answer at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kllm.engine import Engine, SamplingParams
from kllm.engine.params import FinishReason
from kllm.errors import UserError
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """One answer and what it took; times in seconds of wall clock."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_s: float
    """From the question to the first token."""
    decode_s: float
    """From the first token to the last."""
    forgotten: int = 0
    """Turns dropped from memory to make room for this one."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, None where it cannot be told (less than two tokens)."""
        if self.completion_tokens < 2 or self.decode_s <= 0:
            return None
        return (self.completion_tokens - 1) / self.decode_s

    def to_json(self) -> dict[str, Any]:
        """{text, finish_reason, usage, timings}."""
        speed = self.tokens_per_second
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            },
            "timings": {
                "prefill_s": round(self.prefill_s, 4),
                "decode_s": round(self.decode_s, 4),
                "tokens_per_second": None if speed is None else round(speed, 1),
            },
        }


@dataclass(frozen=True)
class Turn:
    """A question and the answer to it."""

    question: str
    answer: Answer


class Session:
    """Remembers turns and asks the engine.

    Args:
        engine: generates; its `max_context` bounds the memory.
        tokenizer: its chat template writes the conversation. A tokenizer without one makes the model
            continue the bare text.
        system: system prompt, or None.
        sampling: how answers are drawn; may be changed between turns.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, system: str | None, sampling: SamplingParams
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.system, self.sampling = system, sampling
        self.turns: list[Turn] = []
        self.encoder: ChatEncoder | None = None
        try:
            self.encoder = ChatEncoder(tokenizer)
        except UserError:
            if tokenizer.chat_template is not None:
                raise

    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        *,
        attempt: int = 0,
    ) -> Answer:
        """Answers `question` and remembers both.

        Args:
            question: what the user says.
            on_text: called with every piece of the answer as it comes.
            interrupted: asked after every token; True ends the answer, what came is kept.
            attempt: how often this question was asked before; moves a fixed seed on.

        Raises:
            UserError: the question alone fills the context. Nothing is remembered or forgotten then.
        """
        prompt, forgotten = self._fit(question)
        sampling = self.sampling
        if attempt and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + attempt)
        parts: list[str] = []
        tokens = 0
        reason: FinishReason = "length"
        started = time.perf_counter()
        first = last = started
        for event in self.engine.stream(prompt, sampling):
            last = time.perf_counter()
            first = first if tokens else last
            tokens += len(event.token_ids)
            if event.text:
                parts.append(event.text)
                if on_text is not None:
                    on_text(event.text)
            if event.finish_reason is not None:
                reason = event.finish_reason
            elif interrupted is not None and interrupted():
                self.engine.cancel(event.request_id)
        answer = Answer("".join(parts), reason, len(prompt), tokens, first - started, last - first, forgotten)  # type: ignore[arg-type]
        del self.turns[:forgotten]
        self.turns.append(Turn(question, answer))
        return answer

    def retry(
        self,
        on_text: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        *,
        attempt: int = 1,
    ) -> Answer:
        """Answers the last question again, in place of its answer; see `ask`."""
        last = self.turns.pop()
        try:
            return self.ask(last.question, on_text, interrupted, attempt=attempt)
        except BaseException:
            self.turns.append(last)
            raise

    def undo(self) -> Turn | None:
        """Forgets the last turn and returns it."""
        return self.turns.pop() if self.turns else None

    def prompt_ids(self, turns: list[Turn], question: str) -> list[int]:
        """Token ids of a conversation up to the answer to come."""
        if self.encoder is None:
            # Nobody taught this model turns: it continues the text so far.
            text = "".join(t.question + t.answer.text for t in turns) + question
            start = self.tokenizer.encode_raw("", add_special_tokens=True)
            return [*start, *self.tokenizer.encode((self.system or "") + text)]
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer.text})
        return self.encoder.prompt([*messages, {"role": "user", "content": question}])

    def _fit(self, question: str) -> tuple[list[int], int]:
        """The prompt, and how many of the oldest turns had to go for it and a fair answer to fit."""
        context = self.engine.max_context
        room = context - min(self.sampling.max_tokens, context // 4)
        for forgotten in range(len(self.turns) + 1):
            ids = self.prompt_ids(self.turns[forgotten:], question)
            if len(ids) <= room:
                return ids, forgotten
        if len(ids) < context:
            return ids, len(self.turns)
        raise UserError(
            f"the message takes {len(ids)} tokens, the model's context is {context}",
            where="prompt",
            hint="shorten it",
        )


def open_session(
    model_path: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    sampling: SamplingParams | None = None,
    device: str = "cpu",
) -> Session:
    """Loads the model of `model_path` (whatever `kllm.export.load` reads) for a talk.

    Args:
        adapter: a LoRA to answer with, whatever `resolve_adapter` takes.

    Raises:
        UserError: no model there, or one without a tokenizer; no adapter there, or another model's.
    """
    from kllm.export.load import load_model
    from kllm.train.device import pick_device

    def say(line: str) -> None:
        sys.stderr.write(f"note: {line}\n")

    place = None if adapter is None else _adapter_place(model_path, adapter)
    model, tokenizer = load_model(model_path, pick_device(device), say=say)
    if tokenizer is None:
        hint = f"kllm convert {model_path} OUT --tokenizer DIR gives it one"
        raise UserError("the model has no tokenizer beside it", where=model_path, hint=hint)
    model.eval()
    engine = Engine(model, tokenizer, max_batch=1, owns_model=True)
    sampling = sampling or SamplingParams()
    if place is not None:
        from kllm.export.adapter_weights import adapter_weights

        engine.add_adapter("adapter", adapter_weights(place, engine.shape))
        sampling = replace(sampling, adapter="adapter")
    return Session(engine, tokenizer, system=system, sampling=sampling)


def _adapter_place(model_path: str, adapter: str) -> Path:
    from kllm.export.resolve_adapter import check_unmerged, resolve_adapter

    check_unmerged(model_path, adapter)
    return resolve_adapter(adapter)  # before the model is read: that takes longer


def chat_once(
    model_path: str,
    question: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    sampling: SamplingParams | None = None,
    device: str = "cpu",
) -> Answer:
    """One question to the model in `model_path`, one answer, no terminal."""
    session = open_session(model_path, adapter=adapter, system=system, sampling=sampling, device=device)
    return session.ask(question)
