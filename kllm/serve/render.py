"""POST /v1/chat/completions/render: the prompt that a chat request becomes, without an answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from kllm.serve.body import parsed
from kllm.serve.fields import Text
from kllm.serve.openapi import described
from kllm.serve.prompt import Prompt, rendered
from kllm.serve.servertools import ServerToolFields

if TYPE_CHECKING:
    from kllm.serve.registry import Served

router = APIRouter()


class RenderRequest(ServerToolFields):
    """A chat request; what concerns sampling is ignored."""

    model: Text | None = Field(None, description="A name from /v1/models; the first one if absent.")


class RenderAnswer(BaseModel):
    """The prompt as text, control tokens spelt out, and as tokens.

    `tokens` are the vocabulary's texts of `token_ids`; `thinking` tells whether the answer begins inside a
    think block.
    """

    model: str
    prompt: str
    token_ids: list[int]
    tokens: list[str]
    count: int
    max_model_len: int
    thinking: bool


@router.post("/v1/chat/completions/render", **described(RenderRequest, RenderAnswer))
async def render(request: Request) -> Any:
    """What the model would read."""
    body = await parsed(request, RenderRequest)
    state = request.app.state
    served = state.registry.get(body.model)
    prompt = await rendered(state.tools.added_to(body), served.runtime, state.settings)
    return await asyncio.to_thread(_answer, body, served, prompt)


def _answer(body: RenderRequest, served: Served, prompt: Prompt) -> JSONResponse:
    tokenizer = served.runtime.tokenizer
    assert tokenizer is not None  # it rendered the prompt
    return JSONResponse(
        {
            "model": body.model or served.name,
            "prompt": prompt.text(tokenizer),
            "token_ids": prompt.ids,
            "tokens": [tokenizer.decode([i], skip_special_tokens=False) for i in prompt.ids],
            "count": len(prompt.ids),
            "max_model_len": served.max_model_len,
            "thinking": prompt.thinking,
        }
    )
