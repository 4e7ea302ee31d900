"""The line editor: several lines, history, completion, an outside editor; a bare one without a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'


class Editor(Protocol):
    """Reads what the user says."""

    def read(self, default: str = "") -> str:
        """The next message, which may have several lines.

        Args:
            default: stands on the line to begin with.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C; its argument is what stood on the line.
        """
        ...


def history_path() -> Path:
    """Where what was typed is kept: `$XDG_STATE_HOME/kllm/chat_history`."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "kllm" / "chat_history"


def is_open(text: str) -> bool:
    """Whether Enter goes on to another line: an open triple quote, or a backslash at the end."""
    return text.count(QUOTES) % 2 == 1 or text.endswith("\\")


def unquoted(text: str) -> str:
    """What was meant: without the triple quotes around it."""
    bare = text.strip()
    if len(bare) >= 2 * len(QUOTES) and bare.startswith(QUOTES) and bare.endswith(QUOTES):
        return bare[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class BareEditor:
    """Lines from stdin; the prompt goes to stderr where stdout is no terminal."""

    def read(self, default: str = "") -> str:
        """See `Editor`."""
        text = self._line(PROMPT)
        while is_open(text):
            text = text.removesuffix("\\") + "\n" + self._line(MORE)
        return unquoted(text)

    def _line(self, prompt: str) -> str:
        stream = sys.stdout if sys.stdout.isatty() else sys.stderr
        stream.write(prompt)
        stream.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class TerminalEditor:
    """prompt_toolkit's editor: widths of Chinese characters, pasting, undo, search in the history.

    Args:
        commands: name -> what its argument is: "file", words to choose from, or "" for anything.
        keep_history: whether what is typed is kept for the next time.
    """

    def __init__(self, commands: Mapping[str, str | list[str]], *, keep_history: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import ThreadedCompleter

        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation=MORE,
            history=_history(keep_history),
            completer=ThreadedCompleter(_completer(commands)),
            complete_while_typing=False,
            key_bindings=_keys(),
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
        )

    def read(self, default: str = "") -> str:
        """See `Editor`."""
        try:
            return unquoted(self._session.prompt(PROMPT, default=default))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._session.default_buffer.text) from None


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def accept(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # Enter takes the completion, it does not send it
        elif is_open(text := buffer.document.text_before_cursor):
            if text.endswith("\\"):
                buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-g")
    def outside(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


def _history(keep: bool) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if not keep:
        return InMemoryHistory()
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)  # what people ask is nobody else's business
    except OSError:
        return InMemoryHistory()  # a home that cannot be written is no reason not to talk
    return FileHistory(path)


def _completer(commands: Mapping[str, str | list[str]]) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter

    files = PathCompleter(expanduser=True)

    class Slash(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/") or "\n" in text:
                return
            name, space, rest = text[1:].partition(" ")
            if not space:
                yield from (Completion(one, -len(name)) for one in commands if one.startswith(name))
                return
            kind = commands.get(name, "")
            if kind == "file":
                from prompt_toolkit.document import Document as Doc

                yield from files.get_completions(Doc(rest), event)
            else:
                words = kind if isinstance(kind, list) else []
                yield from (Completion(one, -len(rest)) for one in words if one.startswith(rest))

    return Slash()


def editor_for(commands: Mapping[str, str | list[str]], *, keep_history: bool) -> Editor:
    """The best one that the terminal allows."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") == "dumb":
        return BareEditor()
    return TerminalEditor(commands, keep_history=keep_history)
