"""What a caller asks of the engine and what comes back: plain dataclasses, no torch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kllm.errors import UserError

if TYPE_CHECKING:
    from kllm.engine.grammar import Constraint

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Fields keep the meaning they have in transformers' `generate`.

    `temperature` 0 (or `top_k` 1) is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off.
    `repetition_penalty` covers the prompt and the answer. `seed` None draws a fresh one; the same seed,
    prompt and model give the same answer whatever else runs in the batch. `stop` strings are matched on
    the decoded text, also across token borders, and never appear in it; one that is a control token's text
    stands for that token. `stop_token_ids` end the answer in addition to the tokenizer's own, which
    `ignore_eos` switches off.

    `presence_penalty` and `frequency_penalty` are subtracted from the logits of tokens that the answer has
    (once, and per occurrence; OpenAI's rule), `logit_bias` is added. `min_tokens` forbids the end (stop ids
    and stop strings) before. `logprobs` asks for the log-probability of each token and of so many best
    ones, `prompt_logprobs` for those of the prompt's tokens, from the model's own distribution (before
    penalties, bias, temperature and filters). `constraint` is a grammar that the answer obeys.
    `shown_special_ids` are control tokens whose text stays in the text. `salt` keeps the prefix cache of
    one tenant apart from another's. `adapter` is the name of one that the engine has; None is the base.

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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    shown_special_ids: tuple[int, ...] = ()
    salt: str = ""
    adapter: str | None = None

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
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(math.isfinite(value), name, value, "a finite number (0 = off)")
        bias = [value for _, value in self.logit_bias]
        _check(all(map(math.isfinite, bias)), "logit_bias", bias, "finite numbers")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 (off) or more")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(count is None or count >= 0, name, count, "0 or more")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without any noise."""
        return self.temperature == 0 or self.top_k == 1


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of the n-th answer to one prompt: the seed itself for the first, unrelated ones after it."""
    if seed is None or choice == 0:
        return seed
    mixed = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little")


def _check(valid: bool, name: str, value: object, wanted: str) -> None:
    if not valid:
        raise UserError(f"must be {wanted}, not {value!r}", where=name)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural, float32) of a token, and the best ones at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """A finished answer.

    `token_ids` are all tokens drawn, the one that stopped the answer included; `text` is without it.
    `logprobs` has one entry per token where asked for; `prompt_logprobs` one per prompt token, None for the
    first. `cached_tokens` of the prompt's were not computed again.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"
    prompt_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0

    def add(self, event: Event) -> None:
        """Takes what an event brings."""
        self.token_ids += event.token_ids
        self.text += event.text
        self.logprobs += event.logprobs
        self.cached_tokens += event.cached_tokens
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = list(event.prompt_logprobs)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason


@dataclass(frozen=True)
class Event:
    """News of one request after one engine step; the last one of a request has a `finish_reason`.

    `text` is whole characters only and may be empty while a character or a stop string is incomplete.
    `logprobs` goes with `token_ids`; `prompt_logprobs` and `cached_tokens` come with the first event.
    `message` says what went wrong when `finish_reason` is "error".
    """

    request_id: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    message: str = ""


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine; a page is 16 tokens. Pages that hold cached prefixes count as free."""

    running: int
    waiting: int
    kv_pages_total: int
    kv_pages_free: int
    kv_pages_cached: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    computed_tokens: int
    generation_tokens: int
