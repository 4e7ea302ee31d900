"""engine: continuous batching over a slot KV cache; the only place where text is generated."""

from kllm.engine.engine import Engine
from kllm.engine.params import Completion, EngineStats, Event, SamplingParams, TokenLogprob, choice_seed

__all__ = ["Completion", "Engine", "EngineStats", "Event", "SamplingParams", "TokenLogprob", "choice_seed"]
