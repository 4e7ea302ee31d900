"""/v1/models: what can be asked for."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from kllm.serve.openapi import described
from kllm.serve.registry import Registry, Served

router = APIRouter()


class ModelCard(BaseModel):
    """One model; `parent` is an adapter's base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kllm"
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    """All of them, the default first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models", summary="All models", **described(answer=ModelList))
async def all_models(request: Request) -> Response:
    """The default model first."""
    registry: Registry = request.app.state.registry
    registry.check_open()
    return JSONResponse({"object": "list", "data": [card(one) for one in registry]})


@router.get("/v1/models/{model:path}", summary="One model", **described(answer=ModelCard))
async def one_model(request: Request, model: str) -> Response:
    """404 `model_not_found` for an unknown name."""
    registry: Registry = request.app.state.registry
    return JSONResponse(card(registry.get(model)))


def card(served: Served) -> dict[str, Any]:
    """OpenAI's model object, with vLLM's additions."""
    return ModelCard(
        id=served.name,
        created=served.created,
        root=served.root,
        parent=served.parent,
        max_model_len=served.max_model_len,
    ).model_dump()
