"""JSON Schemas from requests: enough of a check to say what is wrong before anything is generated."""

from __future__ import annotations

import json
import re
from typing import Any

from kllm.serve.errors import ApiError

MAX_BYTES, MAX_DEPTH = 64 << 10, 64
_LONG_PATTERN = 1000
_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}
_ONE = ("additionalProperties", "contains", "else", "if", "not", "propertyNames", "then")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems")
_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
_NUMBERS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf")
_STRINGS = ("$ref", "format", "pattern")
_NAMED_GROUP = re.compile(r"\(\?<(?![=!])")
_ONLY_JS = re.compile(r"\\(?:[pP]\{\w+(?:=\w+)?\}|u\{[0-9a-fA-F]+\}|c[A-Za-z])")


def check_schema(schema: Any, param: str) -> None:
    """Refuses what is no JSON Schema, or one that is too large. For a worker thread.

    Args:
        schema: from a request.
        param: where it stands there; the error's goes on from it to what is wrong.

    Raises:
        ApiError: 400.
    """
    size = len(json.dumps(schema, ensure_ascii=False).encode("utf-8", "replace"))
    if size > MAX_BYTES:
        raise ApiError(400, f"the JSON schema has {size} bytes; at most {MAX_BYTES} are allowed", param=param)
    _check(schema, param, 0)


def _check(schema: Any, at: str, depth: int) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ApiError(400, "a JSON schema must be an object", param=at)
    if depth > MAX_DEPTH:
        raise ApiError(400, f"the JSON schema is nested deeper than {MAX_DEPTH}", param=at)
    _check_values(schema, at)
    for key in _ONE:
        if key in schema:
            _check(schema[key], f"{at}.{key}", depth + 1)
    for key in _NAMED:
        if key in schema:
            members = _of(schema, key, at, dict, "an object of schemas")
            for name, member in members.items():
                _check(member, f"{at}.{key}.{name}", depth + 1)
    for key in _SEVERAL:
        if key in schema:
            for i, member in enumerate(_of(schema, key, at, list, "a list of schemas")):
                _check(member, f"{at}.{key}[{i}]", depth + 1)
    items = schema.get("items")
    if isinstance(items, list):  # drafts before 2020-12
        for i, member in enumerate(items):
            _check(member, f"{at}.items[{i}]", depth + 1)
    elif "items" in schema:
        _check(items, f"{at}.items", depth + 1)


def _check_values(schema: dict[str, Any], at: str) -> None:
    kinds = schema.get("type", "object")
    listed = kinds if isinstance(kinds, list) else [kinds]
    if not listed or not all(isinstance(kind, str) and kind in _TYPES for kind in listed):
        message = f"type must be one of {', '.join(sorted(_TYPES))} in a JSON schema"
        raise ApiError(400, message, param=f"{at}.type")
    if "enum" in schema and not _of(schema, "enum", at, list, "a list of values"):
        raise ApiError(400, "enum must not be empty", param=f"{at}.enum")
    if "required" in schema:
        names = _of(schema, "required", at, list, "a list of names")
        if not all(isinstance(name, str) for name in names):
            raise ApiError(400, "required must be a list of names", param=f"{at}.required")
    for key in _STRINGS:
        if key in schema:
            _of(schema, key, at, str, "a string")
    if "pattern" in schema:
        _check_pattern(schema["pattern"], f"{at}.pattern")
    for pattern in schema.get("patternProperties", ()):
        _check_pattern(pattern, f"{at}.patternProperties")
    for key in _NUMBERS:
        if key in schema and (isinstance(schema[key], bool) or not isinstance(schema[key], (int, float))):
            raise ApiError(400, f"{key} must be a number", param=f"{at}.{key}")
    for key in _COUNTS:
        value = schema.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value % 1:
            raise ApiError(400, f"{key} must be an integer from 0 on", param=f"{at}.{key}")


def _check_pattern(pattern: Any, at: str) -> None:
    """Refuses what is no regular expression; what only JavaScript's know is made Python's first."""
    if len(str(pattern)) > _LONG_PATTERN:  # compiling takes long: the grammar's own compiler will tell
        return
    text = _NAMED_GROUP.sub("(?P<", _ONLY_JS.sub("x", str(pattern)))
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as e:
        if "look-behind" not in str(e):  # Python wants a fixed width there
            raise ApiError(400, f"not a regular expression: {e}", param=at) from None


def _of(schema: dict[str, Any], key: str, at: str, kind: type, words: str) -> Any:
    if not isinstance(schema[key], kind):
        raise ApiError(400, f"{key} must be {words}", param=f"{at}.{key}")
    return schema[key]
