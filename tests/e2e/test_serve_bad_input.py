"""Bodies that no honest client sends: the server refuses each with its own form and lives on."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import urllib.error
import urllib.request

import pytest
from serve_client import CHAT, chat_body, content_of, http_post, locked_server, read_all, refused, server

ROUTES = [
    CHAT,
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/v1/chat/completions/render",
]
MESSAGE = b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "max_tokens": 2'

NOT_JSON = {
    "empty": b"",
    "blank": b"  \n",
    "cut": b"{",
    "cut string": b'{"prompt": "x',
    "word": b"hello",
    "single quotes": b"{'prompt': 'x'}",
    "trailing comma": b'{"prompt": "x",}',
    "trailing garbage": MESSAGE + b"} x",
    "two objects": b"{} {}",
    "comment": b'{"prompt": "x" /* hi */}',
    "NaN": MESSAGE + b', "temperature": NaN}',
    "Infinity": MESSAGE + b', "top_p": Infinity}',
    "-Infinity": MESSAGE + b', "x": -Infinity}',
    "duplicate key": MESSAGE + b', "max_tokens": 3}',
    "duplicate key deep": MESSAGE + b', "metadata": {"a": 1, "a": 2}}',
    "bad utf-8": b'{"prompt": "\xff\xfe"}',
    "cut utf-8": '{"prompt": "é"}'.encode()[:-3],
    "overlong utf-8": b'{"prompt": "\xc0\xaf"}',
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "raw control character": b'{"prompt": "a\x01b"}',
    "brackets": b"[" * 100_000,
    "closed brackets": b"[" * 100_000 + b"]" * 100_000,
    "braces": b'{"a":' * 100_000,
    "deep value": MESSAGE + b', "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "huge integer": MESSAGE + b', "seed": ' + b"9" * 10_000 + b"}",
    "form": b"prompt=x&max_tokens=2",
    "null bytes": b"\x00" * 64,
}
NOT_AN_OBJECT = [b"[]", b"null", b"true", b"5", b'"text"', b"[{}]", b"1e5"]


@pytest.mark.parametrize("name", NOT_JSON)
@pytest.mark.parametrize("path", ROUTES)
def test_what_is_not_json(path, name):
    server()
    started = time.monotonic()
    error = refused(server().post(path, NOT_JSON[name]))
    assert error["code"] in ("invalid_json", None)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["empty", "cut", "word", "trailing garbage", "NaN", "bad utf-8", "brackets"])
def test_code_of_what_is_not_json(name):
    refused(server().post(CHAT, NOT_JSON[name]), code="invalid_json", type="invalid_request_error")


@pytest.mark.parametrize("body", NOT_AN_OBJECT)
@pytest.mark.parametrize("path", ROUTES)
def test_what_is_not_an_object(path, body):
    refused(server().post(path, body))


@pytest.mark.parametrize("path", ROUTES)
def test_empty_object(path):
    refused(server().post(path, {}))


@pytest.mark.parametrize("escape", [b"\\ud800", b"\\udfff", b"a\\ud83db", b"\\ude00\\ud83d"])
@pytest.mark.parametrize("path", ROUTES[:4])
def test_lone_surrogates_are_replaced_or_refused(path, escape):
    text = b'"' + escape + b'"'
    body = b'{"messages": [{"role": "user", "content": %s}], "prompt": %s, "input": %s, "max_tokens": 2}'
    if path == "/tokenize":
        body = b'{"prompt": %s}' % text
    else:
        body = body.replace(b"%s", text)
    response = server().post(path, body)
    if response.status_code != 200:
        refused(response)


@pytest.mark.parametrize("field", ["model", "user", "stop", "seed"])
def test_lone_surrogates_elsewhere(field):
    response = server().post(CHAT, MESSAGE + b', "%s": "\\ud800"}' % field.encode())
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        refused(response, response.status_code)


@pytest.mark.parametrize(
    "text", ["\x00", "a\x00b", "\u2028", "\ufeff", "\ufffe", "\x7f\x1b[31m", "\U0010ffff"]
)
def test_strange_characters_are_text(text):
    assert isinstance(content_of(server().chat(text, max_tokens=2)), str)


@pytest.mark.parametrize("value", [2**63, 2**64, 10**30, 10**300, -(2**63) - 1, 1e308])
@pytest.mark.parametrize(
    "field", ["max_tokens", "seed", "n", "top_k", "min_tokens", "top_logprobs", "temperature"]
)
def test_huge_numbers(field, value):
    body = chat_body(**{field: value, "stop": ["e", "a", " "]})
    server()
    started = time.monotonic()
    response = server().post(CHAT, body)
    assert response.status_code in (200, 400) and time.monotonic() - started < 10
    if response.status_code == 400:
        refused(response)


def test_many_members():
    body = {**chat_body(), **{f"x{i}": i for i in range(20_000)}}
    assert server().post(CHAT, body).status_code in (200, 400)


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "application/jsonp",
        "json",
        "text/plain; application/json",
    ],
)
@pytest.mark.parametrize("path", ROUTES[:4])
def test_only_json_is_taken(path, kind):
    body = json.dumps({**chat_body(), "prompt": "x", "input": "x"}).encode()
    refused(server().post(path, body, {"Content-Type": kind}), 415, code=None)


def test_body_without_a_content_type():
    body = json.dumps(chat_body()).encode()
    request = http_post(CHAT, body).replace(b"Content-Type: application/json\r\n", b"")
    assert server().raw_answer(request).split()[1] == b"415"


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8"]
)
def test_spellings_of_json(kind):
    assert server().post(CHAT, json.dumps(chat_body()).encode(), {"Content-Type": kind}).status_code == 200


def test_compressed_body_is_refused():
    import gzip

    data = gzip.compress(json.dumps(chat_body()).encode())
    response = server().post(CHAT, data, {"Content-Encoding": "gzip"})
    assert response.status_code in (400, 415)
    refused(response, response.status_code)


def test_messages_echo_little():
    for field in ("model", "tool_choice", "temperature", "response_format"):
        response = server().post(CHAT, chat_body(**{field: "A" * 20_000}))
        assert response.json()["error"]["message"].count("A") <= 205


def test_param_is_a_path():
    body = chat_body(
        messages=[
            {"role": "user", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": 5}]},
        ]
    )
    assert refused(server().post(CHAT, body))["param"].startswith("messages[1].content")


# ------------------------------------------------------------------------------------------------- size


def test_body_over_the_limit():
    refused(server().post(CHAT, chat_body("x" * (2 * 1024 * 1024))), 413, code="request_too_large")


@pytest.mark.parametrize("size", [4, 32])
def test_body_over_the_limit_for_a_client_that_sends_first(size):
    """It sees the refusal too, not a reset connection."""
    url, body = server().url + CHAT, b"x" * (size * 1024 * 1024)
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 413 and b"request_too_large" in caught.value.read()


def test_body_just_under_the_limit_is_read():
    assert server().post("/v1/embeddings", {"input": "x", "y": "z" * 2_000_000}).status_code == 200


def test_announced_length_over_the_limit_is_refused_unread():
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999999999\r\n\r\n"
    with server().raw(head.encode()) as connection:
        assert read_all(connection, 2).split()[1] == b"413"


def test_chunked_body_over_the_limit():
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server().raw(head.encode()) as connection:
        answer = b""
        try:
            for _ in range(60):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        except OSError:
            pass
        answer = read_all(connection, 2)
    assert answer.split()[1] == b"413", answer[:200]


def test_chunked_body_that_fits():
    body = json.dumps(chat_body()).encode()
    response = server().client.post(
        CHAT, content=iter([body[:10], body[10:]]), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/v1/completions"])
def test_size_is_a_setting_and_for_every_route(path):
    body = {"input": "x", "prompt": "x", "max_tokens": 1, "pad": "y" * 20_000}
    refused(locked_server().post(path, body), 413, code="request_too_large")
    assert locked_server().post(path, {**body, "pad": "y" * 10_000}).status_code == 200


# ------------------------------------------------------------------------------------------- the protocol


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00",
        b"GET\r\n\r\n",
        b"GARBAGE " * 500 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_broken_http(data):
    connection = socket.create_connection(("127.0.0.1", server().port), timeout=5)
    with connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        answer = read_all(connection, 0.3)
    assert b" 500 " not in answer[:20] and b"Traceback" not in answer
    assert server().alive


def test_client_that_leaves_while_sending():
    request = http_post(CHAT, json.dumps(chat_body()).encode())
    for cut in (1, 20, len(request) // 2, len(request) - 1):
        server().raw(request[:cut]).close()
    assert server().alive and content_of(server().chat())


def test_held_sockets_do_not_block_others():
    held = [server().raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n") for _ in range(60)]
    try:
        started = time.monotonic()
        assert content_of(server().chat()) and time.monotonic() - started < 5
    finally:
        for connection in held:
            connection.close()


@pytest.mark.slow
def test_slow_bodies_are_cut_off():
    """A body that never comes does not hold its connection for ever."""
    request = http_post(CHAT, b"x" * 1000)[:-900]
    with server().raw(request) as connection:
        assert read_all(connection, 25) is not None
        connection.settimeout(1)
        assert connection.recv(10) == b""


# ------------------------------------------------------------------------------------------------ origin


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1"],
)
def test_foreign_host_without_a_key(host):
    for path in ("/v1/models", "/"):
        refused(server().get(path, Host=host), 403)
    refused(server().post(CHAT, chat_body(), {"Host": host}), 403)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST:{port}", "127.0.0.1:{port}"])
def test_loopback_hosts(host):
    assert server().get("/v1/models", Host=host.format(port=server().port)).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1:1"]
)
def test_foreign_origin(origin):
    response = server().post(CHAT, chat_body(), {"Origin": origin})
    refused(response, 403)
    assert "access-control-allow-origin" not in response.headers


def test_own_origin():
    response = server().post(CHAT, chat_body(), {"Origin": server().url})
    assert response.status_code == 200


def test_no_cors_by_default():
    response = server().client.options(
        CHAT, headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert not any(name.startswith("access-control-allow") for name in response.headers)
    assert not any(name.startswith("access-control") for name in server().get("/v1/models").headers)


def test_the_server_is_alive_after_all_this():
    assert server().alive and content_of(server().chat())
    assert server().idle()
