"""`kllm serve --tools` from the command line: a model that calls the calculator, and flags that are refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_support import chat_model, chat_tokenizer
from safetensors.torch import load_file, save_file
from serve_client import Server, chat_body, read_all
from support import MAIN, Command, environment, kllm

from kllm.tokenizer.chat import ChatEncoder
from kllm.tokenizer.toolcalls import END_TOOL_CALL, TOOL_CALL

CALL = '{"name": "calculator", "arguments": {"expression": "6*7"}}'
NAP = '{"name": "nap", "arguments": {}}'
SPARE = "<|buffer1|>"  # becomes the token of the whole call
OWN = '''
def shout(text: str) -> str:
    """Makes it loud."""
    return text.upper()


def nap() -> str:
    """Sleeps."""
    import time

    time.sleep(100)
    return "rested"
'''


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "own.py").write_text(OWN)
    return model_that_calls(folder / "caller", CALL)


def model_that_calls(directory: Path, call: str) -> Path:
    """Every token decides the next: after the prompt comes a call, or "cat" where it must not call."""
    chat_model(directory, context=2048)
    file = directory / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        if token["content"] == SPARE:
            token.update(content=call, special=False)
    spec["model"]["vocab"] = {call if t == SPARE else t: i for t, i in spec["model"]["vocab"].items()}
    file.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    for other in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / other).exists():
            text = (directory / other).read_text(encoding="utf-8")
            (directory / other).write_text(text.replace(SPARE, "<|buffer2|>"), encoding="utf-8")
    tok = chat_tokenizer()
    first = ChatEncoder(tok).prompt([{"role": "user", "content": "hi"}], None)[-1]
    (cat,) = tok.encode("cat")[-1:]
    added = tok.added_tokens
    chain = [first, added[TOOL_CALL], added[SPARE], added[END_TOOL_CALL], tok.eot_token_id]
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            weight.zero_()
    embedded, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    noise = torch.randn(len(embedded), len(embedded), generator=torch.Generator().manual_seed(3))
    embedded.copy_(torch.linalg.qr(noise)[0][:, : embedded.shape[1]])
    embedded /= embedded.norm(dim=1, keepdim=True)
    for before, after in [*zip(chain, chain[1:], strict=False), (cat, tok.eot_token_id)]:
        head[after] += 40 * embedded[before]
    head[cat] += 20 * embedded[first]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def running(caller: Path) -> Iterator[Server]:
    flags = ["--tools", f"calculator,clock,{caller.parent / 'own.py'}:shout", "--kv-memory", "16MiB"]
    server = Server(*flags, models=(caller,))
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.output() and "shows it no tools" not in server.output()


def events_of(message: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(e["type"], e["name"], e.get("arguments", e.get("content"))) for e in message["tool_events"]]


def test_the_calculator_is_called(running: Server) -> None:
    assert "tools: calculator, clock, shout\n" in running.output()
    answer = running.chat("what is 6*7?", max_tokens=100)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"].strip() == "cat"
    assert "tool_calls" not in choice["message"]
    call = ("call", "calculator", '{"expression": "6*7"}')
    refused = "error: not run: the same call twice in a row"
    assert events_of(choice["message"]) == [
        call, ("result", "calculator", "42"), call, ("result", "calculator", refused),
    ]  # fmt: skip
    assert answer["usage"]["completion_tokens"] == 4 + 4 + 2
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    stream = running.stream_chat("what is 6*7?", max_tokens=100)
    deltas = [one["delta"] for one in stream.of()]
    streamed = {"tool_events": [event for delta in deltas for event in delta.get("tool_events", [])]}
    assert events_of(streamed) == events_of(choice["message"])
    assert stream.message()["content"] == choice["message"]["content"] and stream.message()["calls"] == []
    assert running.metric("tool_calls_total", tool="calculator", outcome="ok") == 2
    assert running.metric("tool_calls_total", tool="calculator", outcome="not_run") == 2
    assert running.idle()


def test_a_request_without_them(running: Server) -> None:
    message = running.chat("hi", server_tools=False, max_tokens=100)["choices"][0]["message"]
    assert "tool_events" not in message and TOOL_CALL in message["content"]  # nobody looks for calls
    answer = running.post("/v1/chat/completions", chat_body("hi", server_tools=["python"]))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "server_tools"


def test_a_template_without_tools_is_told_at_the_start(caller: Path, tmp_path: Path) -> None:
    shutil.copytree(caller, tmp_path / "plain")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "plain" / "chat_template.jinja").write_text(template)
    server = Server("--tools", "calculator", models=(tmp_path / "plain",))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert server.output().count("plain: warning: its chat template shows it no tools") == 1


def test_a_tool_that_hangs_does_not_hold_up_the_end(caller: Path) -> None:
    model = model_that_calls(caller.parent / "sleeper", NAP)
    flags = ["--tools", f"{caller.parent / 'own.py'}:nap", "--kv-memory", "16MiB", "--drain", "300ms"]
    server = Server(*flags, models=(model,))
    with server.open_stream(chat_body("hi", max_tokens=100)) as connection:
        seen = b""
        while b"tool_events" not in seen:
            seen += connection.recv(4096)
        server.process.send_signal(signal.SIGTERM)
        seen += read_all(connection, 10)
    assert b'"code":"draining"' in seen and b"data: [DONE]" in seen
    assert server.process.wait(10) == 0 and "Traceback" not in server.output()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tools", "abacus"], "flag --tools: no tool named 'abacus'"),
        (["--tools", "calculator,nowhere.py:f"], "flag --tools, nowhere.py: no such file"),
        (["--tools", "calculator", "--unsafe-python"], "flag --unsafe-python: there is no python among the"),
        (
            ["--tools", "python", "--unsafe-python", "--host", "0.0.0.0"],
            "flag --unsafe-python: python for whoever",
        ),
        (["--tools", "clock", "--max-sandboxes", "0"], "flag --max-sandboxes: must be at least 1, got '0'"),
    ],
)
def test_wrong_flags_are_one_line(caller: Path, flags: list[str], words: str) -> None:
    done = kllm("serve", caller, "--port", "0", *flags, cwd=caller.parent, check=False, timeout=60)
    assert done.returncode == 2 and not done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in done.stderr


def test_python_needs_a_sandbox(caller: Path) -> None:
    """As on a kernel without Landlock."""
    code = f"import kllm.tools.sandbox.process as p\np.landlock_abi = lambda: 0\n{MAIN}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = ["serve", caller, "--port", "0", "--tools", "python"]
    process = Command(*command, cwd=caller.parent, env=environment(), code=code, **pipes)
    lines = process.stderr.read().splitlines()
    assert process.wait(60) == 2
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and "Landlock" in errors[0] and "--unsafe-python" in errors[0]
