"""Calls of tools while the event loop goes on: in a thread of their own, which can be left behind."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from kllm.errors import KllmError
from kllm.serve.body import MAX_DEPTH, nesting
from kllm.serve.stay import Stay
from kllm.serve.thread import soon
from kllm.serve.worker import Job, TookTooLong
from kllm.tools.loop import Result, ToolLoop
from kllm.tools.registry import Toolbox, python
from kllm.tools.tool import Tool, ToolCrash, ToolError

log = logging.getLogger("kllm.serve")

_GRACE = 2.0  # seconds for what was told to stop


class ServerBox(Toolbox):
    """A request's tools, which cannot harm the server by the way they fail.

    Args:
        tools: as for a toolbox, like `unsafe_python`.
        ended: whether the request has.

    Attributes:
        stopped: set it, and what runs ends soon.
        python_busy: there is no sandbox to be had now; set between two errands.
        declined: the newest call was not run for that.
    """

    def __init__(self, tools: Sequence[Tool], unsafe_python: bool, ended: Callable[[], bool]) -> None:
        self.stopped = self.python_busy = self.declined = False
        super().__init__(tools, unsafe_python=unsafe_python, interrupted=lambda: self.stopped or ended())

    def call(self, name: str, arguments: str) -> str:
        if self.interrupted is not None and self.interrupted():
            raise ToolError("interrupted")
        self.declined = self.python_busy and self._is_python(name)
        if self.declined:
            raise ToolError("not run: python is busy")
        if too_deep(arguments):
            raise ToolError(f"{name}: the arguments are nested deeper than {MAX_DEPTH}")
        try:
            return super().call(name, arguments)
        except ToolCrash as crash:
            raise _for_strangers(name, crash.__cause__ or crash) from None
        except ToolError:
            raise
        except KllmError as error:  # no sandbox to be had
            log.error("%s: %s", name, error)
            raise ToolError(f"{name}: {error.message}") from None
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            raise _for_strangers(name, error) from None

    def needs_sandbox(self, calls: list[dict[str, Any]]) -> bool:
        """Whether one of the calls does."""
        return any(self._is_python(call["function"]["name"]) for call in calls)

    def _is_python(self, name: str) -> bool:
        tool = self.tools.get(name)
        return tool is not None and tool.function is python


def too_deep(arguments: str) -> bool:
    """Whether no request may have such arguments in its messages: the next round could not be asked."""
    return nesting(arguments.encode("utf-8", "replace")) > MAX_DEPTH


def _for_strangers(name: str, error: BaseException) -> ToolError:
    """What clients are told of an error that a tool did not mean for them; the log has it whole."""
    log.error("the tool %s failed", name, exc_info=error)
    return ToolError(f"{name}: {type(error).__name__}")


class Errand:
    """One message's calls.

    Args:
        loop: runs them; only the errand's thread uses it until `results` has ended.
        box: the loop's.
        calls: the message's `tool_calls`.
        over: called on the event loop when the errand's thread has ended, however late that is.
    """

    def __init__(
        self, loop: ToolLoop, box: ServerBox, calls: list[dict[str, Any]], over: Callable[[], None]
    ) -> None:
        self._loop, self._over = asyncio.get_running_loop(), over
        self._came: asyncio.Queue[tuple[Result, str] | Exception | None] = asyncio.Queue()
        self._job = Job(self._work, (loop, box, calls), {})
        # No pool: a function that never comes back must hold up neither other calls nor the server's end.
        self._thread = threading.Thread(target=self._run, name="kllm-tool", daemon=True)

    async def results(self, stay: Stay, seconds: float) -> AsyncGenerator[tuple[Result, str], None]:
        """Each result when it is there, and its outcome: ok, error or not_run.

        Raises:
            ApiError, ClientGone: the request has ended.
            TookTooLong: not all were there after `seconds`.
        """
        end = time.monotonic() + seconds
        try:
            self._thread.start()
        except RuntimeError:  # the system has none left
            self._over()
            raise
        while True:
            item = await stay.wait(self._came.get(), max(0.0, end - time.monotonic()))
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def leave(self, then: Callable[[], None]) -> None:
        """Calls `then` in a thread once nothing runs any more, or will not end.

        The toolbox must be stopped by now.
        """

        def wait() -> None:
            if self._thread.ident is not None:
                self._thread.join(_GRACE)
                if self._thread.is_alive():
                    self._job.interrupt()
                    self._thread.join(_GRACE)
            then()

        threading.Thread(target=wait, name="kllm-tool-end", daemon=True).start()

    def _work(self, loop: ToolLoop, box: ServerBox, calls: list[dict[str, Any]]) -> None:
        def say(result: Result) -> None:
            not_run = loop.ended is not None or box.declined
            outcome = "not_run" if not_run else "error" if result.error else "ok"
            soon(self._loop, self._came.put_nowait, (result, outcome))

        loop.run(calls, say)

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            self._job.run()
        except TookTooLong:  # nobody listens any more
            pass
        except Exception as error:
            failure = error
        finally:
            soon(self._loop, self._over)
        soon(self._loop, self._came.put_nowait, failure)
