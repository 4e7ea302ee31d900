"""The loop around tool calls: which are run, what the model is told, and when it is enough."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kllm.tools.registry import Toolbox
from kllm.tools.text import clipped
from kllm.tools.tool import ToolError

ROUNDS = 8
SECONDS = 30.0
RESULT_BYTES = 4000  # and what is said about a cut


@dataclass(frozen=True)
class Result:
    """What came of a call.

    Attributes:
        id: the call's.
        name: the tool's.
        text: for the model; an error is a text too.
        error: the call went wrong.
        seconds: how long it took.
    """

    id: str
    name: str
    text: str
    error: bool
    seconds: float

    def message(self) -> dict[str, Any]:
        """As a message of the conversation."""
        return {"role": "tool", "tool_call_id": self.id, "name": self.name, "content": self.text}


def _meant(name: str, arguments: str) -> tuple[str, str]:
    """A call as it is compared with the one before: how it is spaced and ordered makes no difference."""
    try:
        given = _unspaced(json.loads(arguments or "{}"), name == "calculator")
        return name, json.dumps(given, sort_keys=True)
    except (ValueError, RecursionError):  # no JSON, which the tool will say
        return name, arguments.strip()


def _unspaced(value: Any, sum_: bool) -> Any:
    """`value` with its texts stripped; those of a sum have their tokens one space apart."""
    match value:
        case str():
            return " ".join(re.findall(r"\*\*|//|[\w.]+|\S", value)) if sum_ else value.strip()
        case list():
            return [_unspaced(one, sum_) for one in value]
        case dict():
            return {key: _unspaced(one, sum_) for key, one in value.items()}
    return value


class ToolLoop:
    """Runs the calls of one question's answers, round by round, within limits.

    Ask the model with the tools while `ended` is None; run what it calls; once `ended` says why, ask it
    a last time without them, so that there is an answer whatever happens.

    Args:
        box: the tools.
        rounds: how often calls are run at most.
        seconds: for all of them together.
        result_bytes: of one result; more is cut in its middle.
    """

    def __init__(
        self,
        box: Toolbox,
        *,
        rounds: int = ROUNDS,
        seconds: float = SECONDS,
        result_bytes: int = RESULT_BYTES,
    ) -> None:
        self.box = box
        self.ended: str | None = None
        """Why no more calls are run; None while they are."""
        self._left, self._seconds, self._bytes = rounds, seconds, result_bytes
        self._spent = 0.0
        self._last: list[tuple[str, str]] = []

    def run(
        self, calls: Sequence[dict[str, Any]], on_result: Callable[[Result], None] = lambda result: None
    ) -> list[Result]:
        """Runs a message's `tool_calls`, in order; every one gets a result."""
        wanted = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        meant = [_meant(name, arguments) for name, arguments in wanted]
        if meant == self._last:
            self.ended = "the same call twice in a row"
        self._last = meant
        results = []
        for call, (name, arguments) in zip(calls, wanted, strict=True):
            result = self._one(call["id"], name, arguments)
            results.append(result)
            on_result(result)
        self._left -= 1
        if self.ended is None and self._left <= 0:
            self.ended = "too many rounds of calls"
        return results

    def _one(self, number: str, name: str, arguments: str) -> Result:
        if self.ended is None and self.box.interrupted is not None and self.box.interrupted():
            self.ended = "interrupted"
        if self.ended is None and self._spent >= self._seconds:
            self.ended = f"the tools took more than {self._seconds:g} s"
        if self.ended is not None:
            return Result(number, name, f"error: not run: {self.ended}", True, 0.0)
        started = time.monotonic()
        try:
            text, error = self.box.call(name, arguments), False
        except ToolError as failure:
            text, error = f"error: {failure}", True
        took = time.monotonic() - started
        self._spent += took
        return Result(number, name, clipped(text, self._bytes), error, took)
