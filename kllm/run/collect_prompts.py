"""Prompts for a teacher, from any data that holds some: questions, conversations, pairs, lines of text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kllm.data.formats import (
    ChatRecord,
    PreferenceRecord,
    PromptRecord,
    RatedRecord,
    TextRecord,
    detect,
    normalise,
)
from kllm.data.messages import BadRow, Message
from kllm.data.readers import TextChunk, file_kind, read_lines
from kllm.data.sources import expand, iter_records
from kllm.errors import UserError

_BAD_KEPT = 20


@dataclass(frozen=True)
class Prompt:
    """A question to a teacher: messages that end before the answer, tools, and a known answer or None.

    `id` is a hash of what is asked (messages and tools, not the known answer).
    """

    where: str
    messages: list[Message]
    tools: list[Any] | None
    answer: Any
    id: str

    @property
    def question(self) -> str:
        """The last words of the user."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass
class PromptList:
    """The prompts of some sources in order, each once.

    Iterating reads the sources; what was counted then is of the last whole pass.

    Args:
        sources: whatever `kllm.data.sources` reads. A plain text file has a prompt on each line.
        limit: at most so many prompts.
        max_bad_rows: rows that cannot be used and are tolerated.
    """

    sources: Sequence[str]
    limit: int | None = None
    max_bad_rows: int = 0
    repeated: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    bad_count: int = 0

    def __iter__(self) -> Iterator[Prompt]:
        """Raises UserError: a source that is missing, or more bad rows than allowed."""
        self.repeated, self.bad, self.bad_count = 0, [], 0
        seen: set[str] = set()
        for source in self.sources:
            for where, value in self._rows(source):
                if self.limit is not None and len(seen) >= self.limit:
                    return
                try:
                    prompt = read_prompt(value, where)
                except BadRow as error:
                    self._refuse(where, str(error))
                    continue
                if prompt.id in seen:
                    self.repeated += 1
                    continue
                seen.add(prompt.id)
                yield prompt

    def _rows(self, source: str) -> Iterator[tuple[str, Any]]:
        files = expand(source)
        if not any((file_kind(file) or ("",))[0] == "text" for file in files):
            yield from iter_records(source, on_bad=self._refuse)
            return
        for file in files:
            if (file_kind(file) or ("",))[0] != "text":
                yield from iter_records(file, on_bad=self._refuse)
                continue
            for number, line in read_lines(file):
                try:
                    text = line.decode("utf-8").strip()
                except UnicodeDecodeError:
                    self._refuse(f"{file}:{number}", "not UTF-8")
                    continue
                if text:
                    yield f"{file}:{number}", text

    def _refuse(self, where: str, reason: str) -> None:
        self.bad_count += 1
        if len(self.bad) < _BAD_KEPT:
            self.bad.append((where, reason))
        if self.bad_count > self.max_bad_rows:
            first = self.bad[0]
            raise UserError(first[1], first[0], f"{self.max_bad_rows} bad rows are allowed here")


def read_prompt(value: Any, where: str = "") -> Prompt:
    """One record of any dialect as a prompt; the last answer of a conversation is left out.

    Raises:
        BadRow: there is nothing to ask.
    """
    messages, tools, answer = _asked(value)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not any(message["role"] == "user" for message in messages):
        raise BadRow("there is no question in it")
    said = json.dumps([messages, tools], ensure_ascii=False, sort_keys=True, default=str)
    try:
        digest = hashlib.blake2b(said.encode("utf-8"), digest_size=12).hexdigest()
    except UnicodeEncodeError:
        raise BadRow("half of a surrogate pair in the text") from None
    return Prompt(where, messages, tools, answer, digest)


def _asked(value: Any) -> tuple[list[Message], list[Any] | None, Any]:
    """(messages, tools, known answer) of a record."""
    if isinstance(value, (str, TextChunk)):
        text = value if isinstance(value, str) else value.text
        if not text.strip():
            raise BadRow("the text is empty")
        return [{"role": "user", "content": text.strip()}], None, None
    dialect = detect(value)
    if dialect in ("qa", "prompt", "agent", "openai", "minimind", "sharegpt"):
        record = normalise(value, "prompt", dialect)
    else:
        wanted = {"preference": "preference", "kto": "rated", "text": "text"}.get(dialect, "chat")
        record = normalise(value, wanted, dialect)  # type: ignore[arg-type]
    if isinstance(record, PromptRecord):
        return record.messages, record.tools, record.answer
    if isinstance(record, ChatRecord):
        return record.messages, record.tools, None
    if isinstance(record, PreferenceRecord | RatedRecord):
        return record.prompt, record.tools, None
    assert isinstance(record, TextRecord)
    return [{"role": "user", "content": record.text.strip()}], None, None
