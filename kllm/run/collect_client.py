"""A teacher behind an OpenAI-compatible address: one question at a time, patient with a busy server.

What may pass (429, 5xx, silence, a broken connection) is tried again, later and later, and not before the
time that the server names; while it asks for patience nobody else asks either. What cannot pass (a wrong
key, no such model, no money, no such host) ends the run with one line.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kllm.data.messages import Message
from kllm.errors import KllmError, UserError
from kllm.http_client import NoAnswer, Target, error_of, request
from kllm.run.collect_journal import Reply
from kllm.tokenizer.messages import wire

_LONGEST_PAUSE = 60.0  # seconds between two tries that the server did not ask for
_LONGEST_WAIT = 600.0  # and that it did: beyond, the run ends
_AGAIN = frozenset((408, 409, 425, 429))
_SPENT = ("insufficient_quota", "insufficient_user_quota", "billing_hard_limit_reached", "arrearage")
_UNFINISHED = ("error", "abort", "cancelled", "insufficient_system_resource")
_PROBE_TRIES = 3
_LONG_KEY = 8  # characters; what a server without keys is given ("EMPTY", "none") may be a word of an answer


class Refused(Exception):
    """This question got no answer; others may. `ours`: the question is at fault, not the server."""

    def __init__(self, reason: str, detail: str = "", *, ours: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.ours = reason, detail, ours


class _Trouble(Exception):
    """What may pass: `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, detail: str = "", wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.wait = reason, detail, wait


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; `extra` are further fields of the request, None leaves a field out."""

    max_tokens: int | None = 1024
    temperature: float | None = 0.7
    top_p: float | None = 0.95
    enable_thinking: bool | None = None
    extra: Mapping[str, Any] | None = None

    def fields(self) -> dict[str, Any]:
        """As fields of a chat request."""
        named = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        fields: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if self.enable_thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.enable_thinking}
        return {**fields, **(self.extra or {})}


class RemoteTeacher:
    """Asks a model at an address.

    Args:
        url: base URL, with or without its `/v1` (or another version) or `/chat/completions`.
        key: sent as a bearer token.
        key_name: where a key is given, for the hint when there is none or a wrong one.
        model: its name at the server; None takes the only one that is listed.
        retries: how often one question is asked again.
        backoff: seconds before the second try; each further pause is twice as long.
        timeout: seconds without a byte.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        key_name: str,
        model: str | None,
        sampling: Sampling,
        retries: int = 6,
        backoff: float = 1.0,
        timeout: float = 600.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._target = Target.parse(url, key, where="endpoint").versioned()
        self._key_name, self.sampling, self._say = key_name, sampling, say
        self._retries, self._backoff, self._timeout = retries, backoff, timeout
        self.model = model or ""
        self.retried = 0
        """Tries that were not the first."""
        self._answered = False
        self._not_before = 0.0

    async def __aenter__(self) -> RemoteTeacher:
        """Raises KllmError: nobody there, a wrong key, no model or several to choose from."""
        names = await self._listed()
        if not self.model:
            if len(names) != 1:
                shown = ", ".join(names[:20]) or "none"
                raise UserError(f"which of its models? it lists {shown}", where=self._target.url)
            self.model = names[0]
        return self

    async def __aexit__(self, *failure: object) -> None:
        """Every question had a connection of its own."""

    async def ask(self, messages: Sequence[Message], tools: Sequence[Any] | None, seed: int | None) -> Reply:
        """The answer to a conversation.

        Raises:
            Refused: not this time.
            KllmError: no question will be answered.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(map(wire, messages))}
        if tools:
            body["tools"] = list(tools)
        if seed is not None:
            body["seed"] = seed
        body |= self.sampling.fields()
        for attempt in range(self._retries + 1):
            await self._hold()
            try:
                reply = await self._once(body)
            except _Trouble as trouble:
                if attempt == self._retries:
                    raise Refused(trouble.reason, trouble.detail) from None
                self.retried += 1
                await self._pause(attempt, trouble)
            else:
                self._answered = True
                return reply
        raise AssertionError("the last try returns or raises")

    async def _once(self, body: dict[str, Any]) -> Reply:
        try:
            status, headers, raw = await self._request("POST", "/chat/completions", body, self._timeout)
        except NoAnswer as error:
            if error.final and not self._answered:
                raise
            raise _Trouble("no answer in time" if error.silent else "no connection", str(error)) from None
        if status == 200:
            return _reply(raw)
        self._judge(status, raw)
        raise _Trouble(f"http {status}", error_of(raw)[0], _retry_after(headers))

    async def _request(
        self, method: str, path: str, body: Any, timeout: float
    ) -> tuple[int, dict[str, str], bytes]:
        """See `request`. Some servers say the key again: what they say is shown, logged and published."""
        status, headers, raw = await request(self._target, method, path, body, timeout)
        key = self._target.key
        if key and (status != 200 or len(key) >= _LONG_KEY):
            for form in (key, json.dumps(key)[1:-1]):
                raw = raw.replace(form.encode(), b"***")
        return status, headers, raw

    def _judge(self, status: int, raw: bytes) -> None:
        """Raises for what asking again does not help."""
        message, code = error_of(raw)
        said = f": {message}" if message else ""
        hint = f"set {self._key_name}"
        where = self._target.url
        if status == 401 or (status == 403 and not self._answered):
            what = "wrong key" if self._target.key else "it wants a key"
            raise UserError(f"{what} (http {status}{said})", where=where, hint=hint)
        if status == 402 or code in _SPENT:
            raise KllmError(f"the account is spent (http {status}{said})", where=where)
        if status in (404, 405) and not self._answered:
            raise UserError(f"no such model or address (http {status}{said})", where=where)
        if 300 <= status < 400:
            raise UserError(f"it has moved (http {status})", where=where, hint="give the new address")
        if status < 500 and status not in _AGAIN:
            raise Refused(f"http {status}", message, ours=True)

    async def _hold(self) -> None:
        """Waits while the server wants no questions from anybody."""
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _pause(self, attempt: int, trouble: _Trouble) -> None:
        if trouble.wait is not None:
            if trouble.wait > _LONGEST_WAIT:
                raise KllmError(
                    f"it asks to wait {trouble.wait:,.0f} s ({trouble.reason})",
                    where=self._target.url,
                    hint="what came is kept: run the same command again later",
                )
            until = time.monotonic() + trouble.wait
            if trouble.wait > 10 and until > self._not_before + 1:
                self._say(f"the server asks for {trouble.wait:.0f} s of patience ({trouble.reason})")
            self._not_before = max(self._not_before, until)
            return
        pause = min(self._backoff * 2**attempt, _LONGEST_PAUSE)
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # so that not all come back at once

    async def _listed(self) -> list[str]:
        """The models that the server names; [] if it does not say."""
        for attempt in range(_PROBE_TRIES):
            status, _, raw = await self._request("GET", "/models", None, min(self._timeout, 60.0))
            if status < 500 and status not in _AGAIN:
                break
            await asyncio.sleep(min(self._backoff * 2**attempt, _LONGEST_PAUSE))
        if status in (401, 403):
            self._judge(401, raw)
        if status >= 500 and not self.model:
            raise KllmError(f"it is not ready (http {status}: {error_of(raw)[0]})", where=self._target.url)
        try:
            return [str(row["id"]) for row in json.loads(raw)["data"]] if status == 200 else []
        except (ValueError, LookupError, TypeError):
            return []


def _reply(raw: bytes) -> Reply:
    """Reads a chat completion.

    Raises:
        _Trouble: it is none, or says that something went wrong.
    """
    try:
        found = json.loads(raw)
        if isinstance(found, dict) and found.get("error") and not found.get("choices"):
            raise _Trouble("error instead of an answer", error_of(raw)[0])
        choice = found["choices"][0]
        message = choice["message"]
        usage = found.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        kept = {k: message[k] for k in ("reasoning_content", "reasoning", "tool_calls") if message.get(k)}
        kept["content"] = _text(message.get("content"), kept)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Trouble("malformed answer", raw[:200].decode(errors="replace")) from None
    reason = choice.get("finish_reason") or "stop"
    if reason in _UNFINISHED:
        raise _Trouble(f"unfinished answer ({reason})")
    if message.get("refusal") and not kept["content"]:
        kept["content"] = str(message["refusal"])
        reason = "content_filter"
    return Reply(kept, str(reason), tokens[0], tokens[1])


def _text(content: Any, kept: dict[str, Any]) -> str:
    """Content as text; parts that are thinking go to the reasoning."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part for part in content if isinstance(part, dict)]
    thoughts = [str(p["thinking"]) for p in parts if isinstance(p.get("thinking"), str)]
    if thoughts:
        kept.setdefault("reasoning_content", "\n".join(thoughts))
    return "".join(str(part["text"]) for part in parts if isinstance(part.get("text"), str))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, from a number or a date (RFC 9110, 10.2.3); None without."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if not math.isnan(seconds):
            return max(0.0, seconds)
    return None
