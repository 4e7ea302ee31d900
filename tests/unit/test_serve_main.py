"""`kllm serve` up to the first request: keys, ports, warnings, and connections that never speak."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from serve_support import registry, server

from kllm.cli import serve as command
from kllm.errors import UserError
from kllm.serve import main
from kllm.serve.loading import LoadOptions
from kllm.serve.main import Server, bind, exposed, open_port, url_of
from kllm.serve.middleware import digests
from kllm.serve.protocol import Protocol
from kllm.serve.settings import Settings
from kllm.tools.registry import find_tools


def test_what_switches_the_servers_tools_off_is_said() -> None:
    """On the help page and in the README."""
    (option,) = [option for name, option, _ in command._PARAMETERS if name == "tools"]
    page = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    section = page.partition("\n## Serve\n")[2].partition("\n## ")[0]
    for text in (option.__metadata__[0].help, section.replace("`", "")):
        for word in (
            "n above 1",
            "tool_choice",
            "format for the answer",
            "continue_final_message",
            "/v1/responses never",
        ):
            assert word in text


def test_keys_come_from_three_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# team\nsk-b\n\n  sk-c  \n")
    assert command.api_keys(["sk-a"], file, "sk-d sk-e") == ["sk-a", "sk-b", "sk-c", "sk-d", "sk-e"]
    assert command.api_keys([], None, None) == []
    assert len(digests(["x", "x", "y"])) == 2


def test_bad_keys_are_refused_without_being_shown(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for arguments in (
        (["top secret"], None, None), ([""], None, None), (["geheim€"], None, None), ([], empty, None),
        ([], binary, None), ([], tmp_path / "absent", None), ([], tmp_path, None), ([], None, "geheim€"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            command.api_keys(*arguments)
        assert "secret" not in str(caught.value) and "geheim" not in str(caught.value)


def test_sizes_times_and_lists() -> None:
    assert command._bytes("max_body", "2MiB") == 2 << 20
    assert command._seconds("drain", "1m30s") == 90
    assert command._words(["https://a.example/, https://b.example", "*"]) == (
        "https://a.example", "https://b.example", "*",
    )  # fmt: skip
    for bad in ("much", "-5"):
        with pytest.raises(UserError, match="flag --max-body"):
            command._bytes("max_body", bad)
    for bad in ("inf", "nan", "1e999", "-inf", "9" * 400 + "s"):
        with pytest.raises(UserError, match="flag --drain: expected a time like 90s, 30m or 1h30m, got "):
            command._seconds("drain", bad)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("factor", "inf", "flag --factor: must be a number from 1 to 1024, got inf"),
        ("factor", "nan", "flag --factor: must be a number from 1 to 1024, got nan"),
        ("factor", "1e12", "flag --factor: must be a number from 1 to 1024, got 1e12"),
        ("factor", "far", "flag --factor: must be a number from 1 to 1024, got far"),
        ("port", "70000", "flag --port: must be at most 65535, got '70000'"),
        ("max_running", "0", "flag --max-running: must be at least 1, got '0'"),
        ("speculate", "x", "flag --speculate: expected a whole number, got 'x'"),
        ("quant", "fp4", "flag --quant: must be one of none, int8, int4, got 'fp4'"),
    ],
)
def test_flags_out_of_range(name: str, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        command._checked({name: text})
    assert str(caught.value) == words


def test_flags_in_range() -> None:
    given = {"port": "0", "factor": "1.5", "quant": "int8", "device": "cpu", "max_context": None}
    assert command._checked(given) == {**given, "port": 0, "factor": 1.5}


def test_a_taken_port_is_one_line() -> None:
    first = bind("127.0.0.1", 0)
    open_port(first)
    try:
        port = first.getsockname()[1]
        assert url_of(first, "127.0.0.1") == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"port {port} is in use"):
            bind("127.0.0.1", port)
    finally:
        first.close()
    with pytest.raises(UserError, match="--host"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(UserError, match="--host"):
        bind("203.0.113.7", 0)


def test_who_can_reach_it() -> None:
    assert not exposed(Settings(host="127.0.0.1")) and not exposed(Settings(host="localhost"))
    assert exposed(Settings(host="0.0.0.0")) and exposed(Settings(host="192.0.2.1"))
    assert not exposed(Settings(host="0.0.0.0", keys=digests(["k"])))
    assert not exposed(Settings(host="::1"))
    assert exposed(Settings(host="::")) and exposed(Settings(host="::1234"))


@pytest.mark.parametrize("unsafe", [False, True])
def test_no_code_runs_for_strangers(unsafe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything listens; own functions and the calculator are the owner's code."""
    monkeypatch.setattr("signal.signal", lambda *what: None)
    monkeypatch.setattr(main, "_log_to_stderr", lambda: None)
    monkeypatch.setattr(main, "check", lambda *what: None)
    monkeypatch.setattr(main, "open_port", lambda listener: pytest.fail("it listens"))
    here = Settings(host="0.0.0.0", port=0, tools=tuple(find_tools(["python,clock"])), unsafe_python=unsafe)
    with pytest.raises(UserError, match=r"python for whoever reaches 0\.0\.0\.0 needs a key") as caught:
        main.serve([], LoadOptions(), here, say=print, ready=print)
    assert str(caught.value).startswith("flag --unsafe-python" if unsafe else "flag --tools")
    for fine in ({"keys": digests(["k"])}, {"host": "127.0.0.1"}, {"tools": tuple(find_tools(["clock"]))}):
        main.check_reach(replace(here, **fine))


