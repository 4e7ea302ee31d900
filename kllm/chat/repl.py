"""The interactive chat: reads, answers, and obeys slash commands, until the user leaves.

Ctrl-C stops an answer (what came is kept), at an empty prompt it hints and the second one leaves with 130;
Ctrl-D leaves with 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from kllm.chat.commands import ARGUMENTS, Commands
from kllm.chat.conversation import Conversation, Item
from kllm.chat.editor import BareEditor, Editor, editor_for
from kllm.chat.interrupt import Interrupts, silent_keys
from kllm.chat.model import ChatModel
from kllm.chat.show import RichShow, Show, figures, is_fancy, show_for
from kllm.errors import EXIT_INTERRUPTED, EXIT_OK, KllmError, harmless


class Repl:
    """The loop.

    Args:
        chat: what is talked.
        editor: reads what the user says.
        show: shows answers.
        open_model: a model by its name, for /model.
        aside: where notes go.
        dim: they are printed dim.
    """

    def __init__(
        self,
        chat: Conversation,
        editor: Editor,
        show: Show,
        open_model: Callable[[str], ChatModel],
        *,
        aside: TextIO,
        dim: bool = False,
    ) -> None:
        self.chat, self._editor, self._show = chat, editor, show
        self._dim = ("\033[2m", "\033[0m") if dim else ("", "")
        self._aside = aside
        can_edit = not isinstance(editor, BareEditor)
        self.commands = Commands(chat, self._note, self._answer, open_model, can_edit=can_edit)

    def run(self) -> int:
        """Reads and answers until the user leaves; returns the exit code."""
        self._banner()
        strikes = 0
        while True:
            try:
                default, self.commands.default = self.commands.default, ""
                message = self._editor.read(default)
                strikes = 0
                if self.handle(clean_input(message).strip()):
                    return EXIT_OK
            except EOFError:
                self._say()
                return EXIT_OK
            except KeyboardInterrupt as stop:
                if stop.args and stop.args[0]:
                    continue  # Ctrl-C on a half-written line only throws the line away
                strikes += 1
                if strikes == 2:
                    return EXIT_INTERRUPTED
                self._note("Ctrl-C again or Ctrl-D leaves, /help lists the commands")
            except KllmError as e:
                self._error(str(e))
            except UnicodeDecodeError:
                self._error("the line is not UTF-8; set the terminal to UTF-8")

    def handle(self, message: str) -> bool:
        """One message or command; True to leave.

        Raises:
            KllmError: it went wrong; the chat can go on.
        """
        if not message:
            return False
        if message.startswith("/") and not message.startswith("//"):
            return self.commands.run(message)
        self.commands.attempts = 0
        question = message[1:] if message.startswith("//") else message
        self._answer(lambda stop: self.chat.ask(question, stop))
        return False

    def _answer(self, ask: Callable[[Callable[[], bool]], Iterator[Item]]) -> None:
        before = self.chat.turns[-1] if self.chat.turns else None
        self._show.begin()
        try:
            with silent_keys(), Interrupts() as interrupts:
                for item in ask(interrupts.pending):
                    self._show.item(item)
        finally:
            self._show.end()
            if isinstance(self._show, RichShow):
                self.commands.thought = self._show.thought
        turn = self.chat.turns[-1] if self.chat.turns else None
        if turn is None or turn is before:
            self._note("[cut before there was an answer; /retry asks again]")
            return
        self.commands.thought = turn.answer.get("reasoning_content") or self.commands.thought
        notes = [figures(turn.said)]
        if turn.finish_reason == "cancelled":
            notes.insert(0, "[cut]")
        if turn.finish_reason == "length":
            limit, last = self.chat.model.context, turn.said[-1]
            full = limit is not None and last.prompt_tokens + last.completion_tokens >= limit
            notes.append("cut: the context is full" if full else "cut: /set max_tokens=N allows more")
        self._note(", ".join(notes).replace("[cut], ", "[cut] "))

    def _banner(self) -> None:
        self._note(f"{self.chat.model.name}: {self.chat.model.describe()}")
        if self.chat.box is not None and self.chat.box.tools:
            self._note(f"tools: {', '.join(self.chat.box.tools)}")
        if self.chat.code:
            self._note("the model acts by writing Python, which a sandbox runs")
        self._note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")

    def _note(self, text: str) -> None:
        self._say(f"{self._dim[0]}{harmless(text)}{self._dim[1]}")

    def _say(self, line: str = "") -> None:
        self._aside.write(line + "\n")
        self._aside.flush()

    def _error(self, text: str) -> None:
        sys.stderr.write(f"error: {harmless(text)}\n")
        sys.stderr.flush()


def talk(
    chat: Conversation,
    open_model: Callable[[str], ChatModel],
    *,
    plain: bool = False,
    keep_history: bool = True,
) -> int:
    """An interactive chat on this terminal; returns the exit code."""
    editor = editor_for(ARGUMENTS, keep_history=keep_history)
    fancy = is_fancy(sys.stdout, plain)
    aside = sys.stdout if sys.stdout.isatty() else sys.stderr
    return Repl(chat, editor, show_for(plain=plain), open_model, aside=aside, dim=fancy).run()


def clean_input(text: str) -> str:
    """Bytes that were no UTF-8, which Python keeps as lone surrogates, as replacement characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
