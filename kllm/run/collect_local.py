"""A teacher in this process: a model that kllm loads, asked through the engine, many questions at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kllm.data.messages import Message
from kllm.engine.params import Completion, Event, SamplingParams
from kllm.errors import KllmError, UserError
from kllm.run.collect_client import Refused, Sampling
from kllm.run.collect_journal import Reply

if TYPE_CHECKING:
    from kllm.engine.engine import Engine
    from kllm.tokenizer.tokenizer import Tokenizer

_SHOWN = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")


class LocalTeacher:
    """Asks a model on this machine.

    Args:
        path: whatever `kllm.export.load` reads.
        parallel: most questions that are answered side by side.
        device: auto, cpu, cuda ...

    Raises:
        UserError: no such model, no tokenizer or chat template, an unknown field in `sampling.extra`.
    """

    def __init__(
        self,
        path: str,
        *,
        sampling: Sampling,
        parallel: int,
        device: str = "auto",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        from kllm.engine import Engine
        from kllm.export.load import load_model
        from kllm.export.resolve import resolve
        from kllm.tokenizer.chat import ChatEncoder
        from kllm.train.device import pick_device

        place = resolve(path)
        self.model = place.name
        self.retried = 0
        self._variables, self._params = _params(sampling)
        model, tokenizer = load_model(place, pick_device(device), say=say)
        if tokenizer is None:
            hint = f"kllm convert {path} OUT --tokenizer DIR gives it one"
            raise UserError("the model has no tokenizer beside it", where=path, hint=hint)
        self._encoder = ChatEncoder(tokenizer)
        self._tokenizer: Tokenizer = tokenizer
        special = tokenizer.special_tokens
        self._shown = tuple(special[text] for text in _SHOWN if text in special)
        self._engine: Engine = Engine(model.eval(), tokenizer, max_batch=parallel, owns_model=True)
        self._waiting: dict[int, tuple[asyncio.Future[Completion], Completion]] = {}

    async def __aenter__(self) -> LocalTeacher:
        self._wake = asyncio.Event()
        self._pump = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *failure: object) -> None:
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # whoever waited was told
            await self._pump

    async def ask(self, messages: Sequence[Message], tools: Sequence[Any] | None, seed: int | None) -> Reply:
        """The answer to a conversation.

        Raises:
            Refused: the question does not fit the model's context or its chat template.
            KllmError: the engine failed.
        """
        try:
            prompt = self._encoder.prompt(messages, tools, **self._variables)
            params = SamplingParams(**self._params, seed=seed, shown_special_ids=self._shown)
            number = self._engine.submit(prompt, params)
        except UserError as error:
            raise Refused("the model cannot take it", str(error), ours=True) from None
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (future, Completion(prompt_tokens=len(prompt)))
        self._wake.set()
        try:
            done = await future
        finally:
            self._waiting.pop(number, None)
        # the template may have opened the thinking, so that the answer begins inside it
        from kllm.tokenizer.thinking import starts_thinking

        opening = "<think>\n" if starts_thinking(self._tokenizer, prompt) else ""
        message = {"content": opening + done.text}
        return Reply(message, done.finish_reason, len(prompt), len(done.token_ids))

    async def _run(self) -> None:
        """Steps the engine while anybody waits; everything happens in the loop's own thread."""
        try:
            while True:
                if not self._engine.has_work:
                    self._wake.clear()
                    await self._wake.wait()
                for event in self._engine.step():
                    self._take(event)
                await asyncio.sleep(0)  # those that were answered ask again
        except Exception as error:
            for future, _ in self._waiting.values():
                if not future.done():
                    future.set_exception(error)

    def _take(self, event: Event) -> None:
        if event.request_id not in self._waiting:
            return
        future, completion = self._waiting[event.request_id]
        completion.add(event)
        if event.finish_reason is None or future.done():
            return
        if event.finish_reason == "error":
            future.set_exception(KllmError(event.message or "the engine failed", where=self.model))
        else:
            future.set_result(completion)


def _params(sampling: Sampling) -> tuple[dict[str, Any], dict[str, Any]]:
    """(template variables, sampling parameters) from the fields of a request."""
    given = sampling.fields()
    variables: Mapping[str, Any] = given.pop("chat_template_kwargs", {})
    known = {field.name for field in fields(SamplingParams)} - {"seed", "shown_special_ids"}
    for name in given:
        if name not in known:
            raise UserError(f"a local model has no option {name!r}", where="extra")
    if isinstance(given.get("stop"), list):
        given["stop"] = tuple(given["stop"])
    SamplingParams(**given)  # values out of range are said here, before the model is loaded
    return dict(variables), given
