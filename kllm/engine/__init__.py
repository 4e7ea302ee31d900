"""engine: continuous batching over a slot KV cache; the only place where text is generated."""

from kllm.engine.engine import Engine
from kllm.engine.params import Completion, Event, SamplingParams, TokenLogprob

__all__ = ["Completion", "Engine", "Event", "SamplingParams", "TokenLogprob"]
