"""The page's files: from a fixed list, with strict headers, whole in themselves; and /web/render."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("nh3")
pytest.importorskip("httpx")
from fastapi.testclient import TestClient
from serve_page_support import Fake, fake_app

from kllm.serve.markdown import MAX_TEXT
from kllm.serve.page import CONTENT_POLICY, page_files

FILES = {name: file.plain.decode() for name, file in page_files().items()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(fake_app(Fake())) as client:
        yield client


def test_the_page_and_its_headers(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == CONTENT_POLICY
    assert "unsafe" not in CONTENT_POLICY and CONTENT_POLICY.startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert "permissions-policy" in answer.headers
    assert client.head("/").content == b"" and client.head("/").headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_each_file_comes_plain_gzipped_or_not_at_all(client: TestClient, name: str) -> None:
    plain = client.get(f"/web/{name}", headers={"Accept-Encoding": "identity"})
    assert plain.text == FILES[name] and "content-encoding" not in plain.headers
    packed = client.get(f"/web/{name}", headers={"Accept-Encoding": "br;q=1.0, gzip;q=0.8"})
    assert packed.headers["content-encoding"] == "gzip" and packed.text == FILES[name]
    assert packed.headers["vary"] == "Accept-Encoding"
    refused = client.get(f"/web/{name}", headers={"Accept-Encoding": "gzip;q=0"})
    assert "content-encoding" not in refused.headers
    again = client.get(f"/web/{name}", headers={"If-None-Match": f'"x", {plain.headers["etag"]}'})
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize(
    "path",
    [
        "/web/",
        "/web/none.js",
        "/web/..%2fpage.py",
        "/web/%2e%2e/page.py",
        "/web//etc/passwd",
        "/web/a/b",
        "/web/%00",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_is_whole_and_alone() -> None:
    index = FILES["index.html"]
    wanted = set(re.findall(r'(?:src|href)="([^"#]+)"', index))
    for text in SCRIPTS.values():
        wanted |= {f"web/{name}" for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert wanted == {f"web/{name}" for name in FILES if name != "index.html"}
    modules = {name for name in SCRIPTS if name not in ("theme.js", "app.js")}
    assert set(re.findall(r'modulepreload" href="web/([\w.]+)"', index)) == modules
    for text in FILES.values():
        foreign = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
        assert not foreign
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", index)  # the policy forbids them
    used = set(re.findall(r'href="#i-(\w+)"', index))
    for text in SCRIPTS.values():
        used |= set(re.findall(r'(?:icon|iconButton)\("(\w+)"', text))
    used |= set(re.findall(r'icon\(running \? "(\w+)" : "(\w+)"\)', SCRIPTS["app.js"])[0])
    assert used == set(re.findall(r'<symbol id="i-(\w+)"', index))


def test_markup_is_inserted_in_one_place_only() -> None:
    for name, text in SCRIPTS.items():
        count = len(
            re.findall(
                r"innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|\beval\(|new Function", text
            )
        )
        assert count == (1 if name == "markup.js" else 0), name


def test_the_page_knows_how_much_is_rendered() -> None:
    assert f"MAX_MARKDOWN = {MAX_TEXT:_};" in SCRIPTS["api.js"]


def test_small_enough() -> None:
    assert sum(len(file.gzipped) for file in page_files().values()) < 60_000
    for file in page_files().values():
        assert gzip.decompress(file.gzipped) == file.plain


def test_every_word_is_there_in_both_languages() -> None:
    text = FILES["i18n.js"]
    english, chinese = (
        set(re.findall(r"(?:^\s+|, )(\w+): \"", part, re.MULTILINE)) for part in text.split("  zh: {")
    )
    assert english == chinese and len(english) > 100
    used = set(re.findall(r'data-i18n(?:-\w+)?="(\w+)"', FILES["index.html"]))
    for script in SCRIPTS.values():
        used |= set(re.findall(r'\bt\("(\w+)"', script))
    assert used <= english, used - english


def test_rendering(client: TestClient) -> None:
    answer = client.post("/web/render", json={"texts": ["**a**", "$x$", "<script>x</script>"]})
    first, second, third = answer.json()["html"]
    assert first == "<p><strong>a</strong></p>\n" and "<math" in second and "<script" not in third
    assert answer.headers["cache-control"] == "no-store"
    assert client.post("/web/render", json={"texts": []}).json() == {"html": []}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"texts": "a"}, 400),
        ({"texts": [1]}, 400),
        ({"texts": ["a"] * 300}, 400),
        ({"texts": ["a" * 500_000]}, 413),
    ],
)
def test_rendering_refuses(client: TestClient, body: object, status: int) -> None:
    answer = client.post("/web/render", json=body)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_rendering_wants_the_key() -> None:
    with TestClient(fake_app(Fake(key="k"))) as client:
        assert client.post("/web/render", json={"texts": ["a"]}).status_code == 401
        assert client.get("/").status_code == 200
