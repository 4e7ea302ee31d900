"""Queue, time limits, clients that leave or stall, company, and a graceful end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serve_client import (
    CHAT,
    Server,
    chat_body,
    content_of,
    events,
    eventually,
    forced,
    http_post,
    narrow_server,
    read_all,
    refused,
    server,
)
from serve_model import encode, model_dir, token_id

ENDLESS = {"max_tokens": 30_000, "ignore_eos": True}


def endless(on: Server, **fields) -> socket.socket:
    """A stream that has begun and goes on as long as the context."""
    connection = on.open_stream(chat_body(**ENDLESS, **fields))
    assert connection.recv(100).split()[1] == b"200"
    return connection


# ------------------------------------------------------------------------------------------- queue, times


def test_full_queue_is_429():
    narrow = narrow_server()
    with endless(narrow), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(narrow.post, CHAT, chat_body(max_tokens=1))
        assert eventually(lambda: narrow.metric("num_requests_waiting") == 1)
        rejections = narrow.metric("admission_rejections_total")
        for fields in ({}, {"stream": True}):
            response = narrow.post(CHAT, chat_body(**fields))
            refused(response, 429, code="queue_full", type="rate_limit_error")
            assert int(response.headers["retry-after"]) >= 1
        assert narrow.metric("admission_rejections_total") == rejections + 2
    assert waiting.result().status_code in (200, 408, 503)
    assert eventually(narrow.idle)
    assert narrow.chat(max_tokens=1)


def test_n_counts_n_in_the_queue():
    narrow = narrow_server()
    with endless(narrow):
        refused(narrow.post(CHAT, chat_body(n=2)), 429, code="queue_full")
    assert eventually(narrow.idle)


def test_waiting_client_that_leaves_is_forgotten():
    narrow = narrow_server()
    with endless(narrow):
        waiting = narrow.raw(http_post(CHAT, json.dumps(chat_body()).encode()))
        assert eventually(lambda: narrow.metric("num_requests_waiting") == 1)
        waiting.close()
        assert eventually(lambda: narrow.metric("num_requests_waiting") == 0, 3)
    assert eventually(narrow.idle)


def test_time_limit_of_a_whole_answer_is_408():
    narrow_server()
    started = time.monotonic()
    response = narrow_server().post(CHAT, chat_body(**ENDLESS))
    refused(response, 408, code="request_timeout", type="timeout_error")
    assert 1.5 < time.monotonic() - started < 6
    assert eventually(narrow_server().idle)


def test_time_limit_of_a_stream_is_an_error_event():
    response = narrow_server().post(CHAT, chat_body(stream=True, **ENDLESS))
    assert response.status_code == 200
    chunks = events(response.content)
    assert set(chunks[-1]) == {"error"} and chunks[-1]["error"]["code"] == "request_timeout"
    assert not any(c["finish_reason"] for chunk in chunks[:-1] for c in chunk["choices"])
    assert eventually(narrow_server().idle)


def test_time_limit_of_waiting():
    narrow = narrow_server()
    with endless(narrow):
        response = narrow.post(CHAT, chat_body())
        assert response.status_code in (408, 503)
        refused(response, response.status_code)
    assert eventually(narrow.idle)


# ---------------------------------------------------------------------------------------- the other settings


def test_without_prefix_cache():
    for _ in range(2):
        usage = narrow_server().chat("a long and quite unique beginning " * 10, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_thinking_left_in_the_text():
    bias = {str(token_id("x")): 100}
    fields = {"max_tokens": 4, "logit_bias": bias, "chat_template_kwargs": {"enable_thinking": True}}
    message = narrow_server().chat(**fields)["choices"][0]["message"]
    assert message["content"].strip().removeprefix("<think>").strip() == "xxxx"
    assert not {"reasoning", "reasoning_content"} & set(message)
    assert narrow_server().stream_chat(**fields).message()["content"] == message["content"]


def test_prompts_are_logged_only_when_asked_for():
    for running, logged in ((server(), False), (narrow_server(), True)):
        running.chat("a rare wombat")
        assert eventually(lambda r=running, wanted=logged: ("rare wombat" in r.output()) is wanted, 2)


def test_template_of_a_request():
    template = "{{ messages[0].content }}{{ messages[0].content }}"
    usage = narrow_server().chat("x", chat_template=template)["usage"]
    assert usage["prompt_tokens"] == len(encode("xx"))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**7 }}",
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ unclosed",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_hostile_template_of_a_request(template):
    narrow = narrow_server()
    started = time.monotonic()
    response = narrow.post(CHAT, chat_body(chat_template=template))
    assert time.monotonic() - started < 10
    assert response.status_code != 200 or response.json()["usage"]["prompt_tokens"] < 100
    if response.status_code != 200:
        refused(response)
        assert "root:" not in response.text
    assert content_of(narrow.chat(max_tokens=1))


# ---------------------------------------------------------------------------------- clients that leave, stall


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_row(path, stream):
    narrow = narrow_server()
    body = {"prompt": "x", **chat_body(stream=stream, **ENDLESS)}
    connection = narrow.raw(http_post(path, json.dumps(body).encode()))
    assert eventually(lambda: narrow.metric("num_requests_running") == 1)
    connection.close()
    started = time.monotonic()
    assert eventually(narrow.idle, 1.5), "within a step, long before the time limit"
    assert time.monotonic() - started < 1.5


def test_disconnect_in_the_middle_of_a_long_prompt():
    request = http_post(CHAT, json.dumps(chat_body("word " * 1500, **ENDLESS)).encode())
    for delay in (0, 0.005, 0.02):
        connection = server().raw(request)
        time.sleep(delay)
        connection.close()
    assert eventually(server().idle) and content_of(server().chat())


def test_half_closed_client_still_gets_its_answer_or_is_freed():
    with server().raw(http_post(CHAT, json.dumps(chat_body()).encode())) as connection:
        connection.shutdown(socket.SHUT_WR)
        read_all(connection, 1)
    assert eventually(server().idle)


def test_stalled_readers_do_not_block_others():
    stalled = [
        server().open_stream(chat_body(max_tokens=1500, ignore_eos=True, logprobs=True, top_logprobs=20))
        for _ in range(4)
    ]
    try:
        started = time.monotonic()
        assert content_of(server().chat()) and time.monotonic() - started < 5
    finally:
        for connection in stalled:
            connection.close()
    assert eventually(server().idle)


def test_slow_reader_gets_everything():
    body = chat_body(max_tokens=300, temperature=1, seed=1, ignore_eos=True)
    whole = content_of(server().chat(**{k: v for k, v in body.items() if k != "messages"}))
    text = b""
    with server().client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        for piece in response.iter_raw(2000):
            text += piece
            time.sleep(0.005)
    parts = [c["delta"].get("content", "") for chunk in events(text) for c in chunk["choices"]]
    assert "".join(parts) == whole


@pytest.mark.slow
def test_reader_that_takes_nothing_is_cancelled():
    narrow = Server()
    body = chat_body(max_tokens=1900, ignore_eos=True, n=16, logprobs=True, top_logprobs=20)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", narrow.port))
    connection.sendall(http_post(CHAT, json.dumps({**body, "stream": True}).encode()))
    time.sleep(75)
    assert narrow.idle()
    connection.close()
    narrow.kill()


# ---------------------------------------------------------------------------------------------- company


def test_many_at_once():
    """Twice as many as run at a time: every one is served, in full, and right."""
    texts = [f"question {i % 8}" for i in range(160)]
    expected = {text: content_of(server().chat(text, max_tokens=4)) for text in set(texts)}
    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=server().url, timeout=60, limits=limits, trust_env=False) as client,
        ThreadPoolExecutor(32) as pool,
    ):
        answers = list(pool.map(lambda t: client.post(CHAT, json=chat_body(t, max_tokens=4)).json(), texts))
    assert [content_of(answer) for answer in answers] == [expected[text] for text in texts]
    assert eventually(server().idle)


def test_flood_is_refused_and_not_kept():
    """More choices than rows and queue hold: some are refused with 429, the others are served in full."""
    with ThreadPoolExecutor(30) as pool:
        jobs = [pool.submit(server().post, CHAT, chat_body(n=16, max_tokens=4)) for _ in range(30)]
        answers = [job.result() for job in jobs]
    assert {answer.status_code for answer in answers} <= {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            refused(answer, 429, code="queue_full")
        else:
            assert answer.json()["usage"]["completion_tokens"] == 64
    assert eventually(server().idle)


def test_short_request_beside_a_long_one_ends_first():
    order = []

    def run(name, tokens):
        server().chat(name, max_tokens=tokens, ignore_eos=True)
        order.append(name)

    long = threading.Thread(target=run, args=("long", 1200))
    long.start()
    assert eventually(lambda: server().metric("num_requests_running") == 1)
    run("short", 4)
    long.join()
    assert order == ["short", "long"]


def test_long_prompt_beside_a_stream():
    """Prefill comes in pieces: the stream goes on meanwhile, and its text is the same."""
    alone = content_of(server().chat(max_tokens=100, ignore_eos=True))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server().stream_chat, max_tokens=100, ignore_eos=True)
        server().chat("x " * (1600 // len(encode("x "))), max_tokens=2)
        assert running.result().message()["content"] == alone


def test_one_bad_request_among_many_disturbs_nobody():
    wanted = content_of(server().chat(max_tokens=60))

    def bad(i):
        bodies = [
            b"{",
            chat_body(n=99),
            chat_body(stop=5),
            chat_body(logit_bias={"9999999": 1}),
            chat_body(**forced("x", min_tokens=9)),
        ]
        return server().post(CHAT, bodies[i % len(bodies)]).status_code

    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(server().chat, max_tokens=60) for _ in range(6)]
        statuses = set(pool.map(bad, range(20)))
        assert {content_of(future.result()) for future in good} == {wanted}
    assert statuses <= {200, 400, 500}


@pytest.mark.slow
def test_silence_is_filled_with_comments():
    waiting = Server("--max-running", "1", models=(model_dir("silent", 32768),))
    with endless(waiting), waiting.open_stream(chat_body()) as connection:
        assert b": keep-alive\n\n" in read_all(connection, 15)
    waiting.kill()


# ------------------------------------------------------------------------------------------------ SIGTERM


@pytest.fixture(scope="module")
def ending():
    running = Server("--drain", "30")
    yield running
    running.kill()


def test_sigterm_lets_a_stream_end(ending):
    idle = ending.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 200 " in idle.recv(4096)
    connection = ending.open_stream(chat_body(max_tokens=1500, ignore_eos=True, temperature=1, seed=1))
    received = connection.recv(3000)
    ending.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    try:
        late = httpx.post(ending.url + CHAT, json=chat_body(), timeout=10, trust_env=False)
        refused(late, 503, code="draining", type="server_error")
        assert late.headers["connection"] == "close" and int(late.headers["retry-after"]) >= 1
        assert httpx.get(ending.url + "/health", trust_env=False).status_code == 503
    except httpx.TransportError:
        pass  # the port is closed already: as good
    received += read_all(connection, 20)
    text = received.decode("utf-8", "replace")
    assert '"finish_reason":"length"' in text.replace(" ", "") and "data: [DONE]" in text
    assert '"error"' not in text
    assert ending.process.wait(15) == 0
    idle.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", ending.port), timeout=2)
    assert "Traceback" not in ending.output()
