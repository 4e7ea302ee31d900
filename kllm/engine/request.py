"""One prompt on its way to an answer: what it has, what it may still do, what is new."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kllm.engine.params import Event, FinishReason, SamplingParams, TokenLogprob
from kllm.engine.rows import Row
from kllm.engine.stops import StopMatcher

if TYPE_CHECKING:
    from kllm.tokenizer.pieces import StreamDecoder
    from kllm.tokenizer.tokenizer import Tokenizer


class Request:
    """State of a request, from the queue to its last event.

    Args:
        number: the request's id; smaller ones came earlier.
        prompt: token ids, at least one.
        params: how to sample.
        tokenizer: turns tokens into text; None leaves the text empty.
        limit: most tokens the answer may have, from `max_tokens` and the context.
        vocab: number of logits.
        adapter: number of its adapter, 0 for the base.

    `tokens` are prompt and answer; the keys and values of the first `computed` of them are in `row`.
    """

    def __init__(
        self,
        number: int,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        limit: int,
        vocab: int,
        adapter: int = 0,
    ) -> None:
        self.number, self.prompt, self.params, self.limit = number, prompt, params, limit
        self.adapter = adapter
        self.tenant = (params.salt, adapter)
        """Whose keys and values it may use: an adapter makes its own from the same tokens."""
        self.tokens = list(prompt)
        self.row: Row | None = None
        self.computed = 0
        self.cached = 0
        self.finish_reason: FinishReason | None = None
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.matcher = None if params.constraint is None else params.constraint.matcher()
        special = {} if tokenizer is None or not params.stop else tokenizer.special_tokens
        ends = [special[text] for text in params.stop if text in special]
        own = () if params.ignore_eos or tokenizer is None else tokenizer.stop_token_ids
        self.stop_ids = frozenset(i for i in (*own, *params.stop_token_ids, *ends) if 0 <= i < vocab)
        self._decoder: StreamDecoder | None = None
        if tokenizer is not None:
            self._decoder = answer_decoder(tokenizer, prompt, params.shown_special_ids)
        self._stops = StopMatcher(() if params.min_tokens else params.stop)
        self.seen: Tensor | None = None
        """bool [V]: tokens of prompt and answer, with a repetition penalty."""
        self.counts: Tensor | None = None
        """float32 [V]: how often each token is in the answer, with presence or frequency penalties."""
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab, dtype=torch.bool)
            self.seen[prompt] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab)
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.admitted = False
        """Whether it ever had a row."""
        self.mute = False
        """Only the prompt's log-probabilities are wanted: the one token drawn is not an answer."""
        self._reported = False

    @property
    def output(self) -> list[int]:
        """The answer's tokens."""
        return self.tokens[len(self.prompt) :]

    @property
    def drawn(self) -> int:
        """Number of the answer's tokens."""
        return len(self.tokens) - len(self.prompt)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while an answer is under way."""
        return len(self.tokens) - self.computed

    @property
    def plain(self) -> bool:
        """Whether several tokens may be drawn in one step: nothing depends on the ones just drawn."""
        p = self.params
        return self.seen is None and self.counts is None and self.matcher is None and not p.min_tokens

    def accept(self, tokens: list[int], logprobs: list[TokenLogprob]) -> Event:
        """Takes the next tokens, up to one that ends the answer; says what is new."""
        text, taken = "", 0
        if self.mute:
            self.finish_reason = "length"
            return self._event((), "", ())
        for token in tokens:
            taken += 1
            self.tokens.append(token)
            text += self._take(token)
            if self.finish_reason is not None:
                break
        return self._event(tuple(tokens[:taken]), text, tuple(logprobs[:taken]))

    def _take(self, token: int) -> str:
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.params.min_tokens and self.drawn > self.params.min_tokens and not self._stops.stops:
            self._stops = StopMatcher(self.params.stop)  # what came before does not count
        if token in self.stop_ids:
            self.finish_reason = "stop"
            return ""
        text = self._stops.feed(self._decoder.put(token)) if self._decoder else ""
        if self._stops.stopped or (self.matcher is not None and self.matcher.stopped):
            self.finish_reason = "stop"
        elif self.drawn >= self.limit:
            self.finish_reason = "length"
        return text

    def finish(self, reason: FinishReason, message: str = "") -> Event:
        """Ends the request without another token."""
        self.finish_reason = reason
        return self._event((), "", (), message)

    def _event(
        self, tokens: tuple[int, ...], text: str, logprobs: tuple[TokenLogprob, ...], message: str = ""
    ) -> Event:
        if self.finish_reason is not None and not self._stops.stopped and self._decoder:
            # The tail of an incomplete character may itself complete a stop string.
            text += self._stops.feed(self._decoder.flush())
            if self._stops.stopped and self.finish_reason == "length":
                self.finish_reason = "stop"
            else:
                text += self._stops.flush()
        first, self._reported = not self._reported, True
        return Event(
            self.number,
            tokens,
            text,
            self.finish_reason,
            logprobs=logprobs,
            prompt_logprobs=tuple(self.prompt_logprobs) if first and self.prompt_logprobs else None,
            cached_tokens=self.cached if first else 0,
            message=message,
        )


def answer_decoder(tokenizer: Tokenizer, prompt: Sequence[int], shown: Sequence[int] = ()) -> StreamDecoder:
    """Turns an answer's tokens into text; it goes on in the middle of a prompt that ends inside a text."""
    last = prompt[-1] if prompt else -1
    piece = tokenizer.bytes_of(last)
    inside = last not in tokenizer.special_tokens.values() and bool(piece) and not piece[-1:].isspace()
    return tokenizer.stream_decoder(prompt=prompt if inside else (), shown=shown)
