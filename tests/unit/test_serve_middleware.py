"""Who gets in, with what headers, and how large or slow a body may be."""

from __future__ import annotations

import asyncio
import logging

import pytest
from serve_support import ask, client, registry, server

from kllm.serve.app import create_app
from kllm.serve.body import json_object
from kllm.serve.errors import ApiError
from kllm.serve.middleware import digests
from kllm.serve.registry import Registry
from kllm.serve.settings import Settings

KEYS = {"keys": digests(["sk-one", "sk-two"])}
EVIL = {"Origin": "https://evil.example"}


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {key}"}


# ---- keys


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/nope", "/v1/models/base"]
)
def test_every_route_is_guarded(path: str) -> None:
    answer = ask("GET", path, settings=KEYS)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"] | {"message": ""} == {
        "message": "", "type": "authentication_error", "param": None, "code": "invalid_api_key",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["sk-one", "sk-two"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_key_opens(key: str, scheme: str) -> None:
    assert ask("GET", "/v1/models", settings=KEYS, headers=bearer(key, scheme)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        bearer("sk-On"), bearer("sk-one2"), bearer(""), bearer("sk-one sk-two"), bearer("sk-one", "Basic"),
        {"Authorization": "sk-one"}, {"Authorization": "Bearer"}, {"X-Api-Key": "sk-one"},
    ],
)  # fmt: skip
def test_nothing_else_opens(headers: dict[str, str]) -> None:
    answer = ask("GET", "/v1/models", settings=KEYS, headers=headers)
    assert answer.status_code == 401 and "sk-" not in answer.text


def test_two_authorization_headers_are_none() -> None:
    headers = [("Authorization", "Bearer sk-one"), ("Authorization", "Bearer sk-one")]
    assert ask("GET", "/v1/models", settings=KEYS, headers=headers).status_code == 401


def test_health_and_the_page_need_no_key() -> None:
    assert ask("GET", "/health", settings=KEYS).status_code == 200
    assert ask("GET", "/web/nope.js", settings=KEYS).status_code == 404
    assert ask("POST", "/web/render", settings=KEYS, json={}).status_code == 401


def test_metrics_can_be_public() -> None:
    assert ask("GET", "/metrics", settings={**KEYS, "metrics_public": True}).status_code == 200


def test_keys_are_in_no_repr() -> None:
    assert "sk-" not in repr(Settings(**KEYS)) and KEYS["keys"][0].hex() not in repr(Settings(**KEYS))
    assert repr(KEYS["keys"][0]) not in repr(Settings(**KEYS))


# ---- hosts and origins


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200), ("localhost", 200), ("localhost:1", 200), ("LOCALHOST.", 200), ("[::1]:8000", 200),
        ("a.localhost:8000", 200), ("127.9.9.9", 200), ("evil.example", 403), ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("10.0.0.5", 403), ("", 403),
    ],
)  # fmt: skip
def test_without_a_key_only_loopback_names(host: str, status: int) -> None:
    answer = ask("GET", "/v1/models", headers={"Host": host})
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "host_not_allowed"


def test_a_key_makes_the_host_unimportant() -> None:
    headers = {**bearer("sk-one"), "Host": "chat.example"}
    assert ask("GET", "/v1/models", settings=KEYS, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        ({"allowed_hosts": ("chat.example",)}, "chat.example:99", 200),
        ({"allowed_hosts": ("*",)}, "any.example", 200),
        ({"host": "box.lan"}, "box.lan:8000", 200),
        ({"host": "0.0.0.0"}, "192.168.1.5:8000", 200),
        ({"host": "0.0.0.0"}, "evil.example", 403),
    ],
)
def test_other_names_that_are_allowed(settings: dict, host: str, status: int) -> None:
    assert ask("GET", "/v1/models", settings=settings, headers={"Host": host}).status_code == status


def test_a_foreign_page_is_turned_away() -> None:
    answer = ask("GET", "/v1/models", headers=EVIL)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert ask("GET", "/v1/models", headers={"Origin": "null"}).status_code == 403


def test_the_own_page_may_call() -> None:
    headers = {"Origin": "http://127.0.0.1:8000"}
    assert ask("GET", "/v1/models", headers=headers).status_code == 200
    assert ask("GET", "/v1/models", headers={"Origin": "http://127.0.0.1:9"}).status_code == 403


