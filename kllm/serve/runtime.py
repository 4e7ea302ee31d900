"""An engine for many callers: admission, time limits and counting, on the event loop.

The engine is touched by its own thread only (`thread`); what the event loop sees are tickets and snapshots.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.requests import Request

from kllm.errors import UserError
from kllm.serve.errors import ApiError, ClientGone, context_error, from_user_error
from kllm.serve.metrics import ModelMetrics
from kllm.serve.settings import Settings
from kllm.serve.stay import Stay
from kllm.serve.thread import EngineThread, soon
from kllm.serve.ticket import Batch, Ticket

if TYPE_CHECKING:
    from kllm.engine.engine import Engine
    from kllm.engine.grammar import GrammarCompiler
    from kllm.engine.params import EngineStats, Event, SamplingParams
    from kllm.tokenizer.chat import ChatEncoder
    from kllm.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")

_LAST_RETRY = 60  # seconds; official clients do not honour a longer Retry-After


class EngineRuntime:
    """Runs one engine for many callers.

    Args:
        engine: from now on only this object uses it, but for `check` and the constants.
        encoder: the chat template, None if the tokenizer has none.
        settings: queue bounds and time limits.
        metrics: told about every request of the model itself; adapters have their own.
        on_dead: called once, from the engine thread, when the engine is given up.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        encoder: ChatEncoder | None = None,
        settings: Settings | None = None,
        metrics: ModelMetrics | None = None,
        on_dead: Callable[[], None] | None = None,
    ) -> None:
        self.engine, self.encoder = engine, encoder
        self.settings = settings or Settings()
        self.metrics = metrics or ModelMetrics()
        self._adapters: dict[str, ModelMetrics] = {}
        self.draining = False
        self.in_flight = 0
        """Requests and embeddings admitted and not finished; the event loop's number."""
        self._on_dead = on_dead
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: set[Ticket] = set()
        self._stays: set[Stay] = set()
        self._buried = False
        self._calls: set[asyncio.Future[Any]] = set()
        self._service = 1.0  # mean seconds from start to finish of a request
        self._lock = threading.Lock()
        self._thread = EngineThread(engine, self._deliver, self._died)

    # -- constants -----------------------------------------------------------------------------------

    @property
    def dead(self) -> bool:
        """The engine was given up."""
        return self._thread.dead

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.tokenizer

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.engine.max_context

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        from kllm.engine.grammar import GrammarCompiler

        if self.engine.tokenizer is None:
            raise ApiError(400, "The model has no tokenizer, so it cannot follow a grammar.")
        return GrammarCompiler(self.engine.tokenizer, self.engine.shape.vocab_size)

    @property
    def compiler(self) -> GrammarCompiler:
        """The grammar compiler, made on first use; call it from a worker thread."""
        with self._lock:
            return self._compiler

    # -- the event loop's side -----------------------------------------------------------------------

    def submit(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        *,
        timeout: float | None = None,
        stay: Stay | None = None,
    ) -> Ticket:
        """Queues one request per prompt; n choices are n equal prompts.

        Args:
            prompts: token ids.
            params: one per prompt.
            timeout: seconds for the whole, instead of the server's own limit.
            stay: the request is admitted already, and its time runs; this is its next round.

        Raises:
            ApiError: 400 a bad prompt, 429 `queue_full` with Retry-After, 503 `draining` or `engine_dead`.
        """
        self._loop = asyncio.get_running_loop()
        self._check(prompts, params)
        metrics = self.metrics_of(params[0].adapter)
        if stay is None:
            self._admit(len(prompts), metrics)
        else:
            stay.check()
            if self.dead:
                raise dead_error()
        metrics.prompt_tokens += sum(map(len, prompts))
        ticket = Ticket(prompts, params, self._cancel, time.monotonic(), stay)
        self._live.add(ticket)
        if stay is None:
            self.in_flight += len(prompts)
            self._limit(ticket, timeout)
        if stay is None or not stay.rounds:
            self._limit_waiting(ticket)
        if stay is not None:
            stay.begin(ticket)
        self._thread.start(ticket)
        return ticket

    def admit(self, adapter: str | None = None) -> Stay:
        """A place for a request of several rounds, each of them to be submitted with it.

        Raises:
            ApiError: as `submit`.
        """
        self._loop = asyncio.get_running_loop()
        metrics = self.metrics_of(adapter)
        self._admit(1, metrics)
        stay = Stay(lambda stay: self._left(stay, metrics))
        self._stays.add(stay)
        self.in_flight += 1
        self._limit(stay, None)
        return stay

    async def embed(self, prompt_ids: Sequence[int], pooling: str, adapter: str | None = None) -> list[float]:
        """The pooled hidden state [H] of a prompt, not normalised.

        Raises:
            ApiError: as `submit`.
        """
        if len(prompt_ids) > self.max_context:
            raise context_error(self.max_context, len(prompt_ids), "input")
        ids = list(prompt_ids)
        vector: list[float] = await self.call(
            lambda engine: engine.embed(ids, pooling, adapter).tolist(), self.metrics_of(adapter)
        )
        return vector

    async def call(self, function: Callable[[Engine], T], metrics: ModelMetrics | None = None) -> T:
        """`function(engine)` between two steps, in the engine's thread; `metrics` count a refusal."""
        loop = self._loop = asyncio.get_running_loop()
        self._admit(1, metrics or self.metrics)
        future: asyncio.Future[T] = loop.create_future()
        self._calls.add(future)
        self.in_flight += 1
        self._thread.call(function, future)
        try:
            return await future
        finally:
            self.in_flight -= 1
            self._calls.discard(future)

    def metrics_of(self, adapter: str | None) -> ModelMetrics:
        """What is counted for an adapter's requests; for those of the model itself with None."""
        if adapter is None:
            return self.metrics
        return self._adapters.setdefault(adapter, ModelMetrics())

    def stats(self) -> EngineStats:
        """The engine's `EngineStats` after the newest step."""
        return self._thread.snapshot

    @property
    def running(self) -> int:
        """Requests that hold a row."""
        return self._thread.snapshot.running

    @property
    def waiting(self) -> int:
        """Requests that were admitted and wait for a row."""
        return max(0, self.in_flight - self.running - self.in_tools)

    @property
    def in_tools(self) -> int:
        """Requests that were admitted and whose tools run."""
        return sum(stay.resting for stay in self._stays)

    def retry_after(self) -> int:
        """Seconds until a place in the queue is likely."""
        estimate = math.ceil(self.waiting * self._service / max(1, self.running))
        return max(1, min(_LAST_RETRY, estimate))

    def abort(self, error: ApiError) -> None:
        """Every caller gets `error` now."""
        for stay in list(self._stays):
            stay.fail(error)
        for ticket in list(self._live):
            ticket.fail(error)
        for future in list(self._calls):
            if not future.done():
                future.set_exception(error)

    def stop(self, timeout: float = 5.0) -> bool:
        """Ends the thread after the step that is under way; False if it does not end in time."""
        return self._thread.stop(timeout)

    def _check(self, prompts: list[list[int]], params: list[SamplingParams]) -> None:
        seen: set[int] = set()
        for prompt, one in zip(prompts, params, strict=True):
            if id(prompt) in seen:
                continue
            seen.add(id(prompt))
            if len(prompt) + min(1, one.max_tokens) > self.max_context:
                raise context_error(self.max_context, len(prompt), "prompt")
            try:
                self.engine.check(prompt, one)
            except UserError as e:
                raise from_user_error(e) from None

    def _admit(self, count: int, metrics: ModelMetrics) -> None:
        if self.dead:
            raise dead_error()
        if self.draining:
            raise draining_error()
        room = self.settings.max_queue + self.settings.max_running
        if count > room:
            raise ApiError(400, f"{count} answers in one request; this server takes at most {room}.")
        if self.in_flight + count > room:
            metrics.rejected += 1
            seconds = self.retry_after()
            message = f"The queue is full; try again in {seconds} s."
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})

    def _limit(self, one: Ticket | Stay, timeout: float | None) -> None:
        """The time for the whole."""
        total = self.settings.request_timeout if timeout is None else timeout
        if total:
            message = f"The request took longer than {total:g} s."
            one.expire_in(total, ApiError(408, message, code="request_timeout"))

    def _limit_waiting(self, ticket: Ticket) -> None:
        """The time in the queue."""
        if wait := self.settings.queue_timeout:
            message = f"The request waited longer than {wait:g} s."
            headers = {"Retry-After": str(self.retry_after())}
            error = ApiError(503, message, code="queue_timeout", headers=headers)
            ticket.expire_in(wait, error, unless_started=True)

    def _left(self, stay: Stay, metrics: ModelMetrics) -> None:
        self._stays.discard(stay)
        self.in_flight -= 1
        if stay.rounds:
            self._ended(metrics, stay.reason, time.monotonic() - stay.created, stay.computed)

    def _cancel(self, ticket: Ticket) -> None:
        self._thread.drop(ticket)

    def _deliver(self, batches: list[tuple[Ticket, Batch]], now: float) -> None:
        if self._buried:
            return
        for ticket, batch in batches:
            for index, event in batch:
                self._measure(ticket, index, event, now)
            ticket.push(batch)
            if ticket.unfinished <= 0:
                self._live.discard(ticket)

    def _measure(self, ticket: Ticket, index: int, event: Event, now: float) -> None:
        metrics = self.metrics_of(ticket.params[0].adapter)
        if count := len(event.token_ids):
            metrics.generation_tokens += count
            later = ticket.stay is not None and ticket.stay.rounds > 1
            if ticket.first is None and not later:
                ticket.first = now
                metrics.first_token.observe(now - ticket.created)
                metrics.queue.observe((ticket.started or now) - ticket.created)
            before = ticket.newest[index]
            if before is not None:
                metrics.between_tokens.observe((now - before) / count, count)
            ticket.newest[index] = now
        if event.finish_reason is None:
            return
        computed = now - (ticket.started or ticket.created)
        if ticket.stay is not None:  # it is counted when all its rounds are over
            ticket.stay.computed += computed
        else:
            self.in_flight -= 1
            self._ended(metrics, event.finish_reason, now - ticket.created, computed)

    def _ended(self, metrics: ModelMetrics, reason: str, seconds: float, computed: float) -> None:
        """Counts a request, which took `seconds`, and the engine `computed` of them."""
        metrics.finished(reason)
        metrics.whole.observe(seconds)
        if reason in ("stop", "length"):
            self._service += 0.1 * (computed - self._service)

    def _died(self) -> None:
        """In the engine's thread."""
        if self._loop is not None:
            soon(self._loop, self._bury)
        if self._on_dead is not None:
            self._on_dead()

    def _bury(self) -> None:
        self._buried = True
        self.abort(dead_error())
        self._live.clear()
        self.in_flight = len(self._calls)  # those count themselves out


def dead_error() -> ApiError:
    """503: only a restart helps."""
    headers = {"Retry-After": "5"}
    return ApiError(503, "The engine has stopped after an error.", code="engine_dead", headers=headers)


def draining_error() -> ApiError:
    """503: this process is about to end."""
    headers = {"Retry-After": "5", "Connection": "close"}
    return ApiError(503, "The server is shutting down.", code="draining", headers=headers)


class Cancellable(Protocol):
    """What can be stopped, e.g. a ticket."""

    def cancel(self) -> None: ...


async def until_disconnect(
    request: Request, coroutine: Coroutine[Any, Any, T], ticket: Cancellable | None
) -> T:
    """Awaits a whole answer while watching the connection; the body must have been read.

    Raises:
        ClientGone: the client left; `ticket` is cancelled.
    """
    work = asyncio.ensure_future(coroutine)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientGone
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
        if ticket is not None:
            ticket.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
