"""`kllm chat`: a conversation in the terminal, or one answer for a script.

In a terminal Ctrl-C stops an answer (what came is kept), at an empty prompt it hints and the second one
leaves with 130; Ctrl-D leaves with 0. With `--prompt` or text on stdin one answer goes to stdout, plain.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

from kllm.chat.interrupt import Interrupts
from kllm.chat.session import Answer, Session, chat_once, open_session
from kllm.engine import SamplingParams
from kllm.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, KllmError, UserError

__all__ = ["Repl", "chat_once", "run_chat"]

_HELP = """\
/help            this list
/system [TEXT]   show or set the system prompt (/system - removes it)
/set [K=V]       show or set a sampling option, e.g. /set temperature=0.2
/retry           answer the last question again
/undo            forget the last question and its answer
/clear           forget the whole conversation
/stats           tokens, context and speed
/quit            leave (Ctrl-D too)
//text           say "/text" to the model
Ctrl-C stops an answer and keeps what came."""


def run_chat(
    model_path: str,
    *,
    adapter: str | None = None,
    prompt: str | None,
    system: str | None,
    sampling: SamplingParams,
    device: str,
    json_output: bool,
) -> int:
    """Talks, or answers once if there is a prompt or stdin is not a terminal. Returns the exit code.

    Args:
        model_path: a run, stage, checkpoint or Hugging Face directory, or a hub id.
        adapter: a LoRA on it: a PEFT folder, a LoRA run or stage, a MiniMind .pth or a hub id.
        prompt: one question; text piped in is put after it.
        system: system prompt.
        sampling: how answers are drawn.
        device: auto, cpu, cuda, ...
        json_output: print one object {text, finish_reason, usage, timings}; needs a question.

    Raises:
        UserError: no model, nothing to answer, a question longer than the context.
    """
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if json_output and prompt is None and interactive:
        raise UserError("needs a question", where="--json", hint="give --prompt, or text on stdin")

    def opened() -> Session:
        return open_session(model_path, adapter=adapter, system=system, sampling=sampling, device=device)

    if prompt is None and interactive:
        return Repl(opened(), model_path if adapter is None else f"{model_path} + {adapter}").run()
    question = _question(prompt, "" if interactive else _read_stdin())
    session = opened()
    try:
        return _one_shot(session, question, json_output)
    except BrokenPipeError:  # the reader of our pipe has left; nothing to tell anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _question(prompt: str | None, piped: str) -> str:
    question = "\n\n".join(part for part in (prompt, piped.strip()) if part and part.strip())
    if not question:
        raise UserError("nothing to answer: the prompt is empty", where="prompt")
    return _clean_input(question)


def _read_stdin() -> str:
    """All of stdin, with a word to the user when it stays open and silent (ssh, job runners)."""
    if sys.stdin is None or sys.stdin.closed:
        return ""
    try:
        ready, _, _ = select.select([sys.stdin], [], [], 2.0)
        if not ready:
            _say("waiting for text on stdin (</dev/null if there is none)", sys.stderr)
    except (OSError, ValueError):  # not a real file, or a system that cannot wait on pipes
        pass
    return sys.stdin.buffer.read().decode("utf-8-sig", "replace")


def _clean_input(text: str) -> str:
    """Bytes that were no UTF-8, which Python keeps as lone surrogates, as replacement characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _one_shot(session: Session, question: str, json_output: bool) -> int:
    write = None if json_output else _write
    with Interrupts() as interrupts:
        answer = session.ask(question, write, interrupts.pending)
    if json_output:
        _say(json.dumps(answer.to_json(), ensure_ascii=False))
    elif not answer.text.endswith("\n"):
        _say()
    if answer.finish_reason == "cancelled":
        return EXIT_INTERRUPTED
    if answer.finish_reason == "length" and not json_output:
        _say(f"note: cut after {answer.completion_tokens} tokens", sys.stderr)
    return EXIT_OK


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str = "", stream: TextIO | None = None) -> None:
    stream = stream or sys.stdout
    stream.write(line + "\n")
    stream.flush()


