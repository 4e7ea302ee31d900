"""The output items of /v1/responses while an answer is written, and the events that tell of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from kllm.tokenizer.parts import Part

Event = dict[str, Any]  # "type" and what belongs to it, without the sequence number

_KINDS = {"reasoning": "reasoning", "content": "message"}
_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}


def new_id(prefix: str) -> str:
    """An id such as `msg_` and 24 random digits."""
    return f"{prefix}_{secrets.token_hex(12)}"


class OutputWriter:
    """Turns the parts of an answer into items and events.

    The events of a stream add up to `items`, which is what a whole answer shows.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False

    def take(self, parts: Iterable[Part]) -> Iterator[Event]:
        """The events of some parts."""
        for part in parts:
            if part.kind == "call":
                yield from self._close("completed")
                yield from self._open_call(part)
            elif part.kind == "arguments":
                self._item["arguments"] += part.text
                yield self._about("response.function_call_arguments.delta", delta=part.text)
            else:
                kind = _KINDS[part.kind]
                if not self._open or self._item["type"] != kind:
                    yield from self._close("completed")
                    yield from self._open_text(kind)
                self._content["text"] += part.text
                yield self._text_event("delta", delta=part.text)

    def finish(self, complete: bool) -> Iterator[Event]:
        """The events at the end of the answer; one without words still has a message."""
        if not self.items:
            yield from self._open_text("message")
        yield from self._close("completed" if complete else "incomplete")

    # ---- inside

    @property
    def _item(self) -> dict[str, Any]:
        return self.items[-1]

    @property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = self._item["content"][0]
        return content

    def _open_text(self, kind: str) -> Iterator[Event]:
        if kind == "message":
            item: dict[str, Any] = {"id": new_id("msg"), "type": kind, "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": new_id("rs"), "type": kind, "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        yield from self._add({**item, "status": "in_progress", "content": []})
        self._item["content"].append(part)
        yield self._about("response.content_part.added", content_index=0, part=dict(part))

    def _open_call(self, part: Part) -> Iterator[Event]:
        item = {"id": new_id("fc"), "type": "function_call", "status": "in_progress"}
        yield from self._add({**item, "call_id": part.id, "name": part.name, "arguments": ""})

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        self._open = True
        self.items.append(item)
        yield self._item_event("added")

    def _close(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self._item
        item["status"] = status
        if item["type"] == "function_call":
            name, arguments = item["name"], item["arguments"]
            yield self._about("response.function_call_arguments.done", name=name, arguments=arguments)
        else:
            yield self._text_event("done", text=self._content["text"])
            yield self._about("response.content_part.done", content_index=0, part=dict(self._content))
        yield self._item_event("done")

    def _text_event(self, what: str, **fields: Any) -> Event:
        kind = _PARTS[self._item["type"]]
        if kind == "output_text":
            fields["logprobs"] = []
        return self._about(f"response.{kind}.{what}", content_index=0, **fields)

    def _about(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self._item["id"], "output_index": len(self.items) - 1, **fields}

    def _item_event(self, what: str) -> Event:
        item = dict(self._item)
        if "content" in item:
            item["content"] = [dict(part) for part in item["content"]]
        return {
            "type": f"response.output_item.{what}",
            "output_index": len(self.items) - 1,
            "item": item,
        }
