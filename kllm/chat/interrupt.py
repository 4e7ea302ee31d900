"""The keyboard while an answer is under way: Ctrl-C is a question to ask, other keys wait."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
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


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Keys that are pressed while an answer is drawn do not show in it; they stand on the next line."""
    try:
        import termios

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (ImportError, OSError, ValueError, AttributeError):  # no terminal, or none of this kind
        yield
        return
    silent = [*before]
    silent[0] &= ~termios.ICRNL  # Enter stays Enter for the editor, which takes a newline for Ctrl-J
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
