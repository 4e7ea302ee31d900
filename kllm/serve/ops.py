"""/health, /metrics, /version: for those who operate the server."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from kllm.serve.errors import ApiError
from kllm.serve.metrics import CONTENT_TYPE
from kllm.serve.openapi import described

router = APIRouter()


class Health(BaseModel):
    """`ok`, or why not."""

    status: str


class Version(BaseModel):
    """Of kllm."""

    version: str


@router.api_route("/health", methods=["GET"], summary="Is it open?", **described(answer=Health))
async def health(request: Request) -> Response:
    """200 while requests are taken; 503 while loading or draining and after the engine's death."""
    status = request.app.state.registry.status
    if status == "ok":
        return JSONResponse({"status": "ok"})
    headers = {"Retry-After": "2"} | ({"Connection": "close"} if status == "draining" else {})
    error = ApiError(503, f"The server is not open: {status}.", code=status, headers=headers)
    return JSONResponse({"status": status, **error.body()}, 503, error.headers)


@router.api_route("/health", methods=["HEAD"], include_in_schema=False)
async def health_head(request: Request) -> Response:
    return await health(request)


@router.get("/metrics", summary="Prometheus metrics", **described(text="text/plain"))
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    state = request.app.state
    return Response(state.metrics.render(state.registry), media_type=CONTENT_TYPE)


@router.get("/version", summary="Version", **described(answer=Version))
async def show_version(request: Request) -> Response:
    """The version of kllm."""
    return JSONResponse({"version": kllm_version()})


def kllm_version() -> str:
    """Of the installed package; "unknown" from a bare checkout."""
    try:
        return version("kllm")
    except PackageNotFoundError:
        return "unknown"
