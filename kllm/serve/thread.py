"""The thread that owns an engine: takes orders, steps, and hands what came to the event loop.

Everything here but `post`, `stop` and the plain attributes runs in that thread.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kllm.errors import KllmError, UserError
from kllm.serve.errors import from_user_error, internal_error
from kllm.serve.ticket import Batch, Ticket

if TYPE_CHECKING:
    from kllm.engine.engine import Engine
    from kllm.engine.params import EngineStats, Event

T = TypeVar("T")
log = logging.getLogger("kllm.serve")

_DEATHS = 2  # failed steps in a row, without a token between them, after which the engine is given up


class EngineThread:
    """Runs one engine until it is stopped or dead.

    Args:
        engine: nobody else steps it.
        deliver: called on the event loop with the events of a step, by ticket, and their time.
        on_dead: called here when the engine is given up; `dead` is set by then.

    Attributes:
        snapshot: the engine's counts after the newest step.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[tuple[Ticket, Batch]], float], None],
        on_dead: Callable[[], None],
    ) -> None:
        self.engine = engine
        self.dead = False
        self.snapshot: EngineStats = engine.stats()
        self._deliver, self._on_dead = deliver, on_dead
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: deque[Callable[[], None]] = deque()
        self._owners: dict[int, tuple[Ticket, int]] = {}
        self._pending: dict[int, Ticket] = {}  # not started yet, in order
        self._early: list[tuple[Ticket, Batch]] = []
        self._failures = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # -- for any thread ------------------------------------------------------------------------------

    def start(self, ticket: Ticket) -> None:
        """Submits a ticket's requests."""
        self._inbox.put(partial(self._start, ticket))

    def drop(self, ticket: Ticket) -> None:
        """Cancels what is left of them."""
        self._inbox.put(partial(self._drop, ticket))

    def call(self, function: Callable[[Engine], T], future: asyncio.Future[T]) -> None:
        """`function(engine)` between two steps; one such call per step. The result goes into `future`."""
        self._inbox.put(partial(self._jobs.append, partial(self._call, function, future)))

    def stop(self, timeout: float) -> bool:
        """Ends the thread after the step that is under way; False if it does not end in time."""

        def stop() -> None:
            self._stopping = True

        self._inbox.put(stop)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- inside --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._stopping and not self.dead:
                self._take_orders()
                if self._jobs:
                    self._jobs.popleft()()
                events = self._step() if self.engine.has_work and not self._stopping else []
                self._publish(events)
        except Exception:
            log.exception("the engine's thread failed")
            self._die()

    def _take_orders(self) -> None:
        idle = not (self.engine.has_work or self._jobs or self._early)
        try:
            while True:
                self._inbox.get(block=idle)()
                idle = False
        except queue.Empty:
            pass

    def _start(self, ticket: Ticket) -> None:
        try:
            for index, (prompt, params) in enumerate(zip(ticket.prompts, ticket.params, strict=True)):
                number = self.engine.submit(prompt, params)
                ticket.numbers.append(number)
                self._owners[number] = (ticket, index)
                self._pending[number] = ticket
        except Exception as error:
            if not isinstance(error, KllmError):
                log.exception("a request could not be started")
            self._refuse(ticket, str(error) if isinstance(error, UserError) else "")

    def _refuse(self, ticket: Ticket, message: str) -> None:
        """Requests that the engine did not take: the others of the ticket are of no use either."""
        from kllm.engine.params import Event

        missing = range(len(ticket.numbers), len(ticket.prompts))
        self._early.append((ticket, [(i, Event(-1, (), "", "error", message=message)) for i in missing]))
        self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        for number in ticket.numbers:
            if number in self._owners:
                self.engine.cancel(number)

    def _step(self) -> list[Event]:
        try:
            events = self.engine.step()
        except Exception:
            log.exception("a step of the engine failed")
            self._failures += 1
            return self._recover()
        if any(event.token_ids for event in events):
            self._failures = 0
        return events

    def _recover(self) -> list[Event]:
        events: list[Event] = []
        try:
            events = self.engine.fail_all("The server failed on this request.")
        except Exception:
            log.exception("the engine could not drop its requests")
            self._failures = _DEATHS
        if self._failures >= _DEATHS:
            self._die()
        return events

    def _die(self) -> None:
        self.dead = True
        log.critical("the engine is dead; only a restart helps")
        self._on_dead()

    def _publish(self, events: list[Event]) -> None:
        """Hands a step's events to the event loop: one call for all."""
        self.snapshot = self.engine.stats()
        now = time.monotonic()
        while len(self._pending) > self.snapshot.waiting:
            ticket = self._pending.pop(next(iter(self._pending)))
            ticket.started = ticket.started or now
        batches: dict[Ticket, Batch] = {}
        early, self._early = self._early, []
        for ticket, batch in early:
            batches.setdefault(ticket, []).extend(batch)
        for event in events:
            owner = self._owners.get(event.request_id)
            if owner is None:
                continue
            if event.finish_reason is not None:
                del self._owners[event.request_id]
                self._pending.pop(event.request_id, None)
            batches.setdefault(owner[0], []).append((owner[1], event))
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Batch]]] = {}
        for ticket, batch in batches.items():
            by_loop.setdefault(ticket.loop, []).append((ticket, batch))
        for loop, items in by_loop.items():
            soon(loop, self._deliver, items, now)

    def _call(
        self,
        function: Callable[[Engine], T],
        future: asyncio.Future[T],
    ) -> None:
        if future.cancelled():
            return
        result: Any = None
        error: Exception | None = None
        try:
            result = function(self.engine)
        except UserError as e:
            error = from_user_error(e)
        except Exception:
            log.exception("a call between two steps failed")
            error = internal_error()

        def settle() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        soon(future.get_loop(), settle)


def soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function` on `loop`, if that still runs."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop is closed: nobody listens any more
        log.debug("an event came after the end of its loop")
