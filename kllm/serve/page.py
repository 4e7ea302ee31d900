"""The chat page: its files from memory, and the markdown of its messages.

Names are keys of a dict built once, never paths; nothing a request says reaches the file system. The
files need no key (they hold nothing), `/web/render` does.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import PurePath

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from kllm.serve.body import parsed
from kllm.serve.errors import ApiError
from kllm.serve.openapi import described

MAX_TEXTS = 200  # messages of one render request
MAX_CHARACTERS = 240_000  # of all its messages

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

router = APIRouter()


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent: plain and gzipped bytes, media type, entity tag."""

    plain: bytes
    gzipped: bytes
    media_type: str
    etag: str


class RenderRequest(BaseModel):
    """Markdown texts to turn into HTML that is safe to insert."""

    texts: list[str] = Field(max_length=MAX_TEXTS)


class RenderAnswer(BaseModel):
    """The HTML of each text, in the order asked."""

    html: list[str]


@lru_cache(maxsize=1)
def page_files() -> dict[str, PageFile]:
    """Name to file of everything the page consists of."""
    files = {}
    for entry in resources.files("kllm.serve").joinpath("web").iterdir():
        media_type = _TYPES.get(PurePath(entry.name).suffix)
        if media_type is not None:
            plain = entry.read_bytes()
            etag = f'W/"{hashlib.sha256(plain).hexdigest()[:16]}"'
            files[entry.name] = PageFile(plain, gzip.compress(plain, 9, mtime=0), media_type, etag)
    return files


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def index(request: Request) -> Response:
    return _answer(request, "index.html")


@router.api_route("/web/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def web_file(request: Request, name: str) -> Response:
    return _answer(request, name)


@router.post("/web/render", summary="Markdown to safe HTML", **described(RenderRequest, RenderAnswer))
async def web_render(request: Request) -> Response:
    """The HTML of messages, for the page; elements, attributes and addresses come from a short list."""
    body = await parsed(request, RenderRequest)
    if sum(map(len, body.texts)) > MAX_CHARACTERS:
        raise ApiError(413, f"more than {MAX_CHARACTERS:,} characters to render at once", param="texts")
    html = await asyncio.to_thread(_render, body.texts)
    return Response(
        RenderAnswer(html=html).model_dump_json(),
        media_type="application/json",
        headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
    )


def _render(texts: list[str]) -> list[str]:
    from kllm.serve.markdown import render  # Pygments and nh3: when first needed, off the event loop

    return [render(text) for text in texts]


def _answer(request: Request, name: str) -> Response:
    file = page_files().get(name)
    if file is None:
        raise ApiError(404, "no such page", code="not_found")
    headers = {**HEADERS, "ETag": file.etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    known = {tag.strip() for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {file.etag, file.etag.removeprefix("W/"), "*"}:
        return Response(status_code=304, headers=headers)
    if _takes_gzip(request.headers.get("accept-encoding", "")):
        headers["Content-Encoding"] = "gzip"
        return Response(file.gzipped, media_type=file.media_type, headers=headers)
    return Response(file.plain, media_type=file.media_type, headers=headers)


def _takes_gzip(accepted: str) -> bool:
    for entry in accepted.lower().split(","):
        coding, _, parameter = entry.replace(" ", "").partition(";")
        if coding in ("gzip", "*"):
            return parameter.removeprefix("q=").rstrip("0.") != "" or not parameter
    return False
