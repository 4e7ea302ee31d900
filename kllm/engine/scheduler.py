"""Who waits, who runs, and in which row: the bookkeeping of the engine, without a model."""

from __future__ import annotations

import secrets
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kllm.engine.params import Event, FinishReason, SamplingParams
from kllm.engine.stops import StopMatcher

if TYPE_CHECKING:
    from kllm.tokenizer.tokenizer import Tokenizer


class Request:
    """One prompt on its way to an answer.

    Args:
        number: the request's id.
        prompt: token ids, at least one.
        params: how to sample.
        tokenizer: turns tokens into text; None leaves the text empty.
        limit: most tokens the answer may have, from `max_tokens` and the context.
        vocab: number of logits.
    """

    def __init__(
        self,
        number: int,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        limit: int,
        vocab: int,
    ) -> None:
        self.number, self.prompt, self.params, self.limit = number, prompt, params, limit
        self.output: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        own = () if params.ignore_eos or tokenizer is None else tokenizer.stop_token_ids
        self.stop_ids = frozenset((*own, *params.stop_token_ids))
        self._decoder = tokenizer.stream_decoder() if tokenizer is not None else None
        self._stops = StopMatcher(params.stop)
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab, dtype=torch.bool)
            self.seen[prompt] = True

    @property
    def position(self) -> int:
        """Where the newest token, the next one to be fed to the model, stands."""
        return len(self.prompt) + len(self.output) - 1

    def accept(self, token: int) -> Event:
        """Takes the next token; says what is new and whether the answer is over."""
        self.output.append(token)
        if self.seen is not None:
            self.seen[token] = True
        text = ""
        if token in self.stop_ids:
            self.finish_reason = "stop"
        else:
            text = self._stops.feed(self._decoder.put(token)) if self._decoder else ""
            if self._stops.stopped:
                self.finish_reason = "stop"
            elif len(self.output) >= self.limit:
                self.finish_reason = "length"
        return self._event((token,), text)

    def finish(self, reason: FinishReason) -> Event:
        """Ends the request without another token."""
        self.finish_reason = reason
        return self._event((), "")

    def _event(self, tokens: tuple[int, ...], text: str) -> Event:
        if self.finish_reason is not None and not self._stops.stopped and self._decoder:
            # The tail of an incomplete character may itself complete a stop string.
            text += self._stops.feed(self._decoder.flush())
            if self._stops.stopped:
                self.finish_reason = "stop"
            else:
                text += self._stops.flush()
        return Event(self.number, tokens, text, self.finish_reason)


class Scheduler:
    """First come, first served, into rows 0..n-1 of the cache."""

    def __init__(self, max_rows: int, prefill_tokens: int) -> None:
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def find(self, number: int) -> Request | None:
        """The unfinished request of that id."""
        return next((r for r in (*self.waiting, *self.running) if r.number == number), None)

    def admit(self) -> list[list[Request]]:
        """Groups of waiting requests to prefill now, each group in one padded pass.

        As many of the oldest as there are free rows and `prefill_tokens` allow (always at least one), so
        that a long queue of long prompts does not stop the answers under way for long. They stay in
        `waiting` until `start`: a prefill that fails loses nobody.
        """
        chosen: list[Request] = []
        tokens = 0
        for request in self.waiting:
            tokens += len(request.prompt)
            if len(self.running) + len(chosen) == self.max_rows or (chosen and tokens > self.prefill_tokens):
                break
            chosen.append(request)
        groups: list[list[Request]] = []
        for request in sorted(chosen, key=lambda r: len(r.prompt)):
            if groups and len(request.prompt) <= 1.25 * len(groups[-1][0].prompt) + 8:
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups

    def start(self, group: list[Request]) -> None:
        """Moves prefilled requests from the queue to the next rows, in the group's order."""
        for request in group:
            self.waiting.remove(request)
            self.running.append(request)

    def remove(self, request: Request) -> tuple[int, int] | None:
        """Takes a request out; (source, target) if the last row must move into the freed one."""
        if request not in self.running:
            self.waiting.remove(request)
            return None
        row = self.running.index(request)
        last = self.running.pop()
        if last is request:
            return None
        self.running[row] = last
        return len(self.running), row
