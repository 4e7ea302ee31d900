"""Work on an event loop that a signal ends in order.

A signal handler that raises, as stages have, would raise in whatever callback of the loop runs just then,
and the loop would go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from kllm.errors import Interrupted

T = TypeVar("T")


def run_stoppable(work: Coroutine[Any, Any, T], message: str, hint: str | None = None) -> T:
    """`asyncio.run`, in which SIGINT and SIGTERM cancel the work; a second one ends the process at once.

    Raises:
        Interrupted: with `message` and `hint`, once the work has cleaned up; also if it came to its end.
    """
    return asyncio.run(_guarded(work, message, hint))


async def _guarded(work: Coroutine[Any, Any, T], message: str, hint: str | None) -> T:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    got: list[int] = []

    def stop(signum: int) -> None:
        if got:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        got.append(signum)
        if task is not None:
            task.cancel()

    old: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(NotImplementedError):  # Windows: there Ctrl-C raises KeyboardInterrupt
            for signum in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(signum)
                loop.add_signal_handler(signum, stop, signum)
                old[signum] = handler
    try:
        result = await work
    except asyncio.CancelledError:
        if not got:
            raise
    finally:
        for number, handler in old.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler or signal.SIG_DFL)
    if got:
        raise Interrupted(got[0], message, hint)
    return result