# ---- connections


async def serving(work, protocol: type[Protocol], **settings):
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        server(**settings), http=protocol, ws="none", lifespan="off", log_config=None, access_log=False
    )
    running = Server(config, registry(), 1.0)
    running.capture_signals = __import__("contextlib").nullcontext  # pytest keeps its own
    task = asyncio.ensure_future(running.serve(sockets=[listener]))
    while not running.started:
        await asyncio.sleep(0.01)
    try:
        return await work(listener.getsockname()[1])
    finally:
        running.should_exit = True
        await task


def talk(protocol: type[Protocol], work, **settings):
    return asyncio.run(asyncio.wait_for(serving(work, protocol, **settings), 20))


class Impatient(Protocol):
    header_seconds = 0.3


async def exchange(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def test_slow_headers_are_cut_off_and_others_served() -> None:
    async def work(port: int) -> None:
        held = [exchange(port, b"GET /health HTTP/1.1\r\n", b"X-A: 1\r\n") for _ in range(60)]
        held += [exchange(port) for _ in range(10)]
        slow = [asyncio.ensure_future(h) for h in held]
        await asyncio.sleep(0.05)
        assert b'{"status":"ok"}' in await exchange(port, GET)
        assert set(await asyncio.gather(*slow)) == {b""}

    talk(Impatient, work)


def test_slow_headers_of_a_second_request_too() -> None:
    async def work(port: int) -> None:
        first = GET.replace(b"Connection: close\r\n", b"")
        answer = await exchange(port, first, b"GET /hea", pause=0.1)
        assert answer.count(b"HTTP/1.1 200") == 1

    talk(Impatient, work)


def test_slow_but_fast_enough_is_served() -> None:
    async def work(port: int) -> None:
        half = len(GET) // 2
        assert b"200 OK" in await exchange(port, GET[:half], GET[half:], pause=0.1)

    talk(Impatient, work)


def test_what_is_not_http_is_a_json_400() -> None:
    async def work(port: int) -> None:
        for junk in (
            b"\x16\x03\x01 hello\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        ):
            answer = await exchange(port, junk)
            assert answer.startswith(b"HTTP/1.1 400") and b'"invalid_request_error"' in answer
        assert b"200 OK" in await exchange(port, GET)

    talk(Protocol, work)


def test_too_many_connections_are_503() -> None:
    class Few(Protocol):
        most = 3

    async def work(port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        await asyncio.sleep(0.05)
        answer = await exchange(port, GET)
        assert (
            answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 1" in answer and b"server_error" in answer
        )
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.05)
        assert b"200 OK" in await exchange(port, GET)

    talk(Few, work)


def test_a_large_body_gets_its_answer_over_a_real_socket() -> None:
    async def work(port: int) -> None:
        size = 20_000_000
        head = f"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode())
        for _ in range(20):
            writer.write(b"x" * 1_000_000)
            await writer.drain()
        answer = await asyncio.wait_for(reader.read(600), 10)
        assert answer.startswith(b"HTTP/1.1 413") and b"request_too_large" in answer
        writer.write(GET)
        assert b"200 OK" in await asyncio.wait_for(reader.read(), 10)
        writer.close()

    talk(Protocol, work)


def test_paths_are_not_normalised() -> None:
    async def work(port: int) -> None:
        for path in (
            b"/web/../v1/models",
            b"//v1/models",
            b"/web/..%2f..%2fetc/passwd",
            b"/%2e%2e/etc/passwd",
        ):
            answer = await exchange(port, GET.replace(b"/health", path))
            assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 401")), path

    talk(Protocol, work, keys=digests(["k"]))