class Repl:
    """The interactive loop. Commands are the methods named `do_...`; each returns True to leave."""

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name = session, name
        self.attempts = 0
        plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self._dim = ("", "") if plain else ("\033[2m", "\033[0m")

    def run(self) -> int:
        """Reads and answers until the user leaves; returns the exit code."""
        typed = _line_editor()
        self._banner()
        strikes = 0
        while True:
            try:
                line = input(">>> ")
                strikes = 0
                if self.handle(_clean_input(line).strip()):
                    return EXIT_OK
            except EOFError:
                _say()
                return EXIT_OK
            except KeyboardInterrupt:
                _say()
                if typed():
                    continue  # Ctrl-C on a half-written line only throws the line away
                strikes += 1
                if strikes == 2:
                    return EXIT_INTERRUPTED
                self._note("Ctrl-C again or Ctrl-D leaves, /help lists the commands")
            except KllmError as e:
                self._error(str(e))
            except UnicodeDecodeError:
                self._error("the line is not UTF-8; set the terminal to UTF-8")

    def handle(self, line: str) -> bool:
        """One line of input; True to leave."""
        if not line:
            return False
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            command = getattr(self, f"do_{name}", None) if name.isalpha() else None
            if command is None:
                self._error(f"unknown command /{name} (/help lists them; //{name} says it to the model)")
                return False
            return bool(command(rest.strip()))
        self.attempts = 0
        self._answer(lambda stop: self.session.ask(line.removeprefix("/"), self._show, stop))
        return False

    def _answer(self, ask: Callable[[Callable[[], bool]], Answer]) -> None:
        with Interrupts() as interrupts:
            answer = ask(interrupts.pending)
        _say(" [cut]" if answer.finish_reason == "cancelled" else "")
        if answer.forgotten:
            turns = "turn" if answer.forgotten == 1 else f"{answer.forgotten} turns"
            self._note(f"the context is full: the oldest {turns} forgotten (/clear starts afresh)")
        speed = answer.tokens_per_second
        notes = [f"{answer.completion_tokens} tokens"] + ([f"{speed:.0f} tokens/s"] if speed else [])
        if answer.finish_reason == "length":
            full = answer.prompt_tokens + answer.completion_tokens >= self.session.engine.max_context
            notes.append("cut: the context is full" if full else "cut: /set max_tokens=N allows more")
        self._note(", ".join(notes))

    # -- commands ------------------------------------------------------------------------------------

    def do_help(self, rest: str) -> None:
        """Lists the commands."""
        _say(_HELP)

    def do_quit(self, rest: str) -> bool:
        """Leaves."""
        return True

    do_exit = do_bye = do_quit

    def do_clear(self, rest: str) -> None:
        """Forgets the conversation."""
        self.session.turns.clear()
        self._note("forgot everything")

    def do_system(self, rest: str) -> None:
        """Shows, sets or (with -) removes the system prompt."""
        if rest:
            self.session.system = None if rest == "-" else rest
        self._note(f"system prompt: {self.session.system or 'none'}")

    def do_set(self, rest: str) -> None:
        """Shows or sets a sampling option."""
        if rest:
            key, _, value = rest.replace("=", " ", 1).partition(" ")
            self.session.sampling = set_option(self.session.sampling, key.strip(), value.strip())
        shown = (f"{name}={getattr(self.session.sampling, name)}" for name in _OPTIONS)
        self._note("  ".join(shown))

    def do_undo(self, rest: str) -> None:
        """Forgets the last turn."""
        turn = self.session.undo()
        if turn is None:
            self._error("nothing to undo")
        else:
            self.attempts = 0
            self._note(f"forgot: {_short(turn.question)}")

    def do_retry(self, rest: str) -> None:
        """Answers the last question again."""
        if not self.session.turns:
            self._error("nothing to retry")
            return
        self.attempts += 1
        self._answer(lambda stop: self.session.retry(self._show, stop, attempt=self.attempts))

    def do_stats(self, rest: str) -> None:
        """Tokens, context and speed."""
        turns = self.session.turns
        count = f"{len(turns)} turn" + ("" if len(turns) == 1 else "s")
        if not turns:
            self._note(f"{count}, context {self.session.engine.max_context} tokens")
            return
        last = turns[-1].answer
        used = last.prompt_tokens + last.completion_tokens
        speed = last.tokens_per_second
        self._note(
            f"{count}, {used} of {self.session.engine.max_context} tokens of context; last answer: "
            f"{last.completion_tokens} tokens, first after {last.prefill_s:.2f} s"
            + (f", {speed:.0f} tokens/s" if speed else "")
        )

    # -- output --------------------------------------------------------------------------------------

    def _banner(self) -> None:
        size = self.session.engine.parameters / 1e6
        self._note(f"{self.name}: {size:.1f}M parameters, context {self.session.engine.max_context}")
        if self.session.encoder is None:
            self._note("no chat template: the model continues your text")
        self._note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")

    def _show(self, text: str) -> None:
        """Text of the model, without control characters that would drive the terminal."""
        _write("".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f")))

    def _note(self, text: str) -> None:
        _say(f"{self._dim[0]}{text}{self._dim[1]}")

    def _error(self, text: str) -> None:
        _say(f"error: {text}", sys.stderr)


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": lambda text: None if text.lower() in ("none", "-", "") else int(text),
}


def set_option(sampling: SamplingParams, key: str, value: str) -> SamplingParams:
    """`sampling` with one field changed from its text.

    Raises:
        UserError: unknown field, not a number, or out of range.
    """
    if key not in _OPTIONS:
        raise UserError("unknown option", where=key, hint=f"known: {', '.join(_OPTIONS)}")
    try:
        parsed = _OPTIONS[key](value)
    except ValueError:
        raise UserError(f"must be a number, not {value!r}", where=key) from None
    return replace(sampling, **{key: parsed})


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _line_editor() -> Callable[[], str]:
    """Switches on line editing and the session's history where the system has readline.

    Returns:
        What stands on the line being edited.
    """
    try:
        import readline
    except ImportError:
        return str
    readline.set_auto_history(True)
    return readline.get_line_buffer
