"""A model in this process: the one engine, the one conversation encoder, the one reading of answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kllm.chat.model import NEVER, Called, ContextFull, Message, Said, Settings
from kllm.engine import Engine, SamplingParams
from kllm.engine.answer import Answer, Reading, no_calls
from kllm.errors import UserError
from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.parts import Part
from kllm.tokenizer.thinking import starts_thinking
from kllm.tokenizer.tokenizer import Tokenizer


class LocalModel:
    """An engine with one conversation at a time.

    Args:
        engine: generates.
        tokenizer: the model's.
        name: as the user called it.
        raw: no chat turns: the model goes on with the bare text.
        base: parameters that settings change: defaults and the adapter.

    Raises:
        UserError: the tokenizer has no chat template, or a broken one.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        raw: bool = False,
        base: SamplingParams | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.context: int | None = engine.max_context
        self.names: tuple[str, ...] = ()
        self._base = base or SamplingParams()
        self.encoder = None if raw else _encoder(tokenizer, name)

    def describe(self) -> str:
        """Size and context."""
        size = f"{self.engine.parameters / 1e6:.1f}M parameters, context {self.engine.max_context:,}"
        return size if self.encoder else f"{size}; no turns: the model goes on with your text"

    def close(self) -> None:
        """Nothing is held."""

    def ask(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        settings: Settings,
        *,
        calls: bool = True,
        interrupted: Callable[[], bool] = NEVER,
    ) -> Iterator[Part | Called | Said]:
        """See `ChatModel.ask`."""
        ids = self._ids(messages, tools, settings)
        reading = Reading(
            self.tokenizer,
            thinking=self.encoder is not None and starts_thinking(self.tokenizer, ids),
            split=self.encoder is not None,
            parsed=bool(tools),
            stop_ids=frozenset(self.tokenizer.stop_token_ids),
            prompt=ids,
        )
        params = self._params(settings, reading, banned=bool(tools) and not calls)
        alone = sum(m["role"] == "user" for m in messages) < 2 and messages[-1]["role"] == "user"
        self._check_room(ids, params, alone=alone)
        answer = Answer(reading)
        reason = "length"
        started = first = last = time.perf_counter()
        events = self.engine.stream(ids, params)
        try:
            for event in events:
                last = time.perf_counter()
                first = first if answer.tokens else last
                yield from answer.take(event)
                if event.finish_reason is not None:
                    reason = answer.finish_reason or reason
                elif interrupted():
                    self.engine.cancel(event.request_id)
        finally:
            if hasattr(events, "close"):
                events.close()
        yield Said(reason, len(ids), answer.tokens, first - started, last - first, answer.cached_tokens)

    def shows(self, tools: list[dict[str, Any]]) -> bool:
        """See `ChatModel.shows`."""
        return self.encoder is None or self.encoder.shows(tools)

    def prompt(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, settings: Settings
    ) -> str:
        """See `ChatModel.prompt`."""
        return self.tokenizer.decode(self._ids(messages, tools, settings), skip_special_tokens=False)

    def _ids(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, settings: Settings
    ) -> list[int]:
        if self.encoder is None:
            # Nobody taught this model turns: it continues the text so far.
            text = "".join(message.get("content") or "" for message in messages)
            return [*self.tokenizer.encode_raw("", add_special_tokens=True), *self.tokenizer.encode(text)]
        given = {} if settings.thinking is None else {"enable_thinking": settings.thinking}
        if settings.thinking is not None:
            given["open_thinking"] = settings.thinking  # MiniMind's name for it
        return self.encoder.prompt(messages, tools, **given)

    def _params(self, settings: Settings, reading: Reading, *, banned: bool) -> SamplingParams:
        bias = no_calls(self.tokenizer) if banned else ()
        shown = reading.shown() if reading.split else ()
        return replace(self._base, **settings.sampling, shown_special_ids=shown, logit_bias=bias)

    def _check_room(self, ids: list[int], params: SamplingParams, *, alone: bool) -> None:
        """A fair answer must fit; a question that is alone is answered with what is left."""
        context = self.engine.max_context
        room = 1 if alone else min(params.max_tokens, context // 4)
        if len(ids) + room <= context:
            return
        what = "the message takes" if alone else "the conversation takes"
        message = f"{what} {len(ids):,} tokens, the model's context is {context:,}"
        raise ContextFull(message, where="prompt", hint="shorten it" if alone else None)


def _encoder(tokenizer: Tokenizer, name: str) -> ChatEncoder:
    try:
        return ChatEncoder(tokenizer)
    except UserError as error:
        if tokenizer.chat_template is not None:
            raise UserError(error.message, where=f"{name}, chat template", hint=error.hint) from None
        hint = "--raw lets it go on with your text"
        raise UserError("the model has no chat template", where=name, hint=hint) from None


def load_local(
    path: str,
    *,
    adapter: str | None = None,
    device: str = "auto",
    raw: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> LocalModel:
    """Loads a model (whatever `kllm.export.load` reads) for a talk, with the sampling that it recommends.

    Args:
        adapter: a LoRA to answer with, whatever `resolve_adapter` takes.

    Raises:
        UserError: no model there, or one without a tokenizer; no adapter there, or another model's.
    """
    from kllm.export.load import generation_defaults, load_model
    from kllm.export.resolve import resolve
    from kllm.train.device import pick_device

    place = None if adapter is None else _adapter_place(path, adapter)
    model, tokenizer = load_model(path, pick_device(device), say=say)
    if tokenizer is None:
        hint = f"kllm convert {path} OUT --tokenizer DIR gives it one"
        raise UserError("the model has no tokenizer beside it", where=path, hint=hint)
    model.eval()
    engine = Engine(model, tokenizer, max_batch=1, owns_model=True)
    name = path if adapter is None else f"{path} + {adapter}"
    try:
        base = SamplingParams(**generation_defaults(resolve(path)))  # type: ignore[arg-type]
    except UserError as error:
        say(f"{path}, generation_config.json: {error}; it is not used")
        base = SamplingParams()
    if place is not None:
        from kllm.export.adapter_weights import adapter_weights

        engine.add_adapter("adapter", adapter_weights(place, engine.shape))
        base = replace(base, adapter="adapter")
    return LocalModel(engine, tokenizer, name=name, raw=raw, base=base)


def _adapter_place(path: str, adapter: str) -> Path:
    from kllm.export.resolve_adapter import check_unmerged, resolve_adapter

    check_unmerged(path, adapter)
    return resolve_adapter(adapter)  # before the model is read: that takes longer
