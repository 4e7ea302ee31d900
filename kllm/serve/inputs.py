"""Text or token ids: what /v1/completions and /v1/embeddings take, one or many, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from kllm.serve.errors import ApiError, context_error
from kllm.serve.fields import refused
from kllm.serve.worker import TookTooLong, limited

if TYPE_CHECKING:
    from kllm.engine.engine import Engine
    from kllm.tokenizer.tokenizer import Tokenizer

Item = str | list[int]

MAX_ITEMS = 2048
_CHARS_PER_TOKEN = 16  # no tokenizer makes fewer tokens of so long a text, as far as contexts go
_SECONDS = 10.0  # of work; the largest body that is allowed takes one or two


def _items(value: Any) -> list[Item]:
    """`value` as a list of texts and id lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise refused("must be a string, a list of strings, a list of token ids, or a list of those")
    if not value:
        raise refused("must not be empty")
    if _is_ids(value):
        return [_ids(value)]
    if len(value) > MAX_ITEMS:
        raise refused(f"holds {len(value)} entries; at most {MAX_ITEMS} are allowed")
    kinds = {type(item) for item in value}
    if kinds == {str}:
        return value
    if kinds != {list}:
        raise refused("must be all strings, all token ids or all lists of token ids")
    return [_ids(item) for item in value]


def _is_ids(value: list[Any]) -> bool:
    return isinstance(value[0], (int, float))


def _ids(value: list[Any]) -> list[int]:
    for token in value:
        if type(token) is not int:  # true is an int to Python
            raise refused(f"token ids must be integers, not {str(token)[:40]!r}")
        if token < 0:
            raise refused(f"token ids must not be negative, but one is {str(token)[:40]}")
    return value


_TOKENS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TextOrTokens = Annotated[
    list[Item],
    BeforeValidator(_items),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "minItems": 1,
                    "maxItems": MAX_ITEMS,
                },
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_ITEMS},
            ]
        }
    ),
]
"""A string, strings, token ids or lists of them; always a list once it is parsed."""


async def encoded(
    items: Sequence[Item],
    engine: Engine,
    *,
    param: str,
    spare: int = 0,
    add_special_tokens: bool = True,
    keep: int | None = None,
) -> list[list[int]]:
    """The token ids of each item, checked. Texts are tokenised in a worker thread.

    Control tokens that a text spells out are read as such.

    Args:
        items: texts and id lists.
        engine: of the model that will read them.
        param: the request's field, for errors.
        spare: places of the context that must be left free.
        add_special_tokens: whether the tokenizer puts its own tokens (BOS) around texts.
        keep: cut each to so many of its last tokens.

    Raises:
        ApiError: 400, an empty item, an id outside the vocabulary, or too many tokens.
    """
    context = engine.max_context
    for item in items:
        if isinstance(item, str):
            if keep is None:
                check_length(item, engine, param=param)
        else:
            check_ids(item, engine, param=param)
    if any(isinstance(item, str) for item in items):
        try:
            texts = await limited(_SECONDS, _tokenised, items, engine, add_special_tokens)
        except TookTooLong:
            raise ApiError(400, f"{param} takes too long to tokenise", param=param) from None
    else:
        texts = [list(item) for item in items if not isinstance(item, str)]
    each = [ids if keep is None else ids[-keep:] for ids in texts]
    for ids in each:
        if not ids:
            raise ApiError(400, f"{param} is empty: there is no token to start from", param=param)
        if len(ids) + spare > context:
            raise context_error(context, len(ids), param)
    return each


def check_ids(ids: Sequence[int], engine: Engine, *, param: str) -> None:
    """Refuses ids that the model has no row for: one of them would be a crash further down.

    Raises:
        ApiError: 400.
    """
    vocab = engine.shape.vocab_size
    highest = max(ids, default=0)
    if highest >= vocab:
        message = f"token id {str(highest)[:40]} is outside the vocabulary, which ends at {vocab - 1}"
        raise ApiError(400, message, param=param)


def check_length(text: str, engine: Engine, *, param: str) -> None:
    """Refuses a text that cannot fit, before the tokenizer spends time on it.

    Raises:
        ApiError: 400 context_length_exceeded.
    """
    if len(text) > _CHARS_PER_TOKEN * engine.max_context:
        raise context_error(engine.max_context, len(text) // _CHARS_PER_TOKEN, param)


def tokenizer_of(engine: Engine) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        ApiError: 400, it has none.
    """
    if engine.tokenizer is None:
        raise ApiError(400, "this model has no tokenizer, so it knows no text", param="model")
    return engine.tokenizer


def _tokenised(items: Sequence[Item], engine: Engine, add_special_tokens: bool) -> list[list[int]]:
    tokenizer = tokenizer_of(engine)
    return [
        tokenizer.encode_raw(item, add_special_tokens=add_special_tokens) if isinstance(item, str) else item
        for item in items
    ]
