"""The two kinds of trouble kllm reports, and the exit codes that go with them.

A user's mistake (`UserError`, exit 2) and a failure of the world (`KllmError`, exit 1: disk full,
locked run, NaN loss) both print as one line: what happened, where, and what to do. Anything else
that escapes is a bug of ours and shows a traceback.
"""

from __future__ import annotations

import re

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# What drives a terminal or turns a text's direction round; tabs and newlines do not.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def harmless(text: str) -> str:
    """A text that somebody else wrote (a model, a server, a file), without what drives a terminal."""
    return _CONTROLS.sub("", text)


class KllmError(Exception):
    """A failure worth one clear line.

    Args:
        message: what happened.
        where: `file:line`, key path or directory it happened at.
        hint: what to do about it.
    """

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class UserError(KllmError):
    """Something the user gave is wrong: a flag, a recipe, a path, a data file."""

    exit_code = EXIT_USAGE


class UserErrors(UserError):
    """Several user errors found in one pass, printed one a line."""

    def __init__(self, errors: list[UserError]) -> None:
        super().__init__("\n".join(str(e) for e in errors))
        self.errors = errors


class Interrupted(KllmError):
    """A signal asked us to stop; everything up to here is saved. Exit code 128 + signal number."""

    def __init__(self, signum: int, message: str = "interrupted", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signum
