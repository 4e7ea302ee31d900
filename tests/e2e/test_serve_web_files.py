"""The chat page from outside, without a browser: files, headers, paths."""

from __future__ import annotations

import gzip
import re
from urllib.parse import urljoin

import pytest
from serve_client import server

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "font-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


def test_page_is_html():
    response = server().get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert re.match(r"(?i)<!doctype html>", response.text)
    assert 'name="viewport"' in response.text


@pytest.mark.parametrize("name", POLICY)
def test_page_policy(name):
    policy = server().get("/").headers["content-security-policy"]
    rules = dict((*rule.strip().split(" ", 1), "")[:2] for rule in policy.split(";") if rule.strip())
    assert rules[name].strip() == POLICY[name]
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
    ],
)
def test_page_headers(header, value):
    assert server().get("/").headers[header] == value


def test_page_permissions_policy():
    assert "permissions-policy" in server().get("/").headers


def page_files() -> dict[str, bytes]:
    """Every file the page loads, by path: those in the HTML and those the scripts import."""
    found: dict[str, bytes] = {}
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        response = server().get(path)
        assert response.status_code == 200, path
        assert response.headers["x-content-type-options"] == "nosniff"
        found[path] = response.content
        kind = response.headers["content-type"].split(";")[0]
        if kind == "text/html":
            names = re.findall(r"""(?:src|href)=["']([^"'#]+)["']""", response.text)
        elif "javascript" in kind:
            names = re.findall(r"""(?:from|import)\s*\(?["']([^"']+\.js)["']""", response.text)
        else:
            names = re.findall(r"""url\(["']?([^"')]+)""", response.text) if kind == "text/css" else []
        for name in names:
            assert not re.match(r"(https?:)?//", name), f"{path} loads {name}"
            url = urljoin(path, name)
            if not url.startswith("data:") and url not in found and url not in waiting:
                waiting.append(url)
    return found


def test_page_loads_only_its_own_files():
    files = page_files()
    assert any(path.endswith(".js") for path in files) and any(path.endswith(".css") for path in files)
    assert b"onclick=" not in files["/"] and b"<script>" not in files["/"] and b"style=" not in files["/"]


def test_page_is_small():
    assert sum(len(gzip.compress(data)) for data in page_files().values()) < 200_000


def test_page_files_have_tags():
    path = next(path for path in page_files() if path.endswith(".js"))
    response = server().get(path)
    tag = response.headers["etag"]
    assert server().get(path, **{"If-None-Match": tag}).status_code == 304


PATHS = [
    "/web/../../../../../../etc/passwd",
    "/web/..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/web/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/web/....//....//etc/passwd",
    "/web//etc/passwd",
    "/web/..\\..\\..\\etc\\passwd",
    "/web/%5c..%5c..%5cetc/passwd",
    "/../../etc/passwd",
    "//etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/web/..%252f..%252fetc%252fpasswd",
    "/web/%c0%ae%c0%ae/etc/passwd",
    "/web/app.js%00.html",
    "/web/../../serve/app.py",
    "/static/../config.json",
    "/v1/models/../../../../etc/passwd",
    "/v1/models/%2e%2e%2f%2e%2e%2fconfig.json",
    "/web/__init__.py",
    "/web/",
]


@pytest.mark.parametrize("path", PATHS)
def test_page_paths_cannot_climb(path):
    """By a raw socket: clients normalise such paths away."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    answer = server().raw_answer(request.encode())
    status = int(answer.split(b" ", 2)[1])
    assert status in (400, 404), answer[:300]
    for leak in (b"root:", b"hidden_size", b"import ", b"Traceback"):
        assert leak not in answer


def test_rendered_markdown_is_sanitised():
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>[x](javascript:alert(3)) **bold** `code`"
    response = server().post("/web/render", {"texts": [hostile]})
    assert response.status_code == 200
    html = response.text
    assert "bold" in html and "<script" not in html and "<img" not in html
    assert not re.search(r"""href=\\?["']javascript""", html)
