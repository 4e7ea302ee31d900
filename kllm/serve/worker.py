"""Work that would hold up the event loop: in threads, with a limit that really ends it.

The limit counts the thread's own CPU seconds where the system can tell them, so a busy machine does not
turn innocent requests away. Python code over its limit (a template that loops) gets an exception thrown
into it; native code runs to its end, but nobody waits for it.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_THREADS = 6
_STALL = 10  # times the limit in wall time ends it too: a thread that sleeps uses no CPU


class TookTooLong(Exception):
    """The work was given up."""


class _Interrupt(BaseException):
    """Thrown into the thread; no `except Exception` in a template's filters catches it."""


async def limited(seconds: float, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`function(*args, **kwargs)` in a worker thread, at most `seconds` of work.

    Raises:
        TookTooLong: it needed more.
    """
    job = Job(function, args, kwargs)
    future = asyncio.get_running_loop().run_in_executor(_pool(), job.run)
    while True:
        done, _ = await asyncio.wait({future}, timeout=max(seconds - job.used(), 0.02))
        if done:
            return future.result()
        if job.used() >= seconds:
            future.add_done_callback(lambda late: late.cancelled() or late.exception())
            job.interrupt()
            raise TookTooLong


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="kllm-work")


class Job(Generic[T]):
    """One call, made by `run` in some thread, which another thread can watch and interrupt.

    Args:
        function: what is called, with the arguments that follow.
    """

    def __init__(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = function, args, kwargs
        self._lock = threading.Lock()
        self._thread = 0
        self._done = self._interrupted = False
        self._started = self._cpu = 0.0

    def run(self) -> T:
        """The call; raises TookTooLong if it was interrupted."""
        function, args, kwargs = self._call
        try:
            with self._lock:
                self._thread = threading.get_ident()
                self._started, self._cpu = time.monotonic(), time.thread_time()
            return function(*args, **kwargs)
        except _Interrupt:
            raise TookTooLong from None
        finally:
            with self._lock:
                self._done = True
                if self._interrupted:  # it may still be on its way: not into the thread's next job
                    _throw(self._thread, None)

    def used(self) -> float:
        """Seconds of work so far; 0 while it waits for a thread."""
        with self._lock:
            if not self._thread or self._done:
                return 0.0
            wall = (time.monotonic() - self._started) / _STALL
            try:
                clock = time.pthread_getcpuclockid(self._thread)
                return max(time.clock_gettime(clock) - self._cpu, wall)
            except (AttributeError, OSError):
                return wall * _STALL

    def interrupt(self) -> None:
        """Ends it where it runs Python; native code first comes to its own end."""
        with self._lock:
            if self._thread and not self._done and not self._interrupted:
                self._interrupted = True
                _throw(self._thread, _Interrupt)


def _throw(thread: int, exception: type[BaseException] | None) -> None:
    """Sets or clears the exception that a Python thread meets at its next instruction."""
    argument = ctypes.py_object(exception) if exception is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), argument)
