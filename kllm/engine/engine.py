"""The engine: the only place where text is generated. Requests join and leave a running batch.

Every `step` feeds one token to each running request in one pass over the model, then prefills waiting
requests into the free rows. What a request gets depends on its prompt, its parameters and its seed, not
on its neighbours. Later versions (prefix reuse, chunked prefill, paging) keep this interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kllm.engine.cache import KVCache
from kllm.engine.params import Completion, Event, SamplingParams
from kllm.engine.sampler import RowSettings, sample, uniforms
from kllm.engine.scheduler import Request, Scheduler
from kllm.errors import UserError

if TYPE_CHECKING:
    from kllm.model.transformer import Transformer
    from kllm.tokenizer.tokenizer import Tokenizer

_PREFILL_TOKENS = 4096  # prompt tokens per step: bounds activations and the pause of running answers


class Engine:
    """Batched generation over one model.

    Args:
        model: the transformer; its own device and dtype are used, it is put into eval mode while stepping.
        tokenizer: for text, stop strings and the default stop tokens; None generates token ids only.
        max_batch: most requests that run at once; others wait in order.
        max_context: most tokens of prompt and answer together; at most (and by default) the model's
            positions.

    Not thread-safe: one thread calls it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        max_batch: int = 32,
        max_context: int | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {max_batch}")
        shape = model.shape
        self.model, self.tokenizer = model, tokenizer
        self.max_context = min(max_context or shape.max_position_embeddings, shape.max_position_embeddings)
        weight = model.head_weight
        self.device = weight.device
        self.cache = KVCache(
            shape.num_hidden_layers,
            shape.num_key_value_heads,
            shape.head_dim,
            max_rows=max_batch,
            max_length=self.max_context,
            dtype=weight.dtype,
            device=self.device,
        )
        self._scheduler = Scheduler(max_batch, _PREFILL_TOKENS)
        self._settings: RowSettings | None = None
        self._next_id = 0
        self._early: list[Event] = []  # finished without a step: cancelled, or nothing to generate
        self._claimed: dict[int, list[Event]] = {}  # events that generate() or stream() waits for
        self._unread: list[Event] = []  # events of other requests that came while these stepped

    # -- the asynchronous face: submit, step, cancel -------------------------------------------------

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Queues a request and returns its id.

        An answer ends with `length` when prompt and answer fill the context; a prompt that fills it alone
        gets an empty answer.

        Raises:
            UserError: empty prompt, ids outside the vocabulary, a prompt longer than the context, or
                stop strings without a tokenizer.
        """
        prompt, vocab = list(prompt_ids), self.model.shape.vocab_size
        if not prompt:
            raise UserError("the prompt has no tokens", where="prompt")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise UserError(f"token id {bad} is outside the vocabulary of {vocab}", where="prompt")
        if len(prompt) > self.max_context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model's context is {self.max_context}",
                where="prompt",
                hint="shorten the prompt",
            )
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer", where="stop")
        limit = min(params.max_tokens, self.max_context - len(prompt))
        request = Request(self._next_id, prompt, params, self.tokenizer, limit, vocab)
        self._next_id += 1
        if limit == 0:
            self._early.append(request.finish("length"))
        else:
            self._scheduler.waiting.append(request)
        return request.number

    def cancel(self, request_id: int) -> None:
        """Ends a request at once; the next step reports it. Unknown and finished ids are ignored."""
        request = self._scheduler.find(request_id)
        if request is not None:
            self._early.append(request.finish("cancelled"))
            self._release(request)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to report."""
        s = self._scheduler
        return bool(s.running or s.waiting or self._early or self._unread)

    def step(self) -> list[Event]:
        """One token for every running request and the first one for those that can join."""
        events, self._unread = self._unread, []
        for event in self._advance():
            self._claimed.get(event.request_id, events).append(event)
        return events

    # -- the synchronous face ------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_event: Callable[[Event], None] | None = None,
    ) -> list[Completion]:
        """Answers all `prompts`, in their order, as many at a time as fit.

        Args:
            prompts: token ids, one list per request.
            params: one for all, or one per prompt.
            on_event: called with every event; `request_id` is the index into `prompts`.

        Raises:
            UserError: as `submit`, before anything is generated.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        done = [Completion(prompt_tokens=len(p)) for p in prompts]
        index: dict[int, int] = {}
        try:
            for i, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
                index[self.submit(prompt, one)] = i
            for event in self._events(set(index)):
                i = index[event.request_id]
                done[i].token_ids += event.token_ids
                done[i].text += event.text
                if event.finish_reason is not None:
                    done[i].finish_reason = event.finish_reason
                if on_event is not None:
                    on_event(Event(i, event.token_ids, event.text, event.finish_reason))
        finally:
            self._drop(set(index))
        return done

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        """Events of one request as they come; closing the iterator cancels it.

        Raises:
            UserError: as `submit`, at once.
        """
        number = self.submit(prompt_ids, params)

        def events() -> Iterator[Event]:
            try:
                yield from self._events({number})
            finally:
                self._drop({number})

        return events()

    def _events(self, numbers: set[int]) -> Iterator[Event]:
        box: list[Event] = []
        pending = set(numbers)
        self._claimed.update(dict.fromkeys(numbers, box))
        while pending:
            while box:
                event = box.pop(0)
                if event.finish_reason is not None:
                    pending.discard(event.request_id)
                yield event
            if pending:
                self._unread = self.step()  # what was unread before is still in it

    def _drop(self, numbers: set[int]) -> None:
        """Forgets requests whose reader has gone, without a word."""
        for number in numbers:
            self.cancel(number)
            self._claimed.pop(number, None)
        self._early = [e for e in self._early if e.request_id not in numbers]

    # -- one step ------------------------------------------------------------------------------------

    def _advance(self) -> list[Event]:
        events, self._early = self._early, []
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.inference_mode():
                if self._scheduler.running:
                    events += self._decode()
                for group in self._scheduler.admit():
                    events += self._prefill(group)
        finally:
            if training:
                self.model.train()
        return events

    def _decode(self) -> list[Event]:
        running = list(self._scheduler.running)
        positions = [r.position for r in running]
        self.model.ensure_context(max(positions) + 1)
        self.cache.decode(positions)
        tokens = self._tensor([[r.output[-1]] for r in running])
        hidden = self.model(tokens, self._tensor(positions)[:, None], cache=self.cache)
        if self._settings is None:
            self._settings = self._build(running)
        return self._accept(running, self._sample(running, hidden[:, 0], self._settings))

    def _prefill(self, group: list[Request]) -> list[Event]:
        """First pass over new requests, padded on the right: causal attention never sees the padding."""
        lengths = [len(r.prompt) for r in group]
        longest = max(lengths)
        self.model.ensure_context(longest)
        self.cache.prefill(len(self._scheduler.running), len(group), longest)
        tokens = self._tensor([r.prompt + [0] * (longest - len(r.prompt)) for r in group])
        positions = torch.arange(longest, device=self.device).expand(len(group), -1)
        hidden = self.model(tokens, positions, cache=self.cache)
        last = hidden[torch.arange(len(group), device=self.device), self._tensor(lengths) - 1]
        drawn = self._sample(group, last, self._build(group))
        self._scheduler.start(group)
        self._settings = None
        return self._accept(group, drawn)

    def _sample(self, requests: list[Request], hidden: Tensor, settings: RowSettings) -> list[int]:
        """Next token of each request from the hidden states [B, H] of its newest one."""
        logits = self.model.logits(hidden).float()
        noise = uniforms([r.seed for r in requests], [len(r.output) for r in requests])
        seen = [r.seen for r in requests if r.seen is not None]
        return sample(logits, settings, noise, torch.stack(seen).to(self.device) if seen else None).tolist()

    def _accept(self, requests: list[Request], tokens: list[int]) -> list[Event]:
        events = [request.accept(token) for request, token in zip(requests, tokens, strict=True)]
        for request in requests:
            if request.finish_reason is not None:
                self._release(request)
        return events

    def _release(self, request: Request) -> None:
        self._settings = None
        moved = self._scheduler.remove(request)
        if moved is not None:
            source, target = moved
            self.cache.move(source, target, self._scheduler.running[target].position)

    def _build(self, requests: list[Request]) -> RowSettings:
        return RowSettings.build([r.params for r in requests], self.device, self.model.shape.vocab_size)

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
