"""What a caller asks of the engine and what comes back: plain dataclasses, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from kllm.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Fields keep the meaning they have in transformers' `generate`.

    `temperature` 0 (or `top_k` 1) is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off.
    `repetition_penalty` covers the prompt and the answer. `seed` None draws a fresh one; the same seed,
    prompt and model give the same answer whatever else runs in the batch. `stop` strings are matched on
    the decoded text, also across token borders, and never appear in it. `stop_token_ids` end the answer
    in addition to the tokenizer's own, which `ignore_eos` switches off.

    Raises:
        UserError: a value outside its range; `where` is the field's name.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 or more")
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more (0 = greedy)")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1 = off)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        penalty = self.repetition_penalty
        _check(0 < penalty < math.inf, "repetition_penalty", penalty, "above 0 (1 = off)")
        # A lone string would be taken for a list of one-letter stops.
        _check(not isinstance(self.stop, str), "stop", self.stop, "a tuple of strings")
        _check(all(self.stop), "stop", self.stop, "strings that are not empty")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without any noise."""
        return self.temperature == 0 or self.top_k == 1


def _check(valid: bool, name: str, value: object, wanted: str) -> None:
    if not valid:
        raise UserError(f"must be {wanted}, not {value!r}", where=name)


@dataclass
class Completion:
    """A finished answer.

    `token_ids` are all tokens drawn, the one that stopped the answer included; `text` is without it.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Event:
    """News of one request after one engine step; the last one of a request has a `finish_reason`.

    `text` is whole characters only and may be empty while a character or a stop string is incomplete.
    """

    request_id: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
