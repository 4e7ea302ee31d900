"""Every text of a record, whatever its dialect: what a tokenizer learns from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from kllm.data.formats import (
    KIND,
    ChatRecord,
    PreferenceRecord,
    PromptRecord,
    RatedRecord,
    TextRecord,
    detect,
    normalise,
)
from kllm.data.messages import BadRow, Message


def all_texts(obj: Any) -> Iterator[str]:
    """The texts of one raw record; a row that cannot be read gives none (training will report it)."""
    with contextlib.suppress(BadRow):
        record = normalise(obj, KIND[detect(obj)])
        if isinstance(record, TextRecord):
            yield record.text
        elif isinstance(record, ChatRecord | PromptRecord):
            yield from _messages(record.messages)
        elif isinstance(record, PreferenceRecord):
            yield from _messages([*record.prompt, *record.chosen, *record.rejected])
        elif isinstance(record, RatedRecord):
            yield from _messages([*record.prompt, *record.completion])


def _messages(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        for key in ("reasoning_content", "content"):
            if isinstance(message.get(key), str) and message[key]:
                yield message[key]
        for call in message.get("tool_calls") or []:
            yield json.dumps(call.get("function", call), ensure_ascii=False)
