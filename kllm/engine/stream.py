"""Events of some requests as they come, whoever steps the engine meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kllm.engine.params import Event
from kllm.errors import KllmError

if TYPE_CHECKING:
    from kllm.engine.engine import Engine


class EventStream:
    """Iterates over the events of requests `numbers`; closing it cancels what still runs.

    Raises:
        KllmError: a request failed.
    """

    def __init__(self, engine: Engine, numbers: Iterable[int]) -> None:
        self._engine = engine
        self._numbers = set(numbers)
        self._open = set(self._numbers)
        self._box: list[Event] = []
        engine.claim(self._numbers, self._box)

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Event:
        while not self._box:
            if not self._open:
                self.close()
                raise StopIteration
            self._engine.advance()
        event = self._box.pop(0)
        if event.finish_reason is not None:
            self._open.discard(event.request_id)
        if event.finish_reason == "error":
            self.close()
            raise KllmError(event.message)
        return event

    def close(self) -> None:
        """Forgets the requests, without a word."""
        numbers, self._numbers, self._open = self._numbers, set(), set()
        if numbers:
            self._engine.disown(numbers)

    def __del__(self) -> None:
        self.close()
