"""The request fields that chat and completions share, and what the engine is asked because of them.

Types are strict (no "5" for 5, no "yes" for true; 5.0 is an integer, as in JSON Schema), `null` is absent,
unknown fields are ignored. What depends on the model (vocabulary, context) is checked in
`SamplingFields.sampling`, the rest while parsing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kllm.engine.params import SamplingParams, choice_seed
from kllm.errors import UserError
from kllm.serve.errors import ApiError, context_error, from_user_error

if TYPE_CHECKING:
    from kllm.engine.grammar import Constraint

MAX_STOPS, MAX_STOP_CHARS, MAX_BIASES, MAX_STOP_IDS = 16, 256, 1024, 1024
_MAX_INT64 = 2**63 - 1
_BANNED = -1e9  # a logit that no other bias brings back
_TOKEN_ID = re.compile(r"[0-9]{1,9}")


def refused(message: str) -> PydanticCustomError:
    """What a field's validator raises: a 400 whose `param` is that field."""
    return PydanticCustomError("value_error", "{reason}", {"reason": message})


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral), Field(strict=True)]
"""A JSON integer: 5.0 is one, true and "5" are not."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]


class Fields(BaseModel):
    """An object in a request: unknown members are ignored, members that are null are absent."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


def _stops(value: Any) -> list[str]:
    """A stop string or a list of them, nulls dropped."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise refused("stop must be a string or a list of strings")
    stops = [stop for stop in stops if stop is not None]
    if len(stops) > MAX_STOPS:
        raise refused(f"stop holds {len(stops)} strings; at most {MAX_STOPS} are allowed")
    for stop in stops:
        if not isinstance(stop, str):
            raise refused("stop must be a string or a list of strings")
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise refused(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return stops


def _biases(value: Any) -> dict[int, float]:
    """Token ids as JSON writes them (object keys are strings) and their biases."""
    if not isinstance(value, dict):
        raise refused("logit_bias must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise refused(f"logit_bias holds {len(value)} entries; at most {MAX_BIASES} are allowed")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and _TOKEN_ID.fullmatch(key)):
            raise refused(f"logit_bias keys must be token ids, not {str(key)[:40]!r}")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise refused(f"the logit_bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "maxItems": MAX_STOPS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                },
            ]
        }
    ),
]
Biases = Annotated[
    dict[int, float],
    BeforeValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]


class StreamOptions(Fields):
    """How a stream is sent."""

    include_usage: Flag = False


class SamplingFields(Fields):
    """How the answer is drawn and sent: the same on every endpoint that generates."""

    model: Text | None = Field(None, description="A name from /v1/models; the first one if absent.")
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, ge=0, le=1, description="0 is greedy.")
    top_k: Integer | None = Field(None, ge=-1, description="-1 and 0 switch it off.")
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(
        None, gt=0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = None
    seed: Integer | None = Field(None, ge=-_MAX_INT64 - 1, le=_MAX_INT64)
    n: Integer = Field(1, ge=1)
    stop: Stops | None = None
    stop_token_ids: list[Annotated[Integer, Field(ge=0)]] | None = Field(None, max_length=MAX_STOP_IDS)
    ignore_eos: Flag = False
    min_tokens: Integer = Field(0, ge=0)
    stream: Flag = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Integer | None = Field(
        None, ge=1, description="Keep only so many of the prompt's last tokens."
    )
    cache_salt: Annotated[str, Field(strict=True, min_length=1, max_length=256)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, max_n: int) -> None:
        """What several fields say together.

        Raises:
            ApiError: 400.
        """
        if self.n > max_n:
            raise ApiError(400, f"n must be at most {max_n}, not {str(self.n)[:40]}", param="n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")

    def sampling(
        self,
        max_tokens: int,
        *,
        vocab_size: int,
        defaults: Mapping[str, Any] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
        shown: Sequence[int] = (),
        banned: Sequence[int] = (),
        adapter: str | None = None,
    ) -> list[SamplingParams]:
        """What the engine is asked, one entry per choice (`n`).

        Args:
            max_tokens: of the answer, already within the context.
            vocab_size: ids from here on are refused.
            defaults: of the model (its generation_config.json): temperature, top_p, top_k, ...
            logprobs: how many of the best tokens to report besides the drawn one; None reports nothing.
            prompt_logprobs: the same for the prompt's tokens.
            constraint: the grammar that the answer obeys.
            shown: special ids whose text stays in the answer.
            banned: ids that are never drawn.
            adapter: the engine's name for what was asked for.

        Raises:
            ApiError: 400.
        """
        bias = dict(self.logit_bias or {})
        _known_ids(bias, vocab_size, "logit_bias")
        _known_ids(self.stop_token_ids or (), vocab_size, "stop_token_ids")
        bias |= dict.fromkeys(banned, _BANNED)
        try:
            params = SamplingParams(
                max_tokens=max_tokens,
                **self._drawn(defaults or {}, vocab_size),
                stop=tuple(dict.fromkeys(self.stop or ())),
                stop_token_ids=tuple(dict.fromkeys(self.stop_token_ids or ())),
                ignore_eos=self.ignore_eos,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=tuple(bias.items()),
                min_tokens=min(self.min_tokens, max_tokens),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                constraint=constraint,
                shown_special_ids=tuple(shown),
                salt=self.cache_salt or "",
                adapter=adapter,
            )
        except UserError as e:
            raise from_user_error(e) from e
        return [replace(params, seed=choice_seed(self.seed, choice)) for choice in range(self.n)]

    def _drawn(self, defaults: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
        """How a token is drawn: OpenAI's defaults, the model's over them, the request's over those."""
        drawn: dict[str, Any] = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        drawn |= {name: defaults[name] for name in drawn if defaults.get(name) is not None}
        drawn |= {name: value for name in drawn if (value := getattr(self, name)) is not None}
        if drawn["top_p"] == 0:
            drawn |= {"temperature": 0.0, "top_p": 1.0}
        drawn["top_k"] = min(max(int(drawn["top_k"]), 0), vocab_size)
        return drawn


def _known_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    unknown = next((i for i in ids if i >= vocab_size), None)
    if unknown is not None:
        message = f"{param} holds token id {str(unknown)[:40]}, but the vocabulary ends at {vocab_size - 1}"
        raise ApiError(400, message, param=param)


def room(context: int, tokens: int, wanted: int | None, *, what: str = "messages") -> int:
    """How many tokens the answer may have: `wanted`, cut to what the context leaves.

    Raises:
        ApiError: 400 context_length_exceeded where nothing is left.
    """
    left = context - tokens
    if left < 1:
        raise context_error(context, tokens, what)
    return left if wanted is None else min(wanted, left)
