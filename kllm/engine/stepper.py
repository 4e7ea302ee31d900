"""One step of the engine: choose the tokens, one pass over the model, draw, hand out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kllm.engine.adjust import adjust, blocks, logprobs_of
from kllm.engine.cache import KVCache, Segment, in_order
from kllm.engine.params import Event, TokenLogprob
from kllm.engine.request import Request
from kllm.engine.rows import PAGE
from kllm.engine.sampler import RowSettings, sample, streams
from kllm.engine.scheduler import Scheduler
from kllm.errors import KllmError

_NOT_FINITE = "the model's logits are not finite: its weights are damaged or its training diverged"


class Decoder(Protocol):
    """What a step needs of a model; `kllm.model.decode.Prepared` is one."""

    adapters: Any
    """See `kllm.model.decode_adapters.Adapters`; only asked when a request has an adapter."""

    def __call__(self, tokens: Tensor, positions: Tensor, cache: Any, chosen: Any = None) -> Tensor:
        """Hidden states [N, H] of a flat row of tokens int64 [N], each with its adapter."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [M, V]."""
        ...

    def ensure_context(self, length: int) -> None:
        """Makes room for positions below `length`."""
        ...


class Proposer(Protocol):
    """Guesses the next tokens of answers under way; the step keeps those that are right."""

    def propose(self, requests: Sequence[Request]) -> dict[Request, list[int]]:
        """Tokens that may come after each request's newest one."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended or lost its row."""
        ...


