"""The models of this process by name. Names are keys of a dictionary, never paths."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kllm.serve.errors import ApiError, shown
from kllm.serve.metrics import ModelMetrics
from kllm.serve.runtime import EngineRuntime, dead_error, draining_error

Status = Literal["ok", "loading", "draining", "engine_dead"]
_NAMED = 8  # models in a refusal


@dataclass(frozen=True)
class Served:
    """One name that requests can ask for.

    Attributes:
        root: what was loaded, without its folder; an adapter's base model.
        parent: an adapter's base model, else None.
        adapter: its name in the engine, which is the base model's.
        fingerprint: changes exactly when greedy output may change.
        generation: defaults of generation_config.json, of temperature, top_p, top_k, min_p,
            repetition_penalty; absent where the model says nothing.
        lines: what to tell at start (KV memory, kernels).
    """

    name: str
    runtime: EngineRuntime
    root: str
    fingerprint: str
    parent: str | None = None
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    generation: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def max_model_len(self) -> int:
        return self.runtime.max_context

    @property
    def metrics(self) -> ModelMetrics:
        """What is counted for this name."""
        return self.runtime.metrics_of(self.adapter)

    @property
    def generation_config(self) -> dict[str, Any]:
        """Another name of `generation`."""
        return self.generation


class Registry:
    """What is served, and whether the server is open.

    Args:
        models: ready ones; None means that they are still being loaded (`add`, then `open`).
    """

    def __init__(self, models: Iterable[Served] | None = None) -> None:
        self._models = {one.name: one for one in models or ()}
        self._loading = models is None
        self._draining = False

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._models.values()))

    @property
    def runtimes(self) -> list[EngineRuntime]:
        """Each engine once: adapters share their base model's."""
        return list(dict.fromkeys(one.runtime for one in self))

    @property
    def status(self) -> Status:
        """`ok` while requests are taken."""
        if self._draining:
            return "draining"
        if self._loading:
            return "loading"
        return "engine_dead" if any(runtime.dead for runtime in self.runtimes) else "ok"

    def get(self, name: str | None) -> Served:
        """The model of that name; the first one for None.

        Raises:
            ApiError: 503 `loading` or `draining`, 404 `model_not_found`.
        """
        self.check_open()
        found = next(iter(self), None) if name is None else self._models.get(name)
        if found is None:
            has = ", ".join([*self._models][:_NAMED]) + (", ..." if len(self._models) > _NAMED else "")
            message = f"The model {shown(name)} does not exist; this server has: {has or 'none'}."
            raise ApiError(404, message, type="not_found_error", param="model", code="model_not_found")
        return found

    def check_open(self) -> None:
        """Refuses while nothing can be served.

        Raises:
            ApiError: 503 with the reason.
        """
        if self._draining:
            raise draining_error()
        if self._loading:
            headers = {"Retry-After": "2"}
            raise ApiError(503, "The model is being loaded.", code="loading", headers=headers)
        if self._models and all(runtime.dead for runtime in self.runtimes):
            raise dead_error()

    def add(self, served: Served) -> None:
        """One more model."""
        self._models = {**self._models, served.name: served}

    def open(self) -> None:
        """All models are there."""
        self._loading = False

    def drain(self) -> None:
        """Takes no new requests; those under way go on."""
        self._draining = True
        for runtime in self.runtimes:
            runtime.draining = True

    def abort(self, error: ApiError) -> None:
        """Every caller of every model gets `error` now; on the event loop."""
        for runtime in self.runtimes:
            runtime.abort(error)

    def stop(self) -> bool:
        """Ends the engine threads; whether all have ended."""
        ended = [runtime.stop() for runtime in self.runtimes]
        return all(ended)
