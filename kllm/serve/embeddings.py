"""POST /v1/embeddings: the model's last hidden states as one vector a text, of length 1."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from kllm.serve.body import parsed
from kllm.serve.errors import ApiError
from kllm.serve.fields import Fields, Flag, Integer, Text
from kllm.serve.inputs import TextOrTokens, encoded
from kllm.serve.openapi import described
from kllm.serve.runtime import until_disconnect

if TYPE_CHECKING:
    from kllm.serve.registry import Served

router = APIRouter()


class EmbeddingRequest(Fields):
    """Texts, or their tokens, to be turned into vectors."""

    model: Text | None = Field(None, description="A name from /v1/models; the first one if absent.")
    input: TextOrTokens
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64 holds little-endian float32."
    )
    dimensions: Integer | None = Field(
        None, ge=1, description="Keep so many of the first numbers and bring them back to length 1."
    )
    add_special_tokens: Flag = True
    truncate_prompt_tokens: Integer | None = Field(None, ge=1)


class EmbeddingAnswer(BaseModel):
    """The vectors, in the order of the inputs."""

    object: str
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


@router.post("/v1/embeddings", **described(EmbeddingRequest, EmbeddingAnswer))
async def embeddings(request: Request) -> Any:
    """One vector for each input, pooled over its tokens as the server's settings say."""
    body = await parsed(request, EmbeddingRequest)
    settings = request.app.state.settings
    served: Served = request.app.state.registry.get(body.model)
    engine = served.runtime.engine
    width = engine.shape.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        message = f"dimensions must be at most {width}, the width of this model"
        raise ApiError(400, message, param="dimensions")
    prompts = await encoded(
        body.input,
        engine,
        param="input",
        add_special_tokens=body.add_special_tokens,
        keep=body.truncate_prompt_tokens,
    )
    work = _vectors(served, prompts, settings.pooling)
    vectors = await until_disconnect(request, work, None)
    tokens = sum(map(len, prompts))
    # A few thousand vectors are a second's work to write down.
    return await asyncio.to_thread(_answer, body, body.model or served.name, vectors, tokens)


async def _vectors(served: Served, prompts: list[list[int]], pooling: str) -> list[list[float]]:
    return [await served.runtime.embed(ids, pooling, served.adapter) for ids in prompts]


def _answer(body: EmbeddingRequest, name: str, vectors: list[list[float]], tokens: int) -> JSONResponse:
    data = []
    for index, whole in enumerate(vectors):
        vector = normalised(whole[: body.dimensions])
        value = as_base64(vector) if body.encoding_format == "base64" else vector
        data.append({"object": "embedding", "index": index, "embedding": value})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


def normalised(vector: list[float]) -> list[float]:
    """The vector brought to length 1; one of zeros stays as it is."""
    length = math.sqrt(math.fsum(x * x for x in vector))
    return [x / length for x in vector] if length else vector


def as_base64(vector: list[float]) -> str:
    """Little-endian float32 numbers, as OpenAI's clients read them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
