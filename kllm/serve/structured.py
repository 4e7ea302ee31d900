"""Output that obeys a grammar: `response_format`, vLLM's `structured_outputs`, and their compilation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from kllm.errors import UserError
from kllm.serve.errors import ApiError, from_user_error
from kllm.serve.fields import Fields, Flag, Text
from kllm.serve.schemas import check_schema

if TYPE_CHECKING:
    from kllm.engine.grammar import Constraint, GrammarCompiler
    from kllm.serve.runtime import EngineRuntime

PATIENCE = 20.0
"""Seconds for a compilation and for those before it."""
MAX_CHOICES = 20_000


class JsonSchemaFormat(Fields):
    """A named JSON schema. It is always obeyed, `strict` or not."""

    name: Annotated[str, Field(strict=True, pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Any = Field(None, alias="schema", json_schema_extra={"type": ["object", "boolean"]})
    strict: Flag | None = None


class ResponseFormat(Fields):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Fields):
    """One of these."""

    json_: Any = Field(None, alias="json", json_schema_extra={"type": ["object", "boolean", "string"]})
    regex: Annotated[str, Field(strict=True, min_length=1, max_length=64 << 10)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(strict=True, min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(strict=True, min_length=1, max_length=64 << 10)] | None = Field(
        None, description="In the Lark form of llguidance."
    )
    json_object: Flag | None = None


@dataclass(frozen=True)
class Grammar:
    """A grammar that a request asks for: how to compile it, and the field it came in."""

    build: Callable[[GrammarCompiler, str | None], Constraint]
    param: str


class StructuredFields(Fields):
    """The two ways to ask for it."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def grammar(self) -> Grammar | None:
        """What was asked for, None if the answer is free.

        Raises:
            ApiError: 400, more than one grammar, or one that cannot be.
        """
        asked = [one for one in (self._format(), self._structured()) if one is not None]
        if len(asked) > 1:
            message = "response_format and structured_outputs cannot both restrict the answer"
            raise ApiError(400, message, param="structured_outputs")
        return asked[0] if asked else None

    def _format(self) -> Grammar | None:
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return Grammar(lambda compiler, after: compiler.json_object(after=after), "response_format")
        if asked.json_schema is None:
            message = 'type "json_schema" needs a json_schema'
            raise ApiError(400, message, param="response_format.json_schema")
        at = "response_format.json_schema.schema"
        schema = asked.json_schema.schema_
        if schema is None:
            raise ApiError(400, "json_schema needs a schema", param=at)
        check_schema(schema, at)
        return Grammar(lambda compiler, after: compiler.json_schema(schema, after=after), at)

    def _structured(self) -> Grammar | None:
        asked = self.structured_outputs
        if asked is None:
            return None
        found: list[Grammar] = []
        if asked.json_ is not None:
            schema = _parsed(asked.json_)
            check_schema(schema, "structured_outputs.json")
            found.append(
                Grammar(lambda c, after: c.json_schema(schema, after=after), "structured_outputs.json")
            )
        if asked.json_object:
            found.append(
                Grammar(lambda c, after: c.json_object(after=after), "structured_outputs.json_object")
            )
        if (pattern := asked.regex) is not None:
            found.append(Grammar(lambda c, after: c.regex(pattern, after=after), "structured_outputs.regex"))
        if (options := asked.choice) is not None:
            found.append(
                Grammar(lambda c, after: c.choice(options, after=after), "structured_outputs.choice")
            )
        if (lark := asked.grammar) is not None:
            found.append(Grammar(lambda c, after: c.lark(lark, after=after), "structured_outputs.grammar"))
        if len(found) != 1:
            message = "structured_outputs needs exactly one of json, regex, choice, grammar and json_object"
            raise ApiError(400, message, param="structured_outputs")
        return found[0]


def _parsed(schema: Any) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        message = "json must be a JSON schema, or one written as a string"
        raise ApiError(400, message, param="structured_outputs.json") from None


@lru_cache(maxsize=1)
def _compilers() -> ThreadPoolExecutor:
    """Threads of its own: grammars that take their time hold up other grammars, not other prompts."""
    return ThreadPoolExecutor(4, thread_name_prefix="kllm-grammar")


async def compiled(runtime: EngineRuntime, grammar: Grammar, after: str | None) -> Constraint:
    """The grammar ready for the engine; compiled in a worker thread, which the compiler's own limit ends.

    Args:
        runtime: of the model that will write.
        grammar: what to compile.
        after: the text from which on it holds, e.g. `</think>`; None is the start.

    Raises:
        ApiError: 400, a broken grammar or one that takes too long; 429, too many are being compiled.
    """
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(_compilers(), lambda: grammar.build(runtime.compiler, after))
    done, _ = await asyncio.wait({future}, timeout=PATIENCE)
    if not done:
        future.cancel()
        message = "Too many grammars are being compiled; try again."
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": "5"})
    try:
        return future.result()
    except UserError as e:
        raise ApiError(400, from_user_error(e).message, param=grammar.param) from None
