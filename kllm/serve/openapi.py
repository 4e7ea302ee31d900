"""An honest /openapi.json for routes that take the raw request: bodies, answers and errors declared."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_REF = "#/components/schemas/"
_NULLABLE: dict[str, Any] = {"type": ["string", "null"]}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE,
                "code": _NULLABLE,
            },
        }
    },
}
_SCHEMAS: dict[str, dict[str, Any]] = {"Error": _ERROR}
_STATUS = {
    400: "The request is wrong.",
    401: "No valid API key.",
    403: "The host or the page's origin is not allowed.",
    404: "No such model.",
    405: "Another method is wanted.",
    408: "It took too long.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full; see Retry-After.",
    500: "The server failed.",
    503: "Loading, draining or dead; see Retry-After.",
}


def described(
    model: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    stream: bool = False,
    *,
    text: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments for a route's decorator: `@router.post("/v1/x", **described(X, Answer, True))`.

    Args:
        model: of the request body; None for a route without one. Unknown members are allowed, and null
            in all that is not required, as `body.parsed` takes them.
        answer: of the JSON answer; None is any JSON.
        stream: whether the answer may also be an event stream.
        text: media type of an answer that is no JSON.
    """
    content: dict[str, Any] = {"application/json": {"schema": _answer(answer)}}
    if text is not None:
        content = {text: {"schema": {"type": "string"}}}
    if stream:
        fields = {"event": {"type": "string"}, "data": {"type": "string"}}
        content["text/event-stream"] = {"schema": {"type": "object", "properties": fields}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "The answer.", "content": content}}
    error = {"application/json": {"schema": {"$ref": f"{_REF}Error"}}}
    responses |= {status: {"description": text, "content": error} for status, text in _STATUS.items()}
    route: dict[str, Any] = {"response_model": None, "responses": responses}
    if model is not None:
        body = {"application/json": {"schema": _request(model)}}
        route["openapi_extra"] = {"requestBody": {"required": True, "content": body}}
    return route


def _hoisted(model: type[BaseModel], mode: Any) -> dict[str, Any]:
    """The model's schema; the parts it refers to go to the components under names of their own."""
    prefix = f"{model.__module__.rpartition('.')[2]}_{model.__name__}_".replace(".", "_")
    schema = model.model_json_schema(mode=mode, ref_template=f"{_REF}{prefix}{{model}}")
    for name, part in schema.pop("$defs", {}).items():
        _SCHEMAS[prefix + name] = part
    return schema


def _request(model: type[BaseModel]) -> dict[str, Any]:
    schema = _hoisted(model, "validation")
    required = set(schema.get("required", []))
    for name, part in schema.get("properties", {}).items():
        if name not in required and {"type": "null"} not in part.get("anyOf", []) and part:
            kept = {key: part.pop(key) for key in ("title", "description", "default") if key in part}
            schema["properties"][name] = {"anyOf": [part, {"type": "null"}], **kept}
    schema["additionalProperties"] = True
    return schema


def _answer(model: type[BaseModel] | None) -> dict[str, Any]:
    return {"type": "object"} if model is None else _hoisted(model, "serialization")


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The document, built once."""
    if app.openapi_schema is None:
        document = get_openapi(title="kllm", version=app.version, routes=app.routes)
        for operations in document.get("paths", {}).values():
            for operation in operations.values():
                operation.get("responses", {}).pop("422", None)  # ours are 400, with the error's shape
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas.update(_SCHEMAS)
        app.openapi_schema = document
    return app.openapi_schema
