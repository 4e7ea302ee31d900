"""/tokenize, /detokenize and /tokenizer_info, in the shapes that vLLM gave them and lm_eval reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, FailFast, Field
from starlette.responses import JSONResponse

from kllm.serve.body import parsed
from kllm.serve.errors import ApiError
from kllm.serve.fields import Fields, Flag, Integer, Text
from kllm.serve.inputs import check_ids, tokenizer_of
from kllm.serve.openapi import described
from kllm.serve.prompt import Messages, rendered
from kllm.serve.servertools import ServerToolFields
from kllm.serve.worker import TookTooLong, limited

if TYPE_CHECKING:
    from kllm.serve.registry import Served
    from kllm.tokenizer.tokenizer import Tokenizer

_SECONDS = 10.0  # of work; the largest body that is allowed takes one or two

router = APIRouter()


class TokenizeRequest(ServerToolFields):
    """A text, or messages to be put into the chat template, to be cut into tokens."""

    model: Text | None = Field(None, description="A name from /v1/models; the first one if absent.")
    prompt: Text | None = Field(None, description="Control tokens that it spells out are read as such.")
    messages: Messages | None = None  # type: ignore[assignment]  # one of the two is there
    add_special_tokens: Flag = Field(True, description="For a prompt: add the tokenizer's own (BOS).")
    return_token_strs: Flag = False


class TokenizeAnswer(BaseModel):
    """The tokens; `token_strs` are the vocabulary's entries for them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Fields):
    """Tokens to be turned into text."""

    model: Text | None = Field(None, description="A name from /v1/models; the first one if absent.")
    tokens: Annotated[list[Annotated[Integer, Field(ge=0)]], FailFast()]


class DetokenizeAnswer(BaseModel):
    """The text, control tokens spelt out."""

    prompt: str


@router.post("/tokenize", **described(TokenizeRequest, TokenizeAnswer))
async def tokenize(request: Request) -> Any:
    """The tokens of a prompt or of messages."""
    body = await parsed(request, TokenizeRequest)
    served: Served = request.app.state.registry.get(body.model)
    tokenizer = tokenizer_of(served.runtime.engine)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    ids = None
    if body.prompt is None:
        state = request.app.state
        ids = (await rendered(state.tools.added_to(body), served.runtime, state.settings)).ids
    try:
        return await limited(_SECONDS, _answer, body, tokenizer, ids, served.max_model_len)
    except TookTooLong:
        raise ApiError(400, "the prompt takes too long to tokenise", param="prompt") from None


def _answer(body: TokenizeRequest, tokenizer: Tokenizer, ids: list[int] | None, context: int) -> JSONResponse:
    """The answer for the prompt, or for the messages' `ids`."""
    if ids is None:
        ids = tokenizer.encode_raw(body.prompt or "", add_special_tokens=body.add_special_tokens)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": context, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.id_to_token(i) or "" for i in ids]
    return JSONResponse(answer)


@router.post("/detokenize", **described(DetokenizeRequest, DetokenizeAnswer))
async def detokenize(request: Request) -> Any:
    """The text of tokens."""
    body = await parsed(request, DetokenizeRequest)
    served: Served = request.app.state.registry.get(body.model)
    tokenizer = tokenizer_of(served.runtime.engine)
    check_ids(body.tokens, served.runtime.engine, param="tokens")
    text = await limited(_SECONDS, tokenizer.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})


@router.get("/tokenizer_info", **described())
async def tokenizer_info(request: Request) -> Any:
    """What tokenizer_config.json says, the chat template included; `?model=` picks another than the first."""
    served: Served = request.app.state.registry.get(request.query_params.get("model"))
    return JSONResponse(info(served))


def info(served: Served) -> dict[str, Any]:
    """The answer of /tokenizer_info."""
    tokenizer = tokenizer_of(served.runtime.engine)
    roles = tokenizer.role_tokens
    special = set(tokenizer.special_tokens.values())
    encoder = served.runtime.encoder
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: roles.get(role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "additional_special_tokens": [t for t in tokenizer.special_tokens if t not in roles.values()],
        "added_tokens_decoder": {
            str(i): {"content": text, "special": i in special} for text, i in tokenizer.added_tokens.items()
        },
        "add_bos_token": tokenizer.adds_bos,
        "clean_up_tokenization_spaces": False,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": served.max_model_len,
        "chat_template": tokenizer.chat_template if encoder is None else encoder.template,
    }