def test_cors_is_exact() -> None:
    settings = {"cors": ("https://good.example",)}
    answer = ask("GET", "/v1/models", settings=settings, headers={"Origin": "https://good.example"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-credentials" not in answer.headers
    assert "origin" in answer.headers["vary"].lower()
    for origin in ("https://good.example.evil.example", "http://good.example", "https://evil.example"):
        answer = ask("GET", "/v1/models", settings=settings, headers={"Origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_cors_headers_stand_on_errors_too() -> None:
    settings = {"cors": ("https://good.example",), **KEYS}
    answer = ask("GET", "/v1/models", settings=settings, headers={"Origin": "https://good.example"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_a_star_allows_all_without_credentials() -> None:
    answer = ask("GET", "/v1/models", settings={"cors": ("*",)}, headers=EVIL)
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


def test_preflight() -> None:
    wanted = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os",
    }
    settings = {"cors": ("https://good.example",), **KEYS}
    good = {**wanted, "Origin": "https://good.example"}
    answer = ask("OPTIONS", "/v1/chat/completions", settings=settings, headers=good)
    assert answer.status_code == 204 and answer.content == b""
    assert answer.headers["access-control-allow-origin"] == "https://good.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    answer = ask("OPTIONS", "/v1/chat/completions", settings=settings, headers={**wanted, **EVIL})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


# ---- headers, errors, logs


def test_headers_of_every_answer() -> None:
    for path in ("/health", "/nope", "/v1/models"):
        headers = ask("GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-request-id"].startswith("req_")
        assert headers["cache-control"] == "no-store"


def test_a_callers_request_id_is_kept_if_plain() -> None:
    assert ask("GET", "/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("x" * 65, "a b", "é".encode("latin-1")):
        assert ask("GET", "/health", headers={"X-Request-Id": bad}).headers["x-request-id"].startswith("req_")


def test_unknown_routes_and_methods_are_json() -> None:
    answer = ask("GET", "/v1/nope")
    assert answer.status_code == 404
    assert (
        answer.json()["error"]["type"] == "invalid_request_error" and answer.json()["error"]["code"] is None
    )
    answer = ask("DELETE", "/v1/models")
    assert answer.status_code == 405 and "GET" in answer.headers["allow"]
    assert answer.json()["error"]["code"] is None
    assert ask("GET", "/v1/models/").status_code == 404


def crashing(error: Exception):
    app = server()

    @app.post("/crash")
    async def crash():
        raise error

    return app


def test_a_crash_is_a_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("kllm.serve").propagate = True
    answer = ask("POST", "/crash", app=crashing(RuntimeError("secret in /home/me/x.py")))
    assert answer.status_code == 500
    assert answer.json()["error"] | {"message": ""} == {
        "message": "", "type": "server_error", "param": None, "code": "internal_error",
    }  # fmt: skip
    assert "secret" not in answer.text and "home" not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"] in caplog.text and "Traceback" in caplog.text


def test_the_log_has_neither_keys_nor_queries(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("kllm.serve").propagate = True
    caplog.set_level(logging.INFO, "kllm.serve")
    ask("GET", "/v1/models?api_key=sk-one", settings=KEYS, headers=bearer("sk-one"))
    ask("GET", "/v1/models", settings=KEYS, headers=bearer("sk-wrong"))
    assert "/v1/models 200" in caplog.text and "/v1/models 401" in caplog.text
    assert "sk-" not in "".join(r.getMessage() for r in caplog.records if r.name == "kllm.serve")


# ---- states


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", "/v1/chat/completions"])
def test_while_loading(path: str) -> None:
    app = create_app(Registry(), Settings())
    answer = ask("GET", path, app=app)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
    assert int(answer.headers["retry-after"]) >= 1
    health = ask("GET", "/health", app=app)
    assert health.status_code == 503 and health.json()["status"] == "loading"
    assert ask("GET", "/version", app=app).status_code == 200


def test_while_draining() -> None:
    models = registry()
    app = create_app(models, Settings())
    models.drain()
    answer = ask("GET", "/v1/models", app=app)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
    assert answer.headers["connection"] == "close" and "retry-after" in answer.headers
    assert ask("GET", "/health", app=app).json()["status"] == "draining"


# ---- bodies


def reading(**settings):
    app = create_app(registry(), Settings(**settings))

    async def read(request):
        from starlette.responses import JSONResponse

        return JSONResponse({"size": len(str(await json_object(request)))})

    app.add_route("/read", read, methods=["POST"])
    return app


JSON = {"Content-Type": "application/json"}


async def chunks(sizes: list[int], pause: float = 0.0):
    for size in sizes:
        yield b"x" * size
        await asyncio.sleep(pause)


def test_a_large_body_is_413_by_its_length() -> None:
    answer = ask("POST", "/read", app=reading(max_body=1000), headers=JSON, content=b" " * 1001)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert (
        ask("POST", "/read", app=reading(max_body=1000), headers=JSON, content=b"{}" + b" " * 998).status_code
        == 200
    )


def test_a_large_chunked_body_is_413_while_it_comes() -> None:
    content = chunks([400, 400, 400])
    assert ask("POST", "/read", app=reading(max_body=1000), headers=JSON, content=content).status_code == 413


def test_an_absurd_length_is_413() -> None:
    headers = {**JSON, "Content-Length": "9" * 30}
    assert ask("POST", "/read", app=reading(), headers=headers, content=b"{}").status_code == 413


def scope(path: str = "/read") -> dict:
    return {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "server": ("localhost", 8000), "client": ("127.0.0.1", 5), "asgi": {"version": "3.0"},
    }  # fmt: skip


def test_a_slow_body_is_408() -> None:
    sent: list[dict] = []

    async def receive() -> dict:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(reading(body_timeout=0.2)(scope(), receive, send), 10))
    assert sent[0]["status"] == 408 and b"request_timeout" in sent[1]["body"]
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_client_that_leaves_is_not_answered() -> None:
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(reading()(scope(), receive, send))
    assert sent == []


def test_an_error_after_the_start_breaks_the_connection() -> None:
    from starlette.responses import StreamingResponse

    app = server()

    async def stream():
        yield b"half"
        raise ApiError(500, "late")

    @app.get("/stream")
    async def route():
        return StreamingResponse(stream())

    async def call():
        async with client(app) as c:
            return await c.get("/stream")

    with pytest.raises(Exception):  # noqa: B017
        sent: list[dict] = []

        async def run():
            async def receive():
                await asyncio.sleep(5)
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            await app({**scope("/stream"), "method": "GET"}, receive, send)

        asyncio.run(run())


@pytest.mark.parametrize("wanted", [True, False])
def test_prompts_are_logged_only_on_request(wanted: bool, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("kllm.serve").propagate = True
    caplog.set_level(logging.INFO, "kllm.serve")
    answer = ask(
        "POST", "/read", app=reading(log_requests=wanted), headers=JSON, content=b'{"p":\n "private"}'
    )
    assert answer.status_code == 200
    assert ("private" in caplog.text) == wanted
    assert sum(record.name == "kllm.serve" for record in caplog.records) == 1 + wanted
