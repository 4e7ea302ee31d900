"""The engine: the only place where text is generated. Requests join and leave a running batch.

Every `step` is one pass over the model: one token of each answer under way and a chunk of the prompts
that wait. What a request gets depends on its prompt, its parameters and its seed, not on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kllm.engine.cache import KVCache
from kllm.engine.kvformat import kv_format
from kllm.engine.params import Completion, EngineStats, Event, SamplingParams
from kllm.engine.prefix import PrefixCache
from kllm.engine.request import Request
from kllm.engine.rows import PAGE, Rows
from kllm.engine.scheduler import Scheduler
from kllm.engine.stepper import Stepper
from kllm.engine.stream import EventStream
from kllm.errors import UserError
from kllm.model.decode import Prepared, ScratchCache, prepare
from kllm.model.decode_adapters import AdapterWeights
from kllm.model.presets import count_parameters
from kllm.model.transformer import Transformer

if TYPE_CHECKING:
    from kllm.tokenizer.tokenizer import Tokenizer

_MEMORY = 2**31  # bytes of keys and values unless told otherwise
_CHUNK = {"cpu": 256, "mps": 512}
_GPU_CHUNK = 2048


class Engine:
    """Batched generation over one model.

    Args:
        model: the transformer, of which the engine makes its own copy, laid out for generation (see
            `reload`); or such a copy, made by `prepare`.
        tokenizer: for text, stop strings and the default stop tokens; None generates token ids only.
        max_batch: most requests that run at once; others wait in order.
        max_context: most tokens of prompt and answer together; at most (and by default) the model's
            positions.
        kv_memory: bytes for keys and values, running and cached.
        kv_dtype: `auto` (the model's numbers), `int8` or `int4`.
        prefill_chunk: prompt tokens computed beside the answers under way in one step.
        prefix_cache: whether beginnings of prompts that were computed before are used again.
        weights: `auto`, `fp32`, `int8` or `int4`; see `kllm.model.decode.prepare`.
        speculate: so many tokens are guessed and checked at once (0: none), from the text so far or by
            `draft`, a smaller model with the same vocabulary. Changes the speed only.
        owns_model: the model's own matrices may be freed.

    Not thread-safe: one thread calls it (`check` may be called from any).

    Raises:
        UserError: options that do not fit the model.
    """

    def __init__(
        self,
        model: Transformer | Prepared,
        tokenizer: Tokenizer | None,
        *,
        max_batch: int = 32,
        max_context: int | None = None,
        kv_memory: int | None = None,
        kv_dtype: str = "auto",
        prefill_chunk: int | None = None,
        prefix_cache: bool = True,
        weights: str = "auto",
        speculate: int = 0,
        draft: Transformer | None = None,
        owns_model: bool = False,
    ) -> None:
        for name, value in (
            ("max_batch", max_batch),
            ("max_context", max_context),
            ("prefill_chunk", prefill_chunk),
        ):
            if value is not None and value < 1:
                raise UserError(f"must be at least 1, not {value}", where=name)
        if speculate < 0:
            raise UserError(f"must be 0 (off) or more, not {speculate}", where="speculate")
        self.shape, self.tokenizer = model.shape, tokenizer
        self.parameters = count_parameters(model.shape)
        self.prepared = (
            prepare(model, weights=weights, own=owns_model) if isinstance(model, Transformer) else model
        )
        self.device = torch.device(self.prepared.device)
        wanted = min(max_context or self.shape.max_position_embeddings, self.shape.max_position_embeddings)
        fmt = kv_format(kv_dtype, self.shape.head_dim, self.prepared.dtype)
        layers, kv_heads = self.shape.num_hidden_layers, self.shape.num_key_value_heads
        whole = _MEMORY if kv_memory is None else kv_memory
        budget = whole if draft is None else whole * 3 // 4  # the draft's keys and values have the rest
        rows = Rows(layers, kv_heads, fmt, max_length=wanted, budget=budget, device=self.device)
        if kv_memory is None:
            rows.budget = max(budget, wanted * rows.token_bytes)
        self.max_context = rows.longest
        if not self.max_context:
            raise UserError(
                f"{budget:,} bytes hold {budget // rows.token_bytes} tokens",
                where="kv-memory",
                hint=f"a token takes {rows.token_bytes:,}; give more",
            )
        chunk = prefill_chunk or _CHUNK.get(self.device.type, _GPU_CHUNK)
        self.scheduler = Scheduler(rows, PrefixCache(prefix_cache), max_running=max_batch, chunk=chunk)
        proposer = self._proposer(speculate, draft, weights, whole // 4)
        cache = KVCache(fmt, self.device)
        self._stepper = Stepper(
            self.prepared, self.scheduler, cache, proposer, self.shape.vocab_size, self.device
        )
        self._next_id = 0
        self._prompt_tokens = 0
        self._early: list[Event] = []  # finished without a step: cancelled, or nothing to generate
        self._claimed: dict[int, list[Event]] = {}  # events that generate() or stream() waits for
        self._unread: list[Event] = []  # events of other requests that came while these stepped

    def _proposer(self, speculate: int, draft: Transformer | None, weights: str, memory: int) -> Any:
        if draft is None:
            from kllm.engine.spec import PromptLookup

            return PromptLookup(speculate) if speculate else None
        from kllm.engine.draft import DraftModel

        if draft.shape.vocab_size != self.shape.vocab_size:
            raise UserError(
                f"{draft.shape.vocab_size:,} tokens, the model has {self.shape.vocab_size:,}",
                where="draft",
                hint="a draft model needs the model's own tokenizer",
            )
        return DraftModel(prepare(draft, weights=weights), speculate or 4, memory)

    def reload(self, model: Transformer) -> None:
        """Takes new weights of the same shape; what was cached with the old ones is forgotten.

        Adapters stay, on top of the new weights.
        """
        self.scheduler.preempt_all()  # they go on with the new weights, from their first token
        self.prepared.reload(model)
        self.scheduler.prefix.clear()

    # -- adapters ------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names that `SamplingParams.adapter` may say."""
        return list(self.prepared.adapters.numbers)

    def add_adapter(self, name: str, weights: AdapterWeights) -> None:
        """Takes in a LoRA that requests may choose; those of one step may all have different ones.

        Args:
            name: what requests call it.
            weights: from `kllm.export.adapter_weights`, or of a model in training.

        Raises:
            UserError: the name is taken, another model's adapter, one that can only be merged.
        """
        self.prepared.adapters.add(name, weights)

    def remove_adapter(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            UserError: there is none of that name, or an unfinished request has it.
        """
        number = self._adapter(name)
        if any(r.adapter == number for r in (*self.scheduler.running, *self.scheduler.waiting)):
            raise UserError("is in use", where=f"adapter {name}", hint="let its requests end first")
        self.prepared.adapters.remove(name)

    def _adapter(self, name: str | None) -> int:
        """The number of an adapter, 0 for None; UserError for an unknown one."""
        if name is None:
            return 0
        number: int | None = self.prepared.adapters.numbers.get(name)
        if number is None:
            known = ", ".join(self.adapters) or "none"
            raise UserError(f"no adapter is called {name!r}", where="adapter", hint=f"there are: {known}")
        return number

    # -- the asynchronous face: submit, step, cancel -------------------------------------------------

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Whether `submit` would take this. Pure, for any thread.

        Raises:
            UserError: empty prompt, ids outside the vocabulary, a prompt longer than the context,
                stop strings without a tokenizer, or an unknown adapter.
        """
        vocab = self.shape.vocab_size
        if not prompt_ids:
            raise UserError("the prompt has no tokens", where="prompt")
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab:
            bad = next(t for t in prompt_ids if not 0 <= t < vocab)
            raise UserError(f"token id {bad} is outside the vocabulary of {vocab}", where="prompt")
        if len(prompt_ids) > self.max_context:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens, the model's context is {self.max_context}",
                where="prompt",
                hint="shorten the prompt",
            )
        self._adapter(params.adapter)
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer", where="stop")
        biased = [token for token, _ in params.logit_bias]
        for name, ids in (("logit_bias", biased), ("stop_token_ids", params.stop_token_ids)):
            wrong = next((t for t in ids if not 0 <= t < vocab), None)
            if wrong is not None:
                raise UserError(f"token id {wrong} is outside the vocabulary of {vocab}", where=name)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Queues a request and returns its id.

        An answer ends with `length` when prompt and answer fill the context; a prompt that fills it alone
        gets an empty answer.

        Raises:
            UserError: as `check`.
        """
        prompt = list(prompt_ids)
        self.check(prompt, params)
        limit = min(params.max_tokens, self.max_context - len(prompt))
        scored = params.prompt_logprobs is not None
        vocab, number = self.shape.vocab_size, self._adapter(params.adapter)
        request = Request(
            self._next_id, prompt, params, self.tokenizer, max(limit, int(scored)), vocab, number
        )
        self._next_id += 1
        self._prompt_tokens += len(prompt)
        if limit == 0 and not scored:
            self._early.append(request.finish("length"))
        else:
            request.mute = limit == 0
            self.scheduler.waiting.append(request)
        return request.number

    def cancel(self, request_id: int) -> None:
        """Ends a request at once; the next step reports it. Unknown and finished ids are ignored."""
        request = self.scheduler.find(request_id)
        if request is not None:
            self._early.append(request.finish("cancelled"))
            self._stepper.release(request)

    def fail_all(self, message: str) -> list[Event]:
        """Ends every request with `error` after a step went wrong; nothing computed is trusted any more."""
        s = self.scheduler
        events, self._early = self._early, []
        for request in [*s.running, *s.waiting]:
            self._stepper.release(request, keep=False)  # rows are wiped: what broke may lie in them
            events.append(request.finish("error", message))
        s.prefix.clear()
        return events

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to report."""
        s = self.scheduler
        return bool(s.running or s.waiting or self._early or self._unread)

    def step(self) -> list[Event]:
        """One token (or some that were guessed) for every answer under way, and a chunk of the prompts."""
        events, self._unread = self._unread, []
        for event in self._advance():
            self._claimed.get(event.request_id, events).append(event)
        return events

    def _advance(self) -> list[Event]:
        events, self._early = self._early, []
        if self.scheduler.running or self.scheduler.waiting:
            with torch.inference_mode():
                events += self._stepper.step()
        return events

    def stats(self) -> EngineStats:
        """Counts for metrics and tests."""
        s, step = self.scheduler, self._stepper
        total = s.rows.budget // (PAGE * s.rows.token_bytes)
        return EngineStats(
            running=len(s.running),
            waiting=len(s.waiting),
            kv_pages_total=total,
            kv_pages_free=total - s.rows.live_pages,
            kv_pages_cached=s.prefix.pages,
            preemptions=s.preemptions,
            prefix_queries=s.prefix_queries,
            prefix_hits=s.prefix_hits,
            prompt_tokens=self._prompt_tokens,
            computed_tokens=step.computed_tokens,
            generation_tokens=step.generation_tokens,
        )

    def kv_line(self) -> str:
        """The memory bound in words."""
        rows = self.scheduler.rows
        mib, tokens = rows.budget / 2**20, rows.budget // rows.token_bytes
        return f"KV {mib:,.0f} MiB = {tokens:,} tokens, {self.scheduler.max_running} rows"

    @torch.inference_mode()
    def embed(self, prompt_ids: Sequence[int], pooling: str = "mean", adapter: str | None = None) -> Tensor:
        """A vector of a text: the mean of its last hidden states, or the last of them.

        Returns:
            float32 [H], not normalised.

        Raises:
            UserError: as `check`.
        """
        self.check(prompt_ids, SamplingParams(adapter=adapter))
        ids = torch.tensor(list(prompt_ids), dtype=torch.int64, device=self.device)
        self.prepared.ensure_context(len(ids))
        positions = torch.arange(len(ids), device=self.device)
        number = self._adapter(adapter)
        chosen = self.prepared.adapters.choose([number], [len(ids)]) if number else None
        hidden = self.prepared(ids, positions, ScratchCache(), chosen).float()
        return hidden[-1] if pooling == "last" else hidden.mean(0)

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
            KllmError: a request failed (damaged weights).
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        done = [Completion(prompt_tokens=len(p)) for p in prompts]
        index: dict[int, int] = {}
        try:
            for i, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
                index[self.submit(prompt, one)] = i
            stream = EventStream(self, index)
            for event in stream:
                i = index[event.request_id]
                done[i].add(event)
                if on_event is not None:
                    on_event(replace(event, request_id=i))
        finally:
            self.disown(set(index))
        return done

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> EventStream:
        """Events of one request as they come; closing the iterator cancels it.

        Raises:
            UserError: as `submit`, at once.
            KllmError: it failed (damaged weights).
        """
        return EventStream(self, [self.submit(prompt_ids, params)])

    def claim(self, numbers: Iterable[int], box: list[Event]) -> None:
        """From now on the events of these requests go into `box`, not to whoever calls `step`."""
        self._claimed.update(dict.fromkeys(numbers, box))

    def advance(self) -> None:
        """A step whose events nobody takes at once: those of other requests wait for the next `step`."""
        self._unread = self.step()  # what was unread before is still in it

    def disown(self, numbers: set[int]) -> None:
        """Forgets requests whose reader has gone, without a word."""
        for number in numbers:
            self.cancel(number)
            self._claimed.pop(number, None)
        self._early = [e for e in self._early if e.request_id not in numbers]
