"""Tool calls read out of an answer's text while it comes.

The form is the one that Qwen, Hermes and MiniMind write:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Where a grammar guarantees it, arguments are
passed on piece by piece; otherwise a call is held until it is whole, because one that turns out to be
no call is given back as text, and nothing that was sent can be taken back.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable

from kllm.tokenizer.parts import Mark, Part

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
_BETWEEN = "\n\n"  # two texts with a call between them
_LONE = re.compile("[\ud800-\udfff]")  # half a character, which a model may spell in an escape
_ALPHABET = string.ascii_letters + string.digits
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_SIGNIFICANT = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'\\.|"', re.DOTALL)


def new_call_id() -> str:
    """`call_` and 24 random letters and digits."""
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def read_call(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of what stands between the marks, None if it is no call."""
    try:
        call = json.loads(text)
        if not isinstance(call, dict):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        name = call.get("name")
        if not (isinstance(name, str) and name and isinstance(arguments, (dict, type(None)))):
            return None
        written = json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)
        return _LONE.sub("\ufffd", name), _LONE.sub("\ufffd", written)
    except (ValueError, RecursionError):
        return None


class ToolCallParser:
    """Cuts an answer's content, given as text and marks, into text and tool calls.

    White space around a call belongs to neither; text after a call is set off from the text before it.
    However the content is cut, the parts add up the same.

    Args:
        guaranteed: a grammar makes the calls, so their arguments may go out as they come.
        single: at most one call; what follows it is dropped.
        new_id: makes the calls' ids.
    """

    def __init__(
        self, *, guaranteed: bool = False, single: bool = False, new_id: Callable[[], str] = new_call_id
    ) -> None:
        self._guaranteed, self._single, self._new_id = guaranteed, single, new_id
        self._state = "text"
        self._held = ""  # white space that may stand before a call, or the text of a call
        self._gap = ""  # white space before the call, for the case that it is none
        self._json = _JsonEnd()
        self._after_call = self._said = False
        self.calls = 0
        """How many calls came out."""

    def feed(self, item: str | Mark) -> list[Part]:
        """The parts that `item` completes."""
        if self._state in ("over", "tail"):
            if self._state == "tail" and isinstance(item, Mark) and item.text == END_TOOL_CALL:
                self._close()
            return []
        if isinstance(item, Mark):
            if self._state == "text" and item.text == TOOL_CALL:
                self._state, self._gap, self._held = "call", self._held, ""
                return []
            if self._state == "call" and item.text == END_TOOL_CALL:
                return self._end(item.text)
            item = item.text
        if self._state == "text":
            return self._text(item)
        return self._call(item) if self._state == "call" else self._arguments(item)

    def finish(self) -> list[Part]:
        """What is held back, once no more text comes. A call cut in its arguments stays one."""
        if self._state == "call":
            return self._end("")
        held, self._held = self._held, ""
        return [Part("content", held)] if held and self._state == "text" and not self._after_call else []

    def _text(self, text: str) -> list[Part]:
        if self._after_call:
            text = text.lstrip()
        text = self._held + text
        safe = text.rstrip()
        self._held = text[len(safe) :]
        return [self._say(safe)] if safe else []

    def _say(self, text: str) -> Part:
        """Text is content; "thinking <call> after" must not become "thinkingafter"."""
        between = _BETWEEN if self._after_call and self._said else ""
        self._after_call, self._said = False, True
        return Part("content", between + text)

    def _call(self, text: str) -> list[Part]:
        self._held += text
        head = _HEAD.match(self._held) if self._guaranteed else None
        if head is None:
            return []
        rest, self._held = self._held[head.end() :], ""
        self._state, self._json = "arguments", _JsonEnd()
        return [self._begin(json.loads(head[1])), *self._arguments(rest)]

    def _arguments(self, text: str) -> list[Part]:
        end = self._json.find(text)
        if end is not None:
            self._state = "tail"
        piece = text[:end]
        return [Part("arguments", piece, self.calls - 1)] if piece else []

    def _end(self, mark: str) -> list[Part]:
        """A call that is whole: given out, or as the text that it was."""
        inner, self._held = self._held, ""
        call = read_call(inner)
        if call is None:
            self._state = "text"
            return [self._say(self._gap + TOOL_CALL + inner + mark)]
        self._close()
        return [self._begin(call[0]), Part("arguments", call[1], self.calls - 1)]

    def _close(self) -> None:
        self._state, self._held, self._after_call = "over" if self._single else "text", "", True

    def _begin(self, name: str) -> Part:
        self.calls += 1
        return Part("call", index=self.calls - 1, id=self._new_id(), name=name)


class _JsonEnd:
    """Finds where a JSON object that comes in pieces ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """The offset in this piece just behind the object, None while it goes on."""
        at = 1 if self._escaped and text else 0
        self._escaped = self._escaped and not text
        while True:
            match = (_STRING_END if self._in_string else _SIGNIFICANT).search(text, at)
            if match is None:
                # A last backslash that is not part of a whole escape escapes what comes next.
                self._escaped = self._escaped or (self._in_string and text.endswith("\\") and at < len(text))
                return None
            at, found = match.end(), match[0]
            if found == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if found in "{[" else -1
                if self._depth == 0:
                    return at
