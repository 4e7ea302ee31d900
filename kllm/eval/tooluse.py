"""Whether a model calls the right tool, rightly, and says what comes of it.

Each question is put as `kllm chat --tools` would put it; what the answer calls is run, and the model asked
again, until it answers or the loop's limits end it. All questions go round by round, side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kllm.data.builtin import generate
from kllm.errors import UserError
from kllm.eval.asking import Asker, Reply
from kllm.eval.scoring import exact, says, shown, tally
from kllm.tokenizer.toolcalls import END_TOOL_CALL, TOOL_CALL
from kllm.tools.loop import ToolLoop
from kllm.tools.registry import Toolbox, find_tools
from kllm.tools.tool import Tool, ToolError

Row = dict[str, Any]


class Trial:
    """One question on its way to its answer.

    Attributes:
        names: the tools called so far, one for each call.
        fault: what is wrong with the form, "" if nothing is.
        result: what the last call gave.
        answer: what the model said in the end.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.messages: list[dict[str, Any]] = list(row["messages"])
        self.box = Toolbox([_at_rest(tool, row["results"]) for tool in find_tools(row["tools"])])
        self.schemas = self.box.schemas()
        self.loop = ToolLoop(self.box)
        self.names: list[str] = []
        self.shown: list[str] = []
        self.fault = self.result = self.answer = ""

    def prompt(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]:
        """What to ask next: the conversation, the tools, and whether the loop lets them be called."""
        return self.messages, self.schemas or None, self.loop.ended is None

    def hear(self, reply: Reply) -> bool:
        """Takes an answer in and runs its calls; whether the model is to be asked again."""
        message = reply.message
        calls = message.get("tool_calls") or []
        content = message["content"] or ""
        if TOOL_CALL in content or END_TOOL_CALL in content:
            self.fault = self.fault or "broken call"
        if not reply.ended:
            self.fault = self.fault or "cut before its end"
        if not calls or not reply.ended or self.loop.ended is not None:
            self.answer = content
            self.box.close()
            return False
        self.fault = self.fault or next(filter(None, map(self._wrong, calls)), "")
        results = self.loop.run(calls)
        self.names += [result.name for result in results]
        self.result = results[-1].text.strip()
        for call, result in zip(calls, results, strict=True):
            self.shown.append(f"[{result.name} {call['function']['arguments']}: {result.text.strip()}]")
        self.messages += [message, *(result.message() for result in results)]
        return True

    def _wrong(self, call: dict[str, Any]) -> str:
        tool = self.box.tools.get(call["function"]["name"])
        if tool is None:
            return "no such tool"
        try:
            tool.checked(call["function"]["arguments"])
        except ToolError:
            return "wrong arguments"
        return ""

    @property
    def called(self) -> bool:
        """The right tool was called, or none where none is right."""
        wanted = self.row["tool"]
        return wanted in self.names if wanted else not self.names

    @property
    def right(self) -> bool:
        """What a tool gives has to be the end of the answer; an answer without one is the whole of it."""
        expected = self.row["answer"]
        if self.row["tool"] and self.row["category"] != "error":
            return says(self.answer, expected)
        return exact(self.answer, expected)


def run_tools(asker: Asker, *, limit: int | None = None) -> dict[str, Any]:
    """Greedy answers to the held-out questions of `builtin:tools`, with the tools at hand.

    Returns:
        `accuracy`, `correct`, `total`, `by_language`, `by_category` of right answers; `calls`, the same of
        answers that called the right tool, or none where none is; `by_tool`, the share of right answers by
        the tool that is right; `well_formed`, the share without a fault among those that tried to call;
        `results`, the share of right results among the questions whose tool gives the answer; `faults`
        {what is wrong: count}; `samples`.

    Raises:
        UserError: nothing to ask, no chat template, or Python cannot be locked in on this system.
    """
    rows = list(generate("eval", subject="tools"))[:limit]
    if not rows:
        raise UserError("there is nothing to ask", where="limit", hint="limit must be at least 1")
    trials: list[Trial] = []
    for at in range(0, len(rows), asker.batch_size):  # each has a sandbox of its own: not all at once
        trials += _wave(asker, rows[at : at + asker.batch_size])
    return _result(trials)


def _wave(asker: Asker, rows: Sequence[Row]) -> list[Trial]:
    """The trials of some rows, side by side to their ends."""
    trials = [Trial(row) for row in rows]
    going = trials
    try:
        while going:
            replies = asker.replies([trial.prompt() for trial in going])
            going = [t for t, reply in zip(going, replies, strict=True) if t.hear(reply)]
    finally:
        for trial in trials:
            trial.box.close()
    return trials


def _at_rest(tool: Tool, results: dict[str, str]) -> Tool:
    """The tool, or one that always says the same, so that an answer by the clock can be known."""
    if tool.name not in results:
        return tool
    return replace(tool, function=lambda **given: results[tool.name])


def _result(trials: Sequence[Trial]) -> dict[str, Any]:
    tried = [t for t in trials if t.names or t.fault]
    known = [t for t in trials if t.row["tool"] in ("calculator", "python") and t.row["category"] != "error"]
    tools = dict.fromkeys(t.row["tool"] for t in trials)
    by_tool = {tool or "none": _share(lambda t: t.right, _of(trials, tool)) for tool in tools}
    return {
        **_tally(trials, lambda t: t.right),
        "measure": "right answers",
        "calls": {**_tally(trials, lambda t: t.called), "measure": "the right tool called, or none"},
        "by_tool": by_tool,
        "well_formed": _share(lambda t: not t.fault, tried),
        "results": _share(lambda t: t.result == t.row["answer"], known),
        "faults": dict(Counter(t.fault for t in trials if t.fault)),
        "samples": [_sample(trials[i]) for i in shown([t.right for t in trials])],
    }


def _of(trials: Sequence[Trial], tool: str) -> list[Trial]:
    return [t for t in trials if t.row["tool"] == tool]


def _share(mark: Callable[[Trial], bool], trials: Sequence[Trial]) -> float | None:
    """None if there is nothing to take a share of."""
    return sum(map(mark, trials)) / len(trials) if trials else None


def _tally(trials: Sequence[Trial], mark: Callable[[Trial], bool]) -> dict[str, Any]:
    return tally([(t.row["lang"], t.row["category"], mark(t)) for t in trials])


def _sample(trial: Trial) -> dict[str, Any]:
    return {
        "lang": trial.row["lang"],
        "category": trial.row["category"],
        "question": trial.row["question"],
        "answer": " ".join([*trial.shown, trial.answer]),
        "expected": trial.row["answer"],
        "correct": trial.right,
        "fault": trial.fault,
    }
