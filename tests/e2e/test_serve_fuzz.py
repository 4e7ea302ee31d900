"""Random bodies: bytes, almost-JSON, and what schemathesis makes of /openapi.json.

Whatever comes, the server answers in five seconds, never with a 5xx, keeps no memory and lives on.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest
from serve_client import Server, chat_body, content_of, eventually, refused, server

PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/v1/chat/completions/render",
    "/v1/responses",
]
FIELDS = [
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "structured_outputs",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
    "prompt",
    "echo",
    "suffix",
    "best_of",
    "input",
    "encoding_format",
    "dimensions",
    "tokens",
    "add_special_tokens",
    "return_token_strs",
    "truncate_prompt_tokens",
    "cache_salt",
    "instructions",
    "max_output_tokens",
    "text",
    "store",
]
ATOMS = [
    *[
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        16,
        17,
        0.5,
        2.5,
        -0.0,
        1e300,
        2**31,
        2**63,
        2**64,
        10**40,
        6399,
        6400,
    ],
    *[
        "",
        "x",
        "auto",
        "required",
        "none",
        "\ud800",
        "\x00",
        "<|im_end|>",
        "<think>",
        "囍🤖",
        "a" * 400,
        "(",
        "[z-a]",
    ],
    *[
        "user",
        "system",
        "tool",
        "assistant",
        "function",
        "json_object",
        "json_schema",
        "text",
        "tiny",
        "../x",
    ],
]
STOPS = ["a", "e", "t", "i", " ", "\n"]
KEYS = ["role", "content", "type", "text", "name", "function", "parameters", "schema", "json_schema", "regex", "choice",
        "grammar", "json", "tool_calls", "arguments", "id", "tool_call_id", "5", "-1", "x", "include_usage",
        "properties", "items", "enum", "$ref", "enable_thinking"]  # fmt: skip


def value(rng: random.Random, depth: int = 0):
    kind = rng.random()
    if depth > 3 or kind < 0.6:
        return rng.choice(ATOMS)
    if kind < 0.8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def valid(rng: random.Random, path: str) -> dict:
    text = "".join(rng.choice("ab é猫🤖<|\n") for _ in range(rng.randrange(30))) or "x"
    return {
        "/v1/embeddings": {"input": text},
        "/tokenize": {"prompt": text},
        "/detokenize": {"tokens": [rng.randrange(400) for _ in range(rng.randrange(9))]},
        "/v1/completions": {"prompt": text, "max_tokens": 2, "stop": STOPS},
        "/v1/responses": {"input": text, "max_output_tokens": 2},
    }.get(path, chat_body(text, max_tokens=2, stop=STOPS))


def request(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body: a valid one, with some fields replaced, or with some bytes broken."""
    path = rng.choice(PATHS)
    body = valid(rng, path)
    if rng.random() < 0.75:
        for _ in range(rng.randrange(1, 4)):
            body[rng.choice(FIELDS)] = value(rng)
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if (
                isinstance(body.get(name), int | float) and body[name] > 20
            ):  # generating for seconds is no fault
                body["stop"] = STOPS
                body[name] = 20
        if path in PATHS[:2] and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = 3
        if path == "/v1/responses" and not isinstance(body.get("max_output_tokens"), int):
            body["max_output_tokens"] = 3
    data = bytearray(json.dumps(body).encode())
    if rng.random() < 0.35:
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randrange(1, 9)]
            elif kind == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 6))
            else:
                data[at:at] = rng.choice(
                    [b"[", b"{", b'"', b"NaN", b"1e999", b"\\ud800", b"\xff", b",", b"}" * 9]
                )
            data = data or bytearray(b" ")
    return path, bytes(data)


def fuzz(running: Server, count: int, seed: int) -> None:
    rng = random.Random(seed)
    resident = 0
    for number in range(count):
        path, body = request(rng)
        started = time.monotonic()
        response = running.post(path, body)
        taken = time.monotonic() - started
        assert response.status_code < 500, (path, body, response.text[:500])
        assert taken < 5, (path, body, taken)
        if response.status_code != 200:
            refused(response, response.status_code)
        if number == 500:
            resident = running.rss()
    if resident:
        assert running.rss() < 1.05 * resident
    assert eventually(running.idle) and running.alive
    assert content_of(running.chat())


def test_random_bodies():
    fuzz(server(), 300, seed=1)


@pytest.mark.slow
def test_many_random_bodies():
    fresh = Server("--max-context", "256")
    try:
        fuzz(fresh, 5000, seed=2)
    finally:
        fresh.kill()


def test_random_bytes():
    rng = random.Random(3)
    for _ in range(100):
        response = server().post(rng.choice(PATHS), rng.randbytes(rng.randrange(200)))
        refused(response)
    assert server().alive


def schemathesis(running: Server, examples: int) -> None:
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        running.url + "/openapi.json",
        "--checks",
        checks,
    ]
    command += [
        "--max-examples",
        str(examples),
        "--phases",
        "fuzzing",
        "--seed",
        "1",
        "--request-timeout",
        "10",
    ]
    command += ["--suppress-health-check", "all", "--generation-database", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert eventually(running.idle) and running.alive
    assert content_of(running.chat())


def test_schemathesis():
    schemathesis(server(), 2)


@pytest.mark.slow
def test_schemathesis_at_length():
    fresh = Server("--max-context", "256")
    try:
        schemathesis(fresh, 400)
    finally:
        fresh.kill()
