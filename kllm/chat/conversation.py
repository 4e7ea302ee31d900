"""A conversation: its turns, what the model is shown of them, and one question at a time, tools included."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kllm.chat.background import apart, in_background
from kllm.chat.model import NEVER, Called, ChatModel, ContextFull, Message, Said, Settings
from kllm.chat.tidy import alternating, settled, shorten
from kllm.engine.answer import message_of
from kllm.errors import UserError
from kllm.tokenizer.parts import Part
from kllm.tokenizer.toolcalls import TOOL_CALL
from kllm.tools import codeact
from kllm.tools.loop import ROUNDS, SECONDS, Result, ToolLoop
from kllm.tools.registry import Toolbox
from kllm.tools.sandbox import Ran
from kllm.tools.tool import Tool

GRACE = 2.0  # seconds after a limit in which what is limited should end by itself


@dataclass(frozen=True)
class Calling:
    """A tool is about to be run; so is code, whose name is "python"."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Note:
    """Something that the user should know."""

    text: str


Item = Part | Calling | Called | Said | Note


@dataclass
class Turn:
    """A question and all that came of it.

    Attributes:
        messages: the question first; answers, calls and results after it.
        said: one per answer of the model.
        interrupted: Ctrl-C came while a tool or code ran.
    """

    messages: list[Message]
    said: list[Said] = field(default_factory=list)
    called: list[Called] = field(default_factory=list)
    interrupted: bool = False

    @property
    def question(self) -> str:
        """What the user said; empty where a file begins with the model."""
        first = self.messages[0]
        return str(first["content"]) if first["role"] == "user" else ""

    @property
    def answer(self) -> Message:
        """The last message of the model, {} without one."""
        return next((m for m in reversed(self.messages) if m["role"] == "assistant"), {})

    @property
    def finish_reason(self) -> str:
        """Of the last answer; "tool_calls" if it never came to one."""
        return "cancelled" if self.interrupted or not self.said else self.said[-1].finish_reason