class Stepper:
    """Runs steps over one model.

    Args:
        model: see `Decoder`.
        scheduler: queues and memory.
        cache: attention over the rows.
        proposer: guesses tokens, or None.
        vocab: number of logits.
        device: where the model lives.
    """

    def __init__(
        self,
        model: Decoder,
        scheduler: Scheduler,
        cache: KVCache,
        proposer: Proposer | None,
        vocab: int,
        device: torch.device,
    ) -> None:
        self.model, self.scheduler, self.cache, self.proposer = model, scheduler, cache, proposer
        self.vocab, self.device = vocab, device
        self.computed_tokens = self.generation_tokens = 0
        self._settings: tuple[list[int], RowSettings] | None = None
        self._no_noise = torch.empty(0, dtype=torch.int64)

    def step(self) -> list[Event]:
        """Computes what the scheduler chose; events of the requests that got tokens."""
        self.scheduler.admit()
        proposed = self._proposed()
        plan = self.scheduler.plan({r: len(tokens) for r, tokens in proposed.items()})
        if not plan:
            return []
        placed = [(Segment(r.row, r.computed, n), r) for r, n in plan if r.row is not None]
        placed.sort(key=lambda pair: in_order(pair[0]))
        hidden = self._forward(placed, proposed)
        drawing: list[tuple[Request, Tensor, list[int]]] = []
        at = 0
        for segment, request in placed:
            part = hidden[at : at + segment.count]
            at += segment.count
            if request.prompt_logprobs is not None and not request.drawn:
                self._prompt_logprobs(request, segment, part)
            guesses = proposed.get(request, [])[: segment.count - 1] if request.pending == 1 else []
            reached = segment.start + segment.count
            self._computed(request, reached)  # with the guesses: a row that moves must take them along
            self._remember(request, segment, part)
            if reached < len(request.tokens):  # a chunk of a prompt, not its last one
                continue
            drawing.append((request, part[-1 - len(guesses) :], guesses))
        return self._draw(drawing) if drawing else []

    def _remember(self, request: Request, segment: Segment, hidden: Tensor) -> None:
        """Leaves a prompt's keys and values to others, chunk by chunk."""
        if segment.count == 1 or request.drawn or request.row is None:
            return
        if bool(hidden[-1].isfinite().all()):  # it has attended to all of them
            whole = request.computed == len(request.tokens)
            upto = request.computed if whole else request.computed // PAGE * PAGE
            self.scheduler.remember(request, request.row, request.tokens[:upto])

    def _proposed(self) -> dict[Request, list[int]]:
        if self.proposer is None:
            return {}
        able = [r for r in self.scheduler.running if r.pending == 1 and r.drawn and r.plain]
        proposed = self.proposer.propose(able) if able else {}
        return {r: tokens[: r.limit - r.drawn - 1] for r, tokens in proposed.items() if tokens}

    def _computed(self, request: Request, upto: int) -> None:
        request.computed = upto
        if request.row is not None:
            self.scheduler.rows.lengths[request.row] = upto

    def _forward(self, placed: list[tuple[Segment, Request]], proposed: dict[Request, list[int]]) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        for segment, request in placed:
            ids = request.tokens[segment.start : segment.start + segment.count]
            tokens += ids + proposed.get(request, [])[: segment.count - len(ids)]
            positions += range(segment.start, segment.start + segment.count)
        self.model.ensure_context(max(positions) + 1)
        self.cache.begin([segment for segment, _ in placed])
        self.computed_tokens += len(tokens)
        row = self._tensor(tokens), self._tensor(positions), self.cache
        adapters = [r.adapter for _, r in placed]
        if not any(adapters):
            return self.model(*row)
        return self.model(*row, self.model.adapters.choose(adapters, [s.count for s, _ in placed]))

    def _prompt_logprobs(self, request: Request, segment: Segment, hidden: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow those of `segment`."""
        assert request.prompt_logprobs is not None
        del request.prompt_logprobs[segment.start + 1 :]  # computed a second time after a preemption
        following = request.prompt[segment.start + 1 : segment.start + segment.count + 1]
        count = request.params.prompt_logprobs or 0
        for part in blocks(len(following), self.vocab):
            wanted = following[part]
            logits = self.model.logits(hidden[part.start : part.start + len(wanted)]).float()
            request.prompt_logprobs += logprobs_of(logits, wanted, [count] * len(wanted))

    # -- drawing ---------------------------------------------------------------------------------------

    def _draw(self, drawing: list[tuple[Request, Tensor, list[int]]]) -> list[Event]:
        """Draws after each position: the newest token and every proposed one.

        A proposed token stands if it is the one that would be drawn there anyway (the noise depends on the
        request's seed and the token's number only), so proposals change the speed and nothing else.
        """
        hidden = drawing[0][1] if len(drawing) == 1 else torch.cat([part for _, part, _ in drawing])
        requests = [r for r, part, _ in drawing for _ in range(len(part))]
        numbers = [r.drawn + i for r, part, _ in drawing for i in range(len(part))]
        raw = self.model.logits(hidden).float()
        settings = self._row_settings(requests)
        states = self._no_noise
        if len(settings.sampled):
            states = streams([r.seed for r in requests], numbers)
        drawn = sample(adjust(raw, requests), settings, states).tolist()
        logprobs = self._logprobs(raw, requests, drawn)
        events, at = [], 0
        for request, part, guesses in drawing:
            tokens = drawn[at : at + len(part)]
            right = 0
            while right < len(guesses) and guesses[right] == tokens[right]:
                right += 1
            events.append(self._accept(request, tokens[: right + 1], logprobs[at : at + right + 1]))
            at += len(part)
        return events

    def _row_settings(self, requests: list[Request]) -> RowSettings:
        numbers = [r.number for r in requests]
        if self._settings is None or self._settings[0] != numbers:
            built = RowSettings.build([r.params for r in requests], self.device, self.vocab)
            self._settings = (numbers, built)
        return self._settings[1]

    def _logprobs(self, raw: Tensor, requests: list[Request], drawn: list[int]) -> list[TokenLogprob]:
        wanted = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
        if not wanted:
            return []
        counts = [requests[i].params.logprobs or 0 for i in wanted]
        found = logprobs_of(raw[self._tensor(wanted)], [max(drawn[i], 0) for i in wanted], counts)
        by_row = dict(zip(wanted, found, strict=True))
        return [by_row.get(i, TokenLogprob(token, 0.0)) for i, token in enumerate(drawn)]

    def _accept(self, request: Request, tokens: list[int], logprobs: list[TokenLogprob]) -> Event:
        before = request.drawn
        try:
            if request.matcher is not None and request.matcher.error:
                raise KllmError(request.matcher.error)
            if min(tokens) < 0:
                raise KllmError(_NOT_FINITE)
            asked = logprobs if request.params.logprobs is not None else []
            event = request.accept(tokens, asked)
        except KllmError as e:  # a grammar that breaks late, no finite logit: this request only
            event = request.finish("error", e.message)
        self.generation_tokens += request.drawn - before
        # the proposed tokens that stood are in the row already; the newest one is not
        self._computed(request, len(request.tokens) - 1)
        if request.finish_reason is not None:
            self.release(request, keep=request.finish_reason != "error")
        return event

    def release(self, request: Request, *, keep: bool = True) -> None:
        """Takes a request out of everything."""
        self._settings = None
        if self.proposer is not None:
            self.proposer.forget(request)
        self.scheduler.release(request, keep=keep)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
