"""Ctrl-C as a question to ask, not an exception, while an answer is under way."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Inside the `with`, the first Ctrl-C only sets `pending`; the second one raises KeyboardInterrupt.

    So an answer ends between two tokens with everything in order, and a hung model can still be left.
    Outside the main thread, where signals cannot be caught, it does nothing.
    """

    def __init__(self) -> None:
        self._hit = False
        self._previous: Any = None

    def pending(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._hit

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._hit:
            raise KeyboardInterrupt
        self._hit = True