class Conversation:
    """Remembers turns and asks the model.

    Args:
        model: here or at an address.
        system: system prompt, or None.
        settings: how answers are drawn; may be changed between turns.
        box: tools that the model may call.
        code: the model acts by writing Python (CodeAct); the box's tools are functions in it.
        shift: when the context is full the oldest turns are forgotten, instead of an error.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        system: str | None = None,
        settings: Settings | None = None,
        box: Toolbox | None = None,
        code: bool = False,
        shift: bool = False,
    ) -> None:
        self.model, self.system, self.settings = model, system, settings or Settings()
        self.box, self.code, self.shift = box, code, shift
        self.turns: list[Turn] = []
        self.unanswered: str | None = None
        """A question that failed before there was an answer, for `retry`."""

    def close(self) -> None:
        """Ends the sandbox and lets go of the model."""
        if self.box is not None:
            self.box.close()
        self.model.close()

    # -- asking --------------------------------------------------------------------------------------

    def ask(
        self, question: str, interrupted: Callable[[], bool] = NEVER, *, attempt: int = 0
    ) -> Iterator[Item]:
        """Answers `question` and remembers both; gives everything as it comes.

        Args:
            interrupted: asked all the time; True ends the answer, what came is kept.
            attempt: how often this question was asked before; moves a fixed seed on.

        Raises:
            ContextFull, KllmError: see `ChatModel.ask`. What had come is remembered.
        """
        turn = Turn([{"role": "user", "content": question}])
        self.unanswered = question
        if self.box is not None:
            self.box.interrupted = interrupted
        work = self._code if self.code else self._tools
        try:
            yield from work(turn, interrupted, attempt)
        finally:
            if turn.said and len(turn.messages) > 1:
                turn.messages[:] = settled(turn.messages)
                self.turns.append(turn)
                self.unanswered = None

    def retry(self, interrupted: Callable[[], bool] = NEVER, *, attempt: int = 1) -> Iterator[Item]:
        """Answers the last question again, in place of its answer; see `ask`.

        Raises:
            UserError: there is none.
        """
        if self.unanswered is not None:
            yield from self.ask(self.unanswered, interrupted, attempt=attempt)
            return
        if not self.turns or not self.turns[-1].question:  # a file may begin with the model's greeting
            raise UserError("nothing to retry")
        last = self.turns.pop()
        try:
            yield from self.ask(last.question, interrupted, attempt=attempt)
        finally:
            if self.unanswered is not None:  # no answer came: the old one stays
                self.turns.append(last)
                self.unanswered = None

    def undo(self) -> str | None:
        """Forgets the last turn; its question, None if there is none."""
        if self.unanswered is not None:
            question, self.unanswered = self.unanswered, None
            return question
        return self.turns.pop().question if self.turns else None

    def clear(self) -> None:
        """Forgets everything but the system prompt; the variables of the code too."""
        self.turns.clear()
        self.unanswered = None
        if self.box is not None:
            self.box.reset()

    def offer(self, tools: Sequence[Tool]) -> None:
        """Other tools from now on; variables of Python code are gone then.

        Raises:
            UserError: the model writes code (its functions are fixed), or there is no sandbox for `python`.
        """
        if self.code:
            raise UserError(
                "the tools of a talk in code are chosen at its start", hint="--codeact --tools ..."
            )
        unsafe = self.box is not None and self.box.sandbox is not None and self.box.sandbox.unsafe
        box = Toolbox(tools, unsafe_python=unsafe) if tools else None
        if self.box is not None:
            self.box.close()
        self.box = box

    # -- what the model is shown ---------------------------------------------------------------------

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Schemas of what the model may call."""
        return self.box.schemas() if self.box is not None and self.box.tools and not self.code else None

    def messages(self, more: Sequence[Message] = (), forgotten: int = 0) -> list[Message]:
        """The whole conversation, the system prompt first, without its oldest `forgotten` turns."""
        system = self.system
        if self.code:
            tools = self.box.functions() if self.box is not None else []
            system = codeact.system_prompt(tools, self.system)
        first = [{"role": "system", "content": system}] if system else []
        turns = self.turns[forgotten:]
        return [*first, *alternating([*(m for turn in turns for m in turn.messages), *more])]

    def prompt(self) -> str:
        """The text that the model would be given for another answer."""
        return self.model.prompt(self.messages(), self.tools, self.settings)

    # -- inside --------------------------------------------------------------------------------------

    def _tools(self, turn: Turn, interrupted: Callable[[], bool], attempt: int) -> Iterator[Item]:
        """Asks until an answer calls no tool; then the loop's limits end it, the last time without calls."""
        loop = ToolLoop(self.box) if self.box is not None and self.box.tools else None
        while True:
            allowed = loop is None or loop.ended is None
            message = yield from self._fitting(turn, interrupted, attempt, calls=allowed)
            calls = message.get("tool_calls")
            if not calls or loop is None:
                if loop is None and TOOL_CALL in (message.get("content") or ""):
                    yield Note("the model called a tool and was offered none: --tools, or /tools")
                return
            if not allowed:  # a server that does not heed "none", or marks that cannot be banned
                if not message.get("content"):
                    yield Note("no answer: the model goes on calling tools")
                return
            yield from self._run(turn, loop, calls, interrupted)
            if interrupted():
                turn.interrupted = True
                return
            if loop.ended:
                yield Note(f"no more calls: {loop.ended}")

    def _run(
        self, turn: Turn, loop: ToolLoop, calls: list[dict[str, Any]], interrupted: Callable[[], bool]
    ) -> Iterator[Item]:
        """Runs a message's calls; a tool that does not end in time, or for Ctrl-C, is left to itself."""
        waiting = {call["id"]: call["function"] for call in calls}

        def work(put: Callable[[Result], None]) -> None:
            loop.run(calls, put)

        yield Calling(**calls[0]["function"])
        results: list[Result] = []
        began = time.monotonic()
        with apart():
            for result in in_background(work, interrupted, SECONDS + GRACE):
                results.append(result)
                began = time.monotonic()
                yield self._called(turn, result, waiting.pop(result.id)["arguments"])
                if waiting:
                    yield Calling(**next(iter(waiting.values())))
        spent = time.monotonic() - began
        for number, function in waiting.items():
            loop.ended = loop.ended or ("interrupted" if interrupted() else f"a tool took over {SECONDS:g} s")
            result = Result(number, function["name"], f"error: not finished: {loop.ended}", True, spent)
            spent = 0.0  # the others never began
            results.append(result)
            yield self._called(turn, result, function["arguments"])
        turn.messages += [result.message() for result in results]

    @staticmethod
    def _called(turn: Turn, result: Result, arguments: str) -> Called:
        called = Called(result.name, arguments, result.text, result.error, result.seconds)
        turn.called.append(called)
        return called

    def _code(self, turn: Turn, interrupted: Callable[[], bool], attempt: int) -> Iterator[Item]:
        """Runs the code of each answer until one has none; where it is too much, asks for a plain answer."""
        last, spent, over = None, 0.0, ""
        for round_ in range(1, ROUNDS + 2):
            message = yield from self._fitting(turn, interrupted, attempt, calls=False)
            code = codeact.code_of(message.get("content") or "")
            if code is None or over or turn.finish_reason in ("cancelled", "length"):
                return
            if code == last:
                over, output = "the same code twice in a row", "[not run again: see above]"
            else:
                yield Calling("python", code)
                ran = yield from self._ran(turn, code, interrupted)
                last, output, spent = code, ran.output, spent + ran.seconds
                if spent > SECONDS:
                    over = f"it took more than {SECONDS:g} s"
                elif round_ == ROUNDS:
                    over = f"{ROUNDS} rounds"
            turn.messages.append({"role": "user", "content": codeact.shown(output, over)})
            if interrupted():
                turn.interrupted = True
                return
            if over:
                yield Note(f"no more code: {over}")

    def _ran(self, turn: Turn, code: str, interrupted: Callable[[], bool]) -> Generator[Item, None, Ran]:
        box = self.box
        assert box is not None
        limit = box.limits.seconds + GRACE

        def work(put: Callable[[Ran], None]) -> None:
            put(box.run(code))

        with apart():
            runs = list(in_background(work, interrupted, limit))
        if not runs:  # a function that the code called does not come back
            box.reset()
            runs = [Ran("[a function did not end: variables are lost]\n", "time-out", True, limit)]
        ran = runs[0]
        called = Called("python", code, ran.output, ran.error is not None, ran.seconds, told=True)
        turn.called.append(called)
        yield called
        return ran

    def _fitting(
        self, turn: Turn, interrupted: Callable[[], bool], attempt: int, *, calls: bool
    ) -> Generator[Item, None, Message]:
        """See `_answer`; where what tools or code gave does not fit, with less of it."""
        try:
            return (yield from self._answer(turn, interrupted, attempt, calls=calls))
        except ContextFull:
            if not shorten(turn.messages):
                raise
        yield Note("what came back does not fit the context: the model is shown less of it")
        return (yield from self._answer(turn, interrupted, attempt, calls=calls))

    def _answer(
        self, turn: Turn, interrupted: Callable[[], bool], attempt: int, *, calls: bool
    ) -> Generator[Item, None, Message]:
        """One answer of the model, put into the turn; returned as a message."""
        parts: list[Part] = []
        said: Said | None = None
        try:
            for item in self._fitted(turn, interrupted, attempt, calls):
                if isinstance(item, Part):
                    parts.append(item)
                elif isinstance(item, Called):
                    turn.called.append(item)
                elif isinstance(item, Said):
                    said = item
                yield item
        finally:
            # a failure in the middle leaves what came, as Ctrl-C does
            message = message_of(parts, "reasoning_content")
            del message["refusal"]
            if said is None or said.finish_reason in ("cancelled", "length"):
                message.pop("tool_calls", None)  # nobody will answer them
                message["content"] = message["content"] or ""
            if said is None and parts:
                said = Said("cancelled", 0, len(parts), 0.0, 0.0)
            if said is not None and (parts or said.finish_reason != "cancelled"):
                turn.said.append(said)
                turn.messages.append(message)
        return message

    def _fitted(
        self, turn: Turn, interrupted: Callable[[], bool], attempt: int, calls: bool
    ) -> Iterator[Part | Called | Said | Note]:
        """Asks; where the conversation has outgrown the context, again without its oldest turns."""
        forgotten = 0
        while True:
            asked = self.model.ask(
                self.messages(turn.messages, forgotten),
                self.tools,
                self._settings(attempt),
                calls=calls,
                interrupted=interrupted,
            )
            try:
                first = next(asked)
            except ContextFull as full:
                if not self.shift and self.turns:
                    full.hint = "/clear starts afresh, --context-shift forgets the oldest turns"
                if not self.shift or forgotten == len(self.turns):
                    raise
                forgotten += 1
                continue
            if forgotten:
                del self.turns[:forgotten]
                turns = "turn" if forgotten == 1 else f"{forgotten} turns"
                yield Note(f"the context is full: the oldest {turns} forgotten")
            yield first
            yield from asked
            return

    def _settings(self, attempt: int) -> Settings:
        seed = self.settings.sampling.get("seed")
        if not attempt or seed is None:
            return self.settings
        return replace(self.settings, sampling={**self.settings.sampling, "seed": seed + attempt})
