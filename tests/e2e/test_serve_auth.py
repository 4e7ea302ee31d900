"""Keys and origins."""

from __future__ import annotations

import pytest
from serve_client import CHAT, KEYS, ORIGIN, chat_body, locked_server, refused, server

GUARDED = [
    ("POST", CHAT),
    ("POST", "/v1/chat/completions/render"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/web/render"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/first"),
    ("GET", "/tokenizer_info"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
]
CREDENTIALS = {
    "none": {},
    "wrong": {"Authorization": "Bearer sk-wrong"},
    "empty": {"Authorization": "Bearer"},
    "no scheme": {"Authorization": KEYS[0]},
    "basic": {"Authorization": f"Basic {KEYS[0]}"},
    "shorter": {"Authorization": f"Bearer {KEYS[0][:-1]}"},
    "longer": {"Authorization": f"Bearer {KEYS[0]}x"},
    "upper case": {"Authorization": f"Bearer {KEYS[0].upper()}"},
    "both": {"Authorization": f"Bearer {KEYS[0]}, Bearer {KEYS[1]}"},
    "file's text": {"Authorization": f"Bearer {KEYS[1]}\\n{KEYS[2]}"},
    "not ascii": {"Authorization": "Bearer schlüssel"},
    "long": {"Authorization": "Bearer " + "x" * 5000},
}


def request(method, path, headers):
    plain = path in ("/tokenize", "/v1/completions")
    question = b'"prompt": "x"' if plain else b'"messages": [{"role": "user", "content": "x"}]'
    body = b'{%s, "input": "x", "tokens": [1], "max_tokens": 1}' % question
    encoded = [(k.encode(), v.encode("utf-8")) for k, v in headers.items()]
    kind = [(b"Content-Type", b"application/json")] if method == "POST" else []
    content = body if method == "POST" else None
    return locked_server().client.request(method, path, content=content, headers=[*encoded, *kind])


def unauthorized(response):
    refused(response, 401, code="invalid_api_key", type="authentication_error")
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert not any(key in response.text for key in KEYS)


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_every_route_needs_a_key(method, path):
    unauthorized(request(method, path, {}))
    unauthorized(request(method, path, CREDENTIALS["wrong"]))


@pytest.mark.parametrize("name", CREDENTIALS)
def test_wrong_credentials(name):
    unauthorized(request("POST", CHAT, CREDENTIALS[name]))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_works(key):
    """From --api-key, two lines of --api-key-file and KLLM_API_KEY."""
    assert request("POST", CHAT, {"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_scheme_is_case_insensitive(scheme):
    assert request("GET", "/v1/models", {"Authorization": f"{scheme} {KEYS[0]}"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), [pair for pair in GUARDED if pair[1] not in ("/v1/responses", "/web/render")]
)
def test_every_route_works_with_a_key(method, path):
    assert request(method, path, {"Authorization": f"Bearer {KEYS[0]}"}).status_code == 200


def test_health_and_the_page_need_none():
    for path in ("/health", "/"):
        assert request("GET", path, {}).status_code == 200


def test_the_key_comes_before_the_body():
    for body in (b"{", b"x" * 50_000):
        response = locked_server().client.post(
            CHAT, content=body, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (401, 413)
        refused(response, response.status_code)


def test_keys_stay_secret():
    for path in ("/version", "/v1/models", "/metrics", "/health", "/openapi.json", "/tokenizer_info"):
        assert not any(key in locked_server().get(path).text for key in KEYS)
    request("POST", CHAT, CREDENTIALS["shorter"])
    assert not any(key in locked_server().output() for key in KEYS)
    assert KEYS[0][:-1] not in locked_server().output()


def test_any_host_with_a_key():
    assert locked_server().get("/v1/models", Host="models.example.org").status_code == 200


def test_default_server_needs_no_key_and_ignores_one():
    assert server().get("/v1/models", Authorization="Bearer anything").status_code == 200


# ------------------------------------------------------------------------------------------------- CORS


def preflight(origin, path=CHAT):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    return locked_server().client.options(path, headers=headers)


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/completions"])
def test_preflight_of_the_allowed_origin(path):
    response = preflight(ORIGIN, path)
    assert response.status_code in (200, 204)
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in response.headers["access-control-allow-methods"]
    allowed = response.headers["access-control-allow-headers"].lower()
    assert "authorization" in allowed and "content-type" in allowed


OTHERS = [
    "https://evil.example",
    ORIGIN + ".evil.example",
    ORIGIN.replace("https", "http"),
    ORIGIN + ":8443",
    "null",
]


@pytest.mark.parametrize("origin", OTHERS)
def test_preflight_of_others(origin):
    assert "access-control-allow-origin" not in preflight(origin).headers


@pytest.mark.parametrize("origin", OTHERS)
def test_requests_of_others(origin):
    response = locked_server().post(CHAT, chat_body(), {"Origin": origin})
    assert response.status_code == 403 and "access-control-allow-origin" not in response.headers


def test_request_of_the_allowed_origin():
    response = locked_server().post(CHAT, chat_body(), {"Origin": ORIGIN})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "origin" in response.headers["vary"].lower()


def test_refusals_reach_the_allowed_origin():
    """Without the header a browser shows the page no error at all."""
    for response in (
        locked_server().post(CHAT, chat_body(temperature=9), {"Origin": ORIGIN}),
        locked_server().client.post(
            CHAT, content=b"{}", headers={"Origin": ORIGIN, "Content-Type": "application/json"}
        ),
    ):
        assert response.status_code in (400, 401)
        assert response.headers["access-control-allow-origin"] == ORIGIN


def test_stream_of_the_allowed_origin():
    response = locked_server().post(CHAT, chat_body(stream=True), {"Origin": ORIGIN})
    assert response.headers["access-control-allow-origin"] == ORIGIN and b"[DONE]" in response.content
