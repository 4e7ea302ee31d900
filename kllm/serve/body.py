"""From the bytes of a request to a checked model: strict JSON, one clear 400 for whatever is wrong.

Python's parser takes NaN, duplicate keys and lone surrogates, and recurses; none of that gets past here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from kllm.serve.errors import ApiError, ClientGone, shown

log = logging.getLogger("kllm.serve")

MAX_DEPTH = 128  # brackets inside brackets
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MAX_DIGITS = 40  # of an integer
_THREAD_BYTES = 64 << 10  # larger bodies are parsed beside the event loop
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"')
_NOT_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")

Model = TypeVar("Model", bound=BaseModel)


async def parsed(request: Request, model: type[Model]) -> Model:
    """The body of `request` as a `model`.

    Members of the top-level object that are null count as absent; unknown ones are ignored unless the
    model says otherwise. Nulls further inside are the model's business (declare `X | None = None`).

    Raises:
        ApiError: 415 not application/json, 400 `invalid_json`, 400 with the path of the wrong field.
        ClientGone: the client left before the body was there.
    """
    data = await json_object(request)
    if len(await request.body()) > _THREAD_BYTES:
        return await asyncio.to_thread(validated, data, model)
    return validated(data, model)


async def json_object(request: Request) -> dict[str, Any]:
    """The body of `request`, which must be a JSON object; see `parsed` for the errors."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Browsers let any web page send the other types without asking the server first.
        raise ApiError(415, f"Content-Type must be application/json, not {shown(kind)}")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    _log(request, body)
    if len(body) > _THREAD_BYTES:
        return await asyncio.to_thread(parse_object, body)
    return parse_object(body)


def _log(request: Request, body: bytes) -> None:
    """Only where the operator asked for it: prompts are private."""
    settings = getattr(request.app.state, "settings", None)
    if settings is not None and settings.log_requests:
        number = getattr(request.state, "request_id", "-")
        text = body.decode("utf-8", "replace")
        log.info("%s %s", number, _CONTROL.sub(lambda found: repr(found[0])[1:-1], text))


def parse_object(body: bytes) -> dict[str, Any]:
    """Strict JSON (RFC 8259 with unique names) whose top is an object.

    Lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD.

    Raises:
        ApiError: 400 `invalid_json`.
    """
    _check_depth(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _bad(f"byte {e.start} is not UTF-8") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as e:
        raise _bad(
            f"{e.msg} at line {e.lineno}, column {e.colno}" if text.strip() else "it is empty"
        ) from None
    except ValueError as e:
        raise _bad(str(e)) from None
    if not isinstance(value, dict):
        raise _bad("it must be an object")
    return _without_surrogates(value) if _SURROGATE_ESCAPE.search(body) else value


def validated(data: dict[str, Any], model: type[Model]) -> Model:
    """`data` as a `model`, nulls at the top left out.

    Raises:
        ApiError: 400 with `param` set, e.g. `messages[1].content`.
    """
    present = {key: value for key, value in data.items() if value is not None}
    try:
        return model.model_validate(present)
    except ValidationError as e:
        raise _explained(e, present) from None


def _bad(reason: str) -> ApiError:
    return ApiError(400, f"The request body is not valid JSON: {reason}.", code="invalid_json")


def _check_depth(body: bytes) -> None:
    """Refuses deep nesting before a recursive parser sees it."""
    if nesting(body) > MAX_DEPTH:
        raise _bad(f"nested deeper than {MAX_DEPTH}")


def nesting(text: bytes) -> int:
    """How deep the brackets outside the strings of a JSON text go."""
    brackets = _STRING.sub(b"", _ESCAPE.sub(b"", text)).translate(None, _NOT_BRACKETS)
    if not brackets:
        return 0
    codes = np.frombuffer(brackets, np.uint8)
    return int(np.where((codes == ord("[")) | (codes == ord("{")), 1, -1).cumsum().max())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)} occurs twice in an object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_float
)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    return value


# ---- pydantic's findings in OpenAI's words


def _explained(failure: ValidationError, data: dict[str, Any]) -> ApiError:
    """The first wrong field; of a union's findings, the one that got furthest into the value."""
    findings = failure.errors(include_url=False, include_context=False)
    located = [(_path(finding, data), finding) for finding in findings]
    top = findings[0]["loc"][:1]
    same = [item for item in located if item[1]["loc"][:1] == top]
    path, finding = max(same, key=lambda item: len(item[0]))
    param = _spelled(path) or None
    if finding["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param)
    text = finding["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if finding["type"] in ("value_error", "assertion_error"):
        message = f"Invalid value for '{param}': {text}" if param else text
    else:
        words = {other[1]["msg"] for other in same if other[0] == path}
        text = " or ".join(sorted(words)) if len(words) < 4 else text
        message = f"Invalid value for '{param}': {text}, not {shown(finding['input'])}."
    return ApiError(400, message, param=param)


def _path(finding: Any, data: Any) -> list[str | int]:
    """The parts of pydantic's location that exist in the data: names of union members are left out."""
    path: list[str | int] = []
    value = data
    for part in finding["loc"]:
        inside = isinstance(value, dict) and part in value
        inside = inside or (isinstance(value, list) and isinstance(part, int) and part < len(value))
        if inside:
            value = value[part]
            path.append(part)
    if finding["type"] == "missing":
        path.append(finding["loc"][-1])
    return path


def _spelled(path: list[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")[:200]
