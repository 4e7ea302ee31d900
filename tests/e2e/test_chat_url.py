"""The same conversation with a model directory and with our server over HTTP; and the tools of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_support import chat_model
from serve_client import Server
from support import environment, kllm

from kllm.chat.conversation import Conversation
from kllm.chat.local import LocalModel, load_local
from kllm.chat.model import Said, Settings
from kllm.chat.remote import RemoteModel
from kllm.tokenizer.parts import Part

GREEDY = Settings({"temperature": 0.0, "max_tokens": 12})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "m")


@pytest.fixture(scope="module")
def here(model_dir: Path) -> LocalModel:
    return load_local(str(model_dir), device="cpu")


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    started = Server(models=(model_dir,))
    yield started
    started.kill()


def answered(chat: Conversation, question: str) -> tuple[str, Said]:
    items = list(chat.ask(question))
    assert isinstance(items[-1], Said)
    return "".join(i.text for i in items if isinstance(i, Part)), items[-1]


def test_a_directory_and_an_address_give_the_same_conversation(here: LocalModel, server: Server) -> None:
    both = [
        Conversation(model, settings=GREEDY, system="be brief") for model in (here, RemoteModel(server.url))
    ]
    for question in ("where is the cat?", "你好，猫在哪里？", "and 🐟?"):
        (ours, said), (theirs, also) = (answered(chat, question) for chat in both)
        assert ours == theirs and len(ours) > 0
        assert said.finish_reason == also.finish_reason
        assert said.prompt_tokens == also.prompt_tokens
        assert said.completion_tokens == also.completion_tokens
    assert both[0].prompt() == both[1].prompt(), "the server shows what the model is given"
    for chat in both:
        list(chat.retry())
        chat.undo()
    assert both[0].messages() == both[1].messages()


def test_the_command_line_takes_either(model_dir: Path, server: Server, tmp_path: Path) -> None:
    rows = []
    for where in ([str(model_dir)], [server.url], ["m", "--base-url", server.url + "/v1"]):
        done = kllm(
            "chat",
            *where,
            "-p",
            "where is the cat?",
            "--json",
            "--temperature",
            "0",
            "--max-tokens",
            "7",
            cwd=tmp_path,
        )
        assert done.returncode == 0 and done.stderr == ""
        rows.append(json.loads(done.stdout))
    assert rows[0]["text"] == rows[1]["text"] == rows[2]["text"] != ""
    assert rows[0]["usage"] == rows[1]["usage"] and rows[0]["usage"]["completion_tokens"] == 7
    assert rows[0]["timings"]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["http://127.0.0.1:9"],
            1,
            "error: http://127.0.0.1:9/v1: connection refused (is the server running?)",
        ),
        (["ftp://x", "--base-url", "ftp://x"], 2, "is no http address"),
        (["{url}", "--raw"], 2, "flag --raw: is for a model that is here"),
        (["{url}", "--adapter", "x"], 2, "flag --adapter: is for a model that is here"),
        (["other", "--base-url", "{url}"], 2, "no model named 'other' (it lists m)"),
        ([], 2, "MODEL: needs a model"),
        (["{model}", "--tools", "abacus"], 2, "no tool named 'abacus' (known: calculator, clock, python"),
        (["{model}", "--load", "nothing.json"], 2, "nothing.json: cannot read it: No such file"),
        (["{model}", "--api-key-file", "nothing"], 2, "flag --api-key-file nothing: cannot read it"),
        (["{model}", "--raw", "--tools", "clock"], 2, "flag --raw: has no turns"),
        (["{model}", "--temperature", "-1"], 2, "flag --temperature"),
        (["{model}/nothing"], 2, "no such file or directory"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], code: int, said: str, model_dir: Path, server: Server, tmp_path: Path
) -> None:
    filled = [one.format(url=server.url, model=model_dir) for one in arguments]
    done = kllm("chat", *filled, "--prompt", "hi", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_wrong_key_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    locked = Server(models=(model_dir,), env={"KLLM_API_KEY": "sesame"})
    try:
        for key, said in ("", "it wants a key (http 401)"), ("mellon", "wrong key (http 401)"):
            env = {**environment(), "KLLM_API_KEY": key, "OPENAI_API_KEY": ""}
            done = kllm("chat", locked.url, "-p", "hi", cwd=tmp_path, env=env, check=False)
            assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
            assert "mellon" not in done.stderr
        env = {**environment(), "KLLM_API_KEY": "sesame"}
        assert (
            kllm("chat", locked.url, "-p", "hi", "--max-tokens", "3", cwd=tmp_path, env=env).returncode == 0
        )
    finally:
        locked.kill()
