"""What a caller holds while its requests run: events as they come, an end, a way to stop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kllm.serve.errors import ApiError, internal_error

if TYPE_CHECKING:
    from kllm.engine.params import Event, SamplingParams
    from kllm.serve.stay import Stay

Batch = list[tuple[int, "Event"]]


class Ticket:
    """Requests that were admitted together: the prompts and choices of one call.

    All methods belong to the event loop that submitted it; `numbers` and `started` are the engine thread's.

    Attributes:
        stay: the request whose round this is; None where each of its requests has a place of its own.
        created, started, first: seconds on `time.monotonic`'s clock: admission, first prefill, first token
            (None before); `newest` is the newest token of each.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        on_cancel: Callable[[Ticket], None],
        created: float,
        stay: Stay | None = None,
    ) -> None:
        self.prompts, self.params = prompts, params
        self.stay = stay
        self.created = created
        self.started: float | None = None
        self.first: float | None = None
        self.newest: list[float | None] = [None] * len(prompts)
        self.loop = asyncio.get_running_loop()
        self.numbers: list[int] = []
        self.unfinished = len(prompts)
        self._on_cancel = on_cancel
        self._buffer: Batch = []
        self._error: ApiError | None = None
        self._ended = False
        self._wake = asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []

    @property
    def ended(self) -> bool:
        """Nothing more will come: finished, cancelled or failed."""
        return self._ended

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """(index into the prompts, event): all that came since the last read, one event per index.

        Leaving the loop early cancels the requests.

        Raises:
            ApiError: 408 `request_timeout`, 503 (queue time, draining, engine dead), 500 (engine failed).
        """
        try:
            while True:
                if self._buffer:
                    batch, self._buffer = self._buffer, []
                    yield merged(batch)
                elif self._error is not None:
                    raise self._error
                elif self._ended:
                    return
                else:
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stops what still runs; its rows are free after the step that is under way."""
        if not self._ended:
            self._buffer.clear()
            self._end()
            self._on_cancel(self)

    def fail(self, error: ApiError) -> None:
        """As `cancel`; the reader gets what came before, then `error`."""
        if not self._ended:
            self._error = error
            self._end()
            self._on_cancel(self)

    def expire_in(self, seconds: float, error: ApiError, unless_started: bool = False) -> None:
        """Fails with `error` after `seconds`, or not if the requests have left the queue by then."""

        def expire() -> None:
            if not (unless_started and self.started is not None):
                self.fail(error)

        self._timers.append(self.loop.call_later(seconds, expire))

    def push(self, batch: Batch) -> None:
        """Takes what the engine says."""
        for index, event in batch:
            if event.finish_reason is not None:
                self.unfinished -= 1
            if self._ended:
                continue
            if event.finish_reason == "error":
                self.fail(internal_error(event.message[:200]) if event.message else internal_error())
            else:
                self._buffer.append((index, event))
        if self.unfinished == 0 and not self._ended:
            self._end()
        self._wake.set()

    def _end(self) -> None:
        self._ended = True
        for timer in self._timers:
            timer.cancel()
        self._wake.set()


_MANY = 16  # events of one answer since the last read: the reader is slow


def merged(batch: Batch) -> Batch:
    """What a reader that keeps up gets as it came; for a slow one, one event per index, its texts joined."""
    if len(batch) <= _MANY * len({index for index, _ in batch}):
        return batch
    groups: dict[int, list[Event]] = {}
    for index, event in batch:
        groups.setdefault(index, []).append(event)
    return [(index, events[0] if len(events) == 1 else _joined(events)) for index, events in groups.items()]


def _joined(events: list[Event]) -> Event:
    chain = itertools.chain.from_iterable
    return replace(
        events[0],
        token_ids=tuple(chain(e.token_ids for e in events)),
        text="".join(e.text for e in events),
        finish_reason=events[-1].finish_reason,
        logprobs=tuple(chain(e.logprobs for e in events)),
        prompt_logprobs=next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None),
        cached_tokens=max(e.cached_tokens for e in events),
        message=events[-1].message,
    )
