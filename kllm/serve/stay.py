"""A request's place among those that are admitted, for as many rounds as it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from kllm.serve.errors import ApiError, ClientGone
from kllm.serve.worker import TookTooLong

if TYPE_CHECKING:
    from kllm.serve.ticket import Ticket

T = TypeVar("T")


class Stay:
    """One place in the queue, kept between the rounds: a later round is never refused.

    All methods belong to the event loop. Whoever got it must `cancel` it at the end.

    Args:
        leave: gives the place back; called once.

    Attributes:
        created: seconds on `time.monotonic`'s clock.
        rounds: begun so far.
        computed: seconds that the engine worked on those that have ended.
        reason: of its end, as it is counted; whoever finishes it says another.
    """

    def __init__(self, leave: Callable[[Stay], None]) -> None:
        self.created = time.monotonic()
        self.rounds = 0
        self.computed = 0.0
        self.reason = "cancelled"
        self._leave = leave
        self._ticket: Ticket | None = None
        self._error: ApiError | None = None
        self._over = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        """Nothing more is to be done: cancelled or failed. May be read from any thread."""
        return self._over.is_set()

    @property
    def resting(self) -> bool:
        """It wants nothing from the engine now: its tools run."""
        return self._ticket is None or self._ticket.ended

    def check(self) -> None:
        """Refuses to go on with what has ended.

        Raises:
            ApiError, ClientGone: why it has.
        """
        if self.ended:
            raise self._error or ClientGone

    def begin(self, ticket: Ticket) -> None:
        """The next round runs."""
        self.rounds += 1
        self._ticket = ticket

    def cancel(self) -> None:
        """Stops what still runs and gives the place back."""
        if not self.ended:
            self._end()

    def fail(self, error: ApiError) -> None:
        """As `cancel`; who reads or waits gets `error`."""
        if not self.ended:
            self._error = error
            if self._ticket is not None:
                self._ticket.fail(error)
            self._end()

    def expire_in(self, seconds: float, error: ApiError) -> None:
        """Fails with `error` after `seconds`."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    async def wait(self, work: Awaitable[T], seconds: float | None = None) -> T:
        """The result of `work`, which is cancelled if this ends first.

        Raises:
            ApiError, ClientGone: it ended.
            TookTooLong: it took longer than `seconds`.
        """
        task = asyncio.ensure_future(work)
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({task, over}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            self.check()
            raise TookTooLong
        finally:
            task.cancel()
            over.cancel()

    def _end(self) -> None:
        self._over.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._ticket is not None:
            self._ticket.cancel()
        self._leave(self)
