"""The ASGI application: routes, layers, and an error object for whatever goes wrong."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from kllm.errors import UserError
from kllm.serve import chat, completions, embeddings, models, ops, page, render, responses, tokens
from kllm.serve.errors import ApiError, from_user_error
from kllm.serve.metrics import Metrics
from kllm.serve.middleware import BodyLimit, Frame, Gate
from kllm.serve.openapi import openapi_of
from kllm.serve.registry import Registry
from kllm.serve.servertools import ServerTools
from kllm.serve.settings import Settings

_MODULES = (chat, completions, embeddings, models, tokens, responses, render, ops, page)


def create_app(registry: Registry, settings: Settings | None = None) -> FastAPI:
    """The server over the models of `registry`, which may still be loading.

    `app.state` has `registry`, `settings`, `metrics` and `tools`.
    """
    settings = settings or Settings()
    app = FastAPI(
        title="kllm",
        version=ops.kllm_version(),
        docs_url=None,  # FastAPI's page loads its scripts from a CDN
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.registry, app.state.settings, app.state.metrics = registry, settings, Metrics()
    app.state.tools = ServerTools(settings.tools, settings.unsafe_python, settings.max_sandboxes)
    for module in _MODULES:
        app.include_router(module.router)
    app.add_api_route("/openapi.json", _openapi, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Gate, settings=settings, registry=registry)
    app.add_middleware(Frame, settings=settings)
    return app


async def _openapi(request: Request) -> Response:
    return JSONResponse(openapi_of(request.app))


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return from_user_error(error).response()


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    message = f"There is no {what}." if error.status_code in (404, 405) else str(error.detail)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return ApiError(error.status_code, message, type=kind, headers=error.headers).response()


async def _validation_error(request: Request, error: Exception) -> Response:
    return ApiError(400, "The request is not valid.").response()
