"""`kllm chat` on a terminal, key by key, and in a pipe."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_support import chat_model
from scripted_server import Scripted, calls, serving
from support import Command, kllm
from terminal import ENV, Terminal


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "m")


def command(model: Path | str, *more: str, max_tokens: int = 8) -> list[str]:
    return [
        "chat",
        str(model),
        "--max-tokens",
        str(max_tokens),
        "--temperature",
        "0",
        "--device",
        "cpu",
        *more,
    ]


Start = Callable[..., Terminal]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Start]:
    opened: list[Terminal] = []
    state = {**ENV, "XDG_STATE_HOME": str(tmp_path / "state")}

    def start(args: list[str], env: dict[str, str] | None = None, **options: Any) -> Terminal:
        opened.append(Terminal(args, cwd=tmp_path, env={**state, **(env or {})}, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.kill()


def script(body: dict[str, Any]) -> Any:
    """What the scripted model says, by the last message."""
    last = body["messages"][-1]
    asked = last["content"]
    if last["role"] == "tool":
        return [f"It is **{asked}**."]
    if "calculate" in asked:
        return calls(("calculator", {"expression": "123*456"}))
    if "think" in asked:
        return [{"reasoning_content": "Well, "}, {"reasoning_content": "let me see.\n"}, "Done *thinking*."]
    if "markdown" in asked:
        return [
            "# Title\n\nSome **bold** and `code`.\n\n",
            "```python\nprint(",
            "1)\n```\n\n",
            "- one\n",
            "- two",
        ]
    if asked.startswith("Output:"):
        return [f"It printed {asked.split()[1]}."]
    if "code" in asked:
        return ["Let me see.\n```python\n", "n = globals().get('n', 0) + 1\nprint(n * 21)\n```"]
    if "slow" in asked:
        return (f"word{i} " for i in range(60 if "short" in asked else 3000))
    return [f"You said: {asked}"]


@pytest.fixture
def server() -> Iterator[Scripted]:
    with serving(script, pause=0.01) as server:
        yield server


def test_a_session_with_interrupts(model_dir: Path, terminal: Start) -> None:
    tty = terminal(command(model_dir, max_tokens=7000), fresh=True)
    tty.sees("/help lists the commands")
    tty.say("where is the cat?")
    tty.until(lambda: len(tty.raw) > 3000)
    tty.type("\x03")
    tty.sees("[cut]", 10)
    tty.say("/set max_tokens=6")
    tty.sees("max_tokens=6")
    tty.say("你好，猫在哪里？")  # another question, in Chinese
    tty.sees("\n6 tokens")
    tty.say("/stats")
    tty.sees("2 turns")
    tty.say("/retry")
    tty.sees("\n6 tokens", times=2)
    tty.say("/undo")
    tty.sees("forgot: 你好，猫在哪里？")
    tty.say("/undo")
    tty.sees("forgot: where is the cat?")
    tty.say("/nonsense")
    tty.sees("error: unknown command /nonsense")
    tty.ready()
    tty.type("\x04")
    assert tty.close() == 0 and "Traceback" not in tty.text


def test_ctrl_c_at_the_prompt_hints_then_leaves(model_dir: Path, terminal: Start) -> None:
    tty = terminal(command(model_dir))
    tty.ready()
    tty.type("half a line")
    tty.sees(">>> half a line")
    tty.type("\x03")  # throws the line away, no more
    tty.ready()
    assert "Ctrl-C again" not in tty.text
    tty.type("\x03")
    tty.sees("Ctrl-C again or Ctrl-D leaves")
    tty.say("hi")  # a word between two presses: they do not add up
    tty.sees("8 tokens")
    tty.ready()
    tty.type("\x03")
    tty.sees("Ctrl-C again", times=2)
    tty.ready()
    tty.type("\x03")
    assert tty.close() == 130 and "Traceback" not in tty.text


def test_chinese_line_editing(server: Scripted, terminal: Start) -> None:
    tty = terminal(["chat", server.url])
    tty.ready()
    tty.type("你好世界")
    tty.until(lambda: tty.column == 4 + 8, 10)  # each character is two columns wide
    tty.type("\x1b[D\x1b[D")  # left, twice: before 世
    tty.until(lambda: tty.column == 4 + 4, 10)
    tty.type("\x7f们")  # backspace takes 好 away
    tty.until(lambda: tty.column == 4 + 4, 10)
    tty.type("\x05！\r")  # to the end of the line
    tty.until(lambda: bool(server.requests))
    assert server.asked == ["你们世界！"]
    tty.ready()
    tty.type("\x1b[A")  # up: what was typed last
    tty.until(lambda: tty.column == 4 + 10, 10)
    tty.type("\x15/quit\r")
    assert tty.close() == 0


def test_several_lines_typed_pasted_and_from_another_program(
    server: Scripted, terminal: Start, tmp_path: Path
) -> None:
    outside = tmp_path / "editor"
    outside.write_text('#!/bin/sh\nprintf "from\\noutside" > "$1"\n')
    outside.chmod(0o755)
    tty = terminal(["chat", server.url], env={"VISUAL": str(outside), "EDITOR": str(outside)})
    wanted = ["first\nsecond 第二", "a\nb\nc", "x\ny", "one\ntwo", "from\noutside"]
    tty.ready()
    for keys in (
        '"""first\rsecond 第二"""\r',
        "\x1b[200~a\nb\nc\x1b[201~\r",
        "x\\\ry\r",
        "one\x1b\rtwo\r",
        "\x07",
    ):
        tty.type(keys)
        if keys == "\x07":
            tty.sees("outside")
            tty.type("\r")
        count = len(server.requests)
        tty.until(lambda count=count: len(server.requests) > count)
        tty.ready()
    assert server.asked == wanted


def test_how_answers_look(server: Scripted, terminal: Start) -> None:
    tty = terminal(["chat", server.url, "--tools", "calculator"])
    tty.say("markdown please")
    tty.sees("tokens/s")
    text = tty.text
    assert "Some bold and code." in text and "• one" in text and "print(1)" in text and "```" not in text
    tty.say("think about it")
    tty.sees("thought for")
    tty.sees("Done thinking.")
    assert "let me see" not in tty.text
    tty.say("/show thinking")
    tty.sees("Well, let me see.")
    tty.say("calculate it")
    tty.sees("It is 56088.")
    assert "╭─ calculator" in tty.text and "123*456" in tty.text
    tty.ready()
    tty.type("\x04")
    assert tty.close() == 0
    assert b"\x1b[" in tty.raw


def test_code_that_acts_on_a_terminal_and_in_a_pipe(
    server: Scripted, terminal: Start, tmp_path: Path
) -> None:
    tty = terminal(["chat", server.url, "--codeact"])
    tty.sees("the model acts by writing Python, which a sandbox runs")
    tty.say("code, please")
    tty.sees("It printed 21.")
    assert "╭─ python" in tty.text and "print(n * 21)" in tty.text
    tty.say("more code")
    tty.sees("It printed 42.")  # variables live on
    tty.ready()
    tty.type("\x04")
    assert tty.close() == 0
    done = kllm("chat", server.url, "--codeact", "-p", "code", "--json", cwd=tmp_path, env=ENV)
    row = json.loads(done.stdout)
    assert row["text"] == "It printed 21." and row["tool_calls"][0]["result"] == "21\n"


def test_retry_undo_edit_think_save_and_load(server: Scripted, terminal: Start, tmp_path: Path) -> None:
    tty = terminal(["chat", server.url])
    tty.say("one")
    tty.sees("You said: one")
    tty.say("/retry")
    tty.sees("You said: one", times=2)
    assert len(server.requests) == 2 and len(server.requests[1]["messages"]) == 1
    tty.say("/edit")
    tty.until(lambda: tty.line == ">>> one", 10)
    tty.type(" more\r")
    tty.sees("You said: one more")
    assert server.asked[-1] == "one more" and len(server.requests[-1]["messages"]) == 1
    tty.say("/think off")
    tty.say("/set temperature=0.5")
    tty.say("two")
    tty.sees("You said: two")
    assert server.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.requests[-1]["temperature"] == 0.5
    tty.say("/save talk.json")
    tty.sees("4 messages in talk.json")
    row = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [m["content"] for m in row["messages"]] == [
        "one more",
        "You said: one more",
        "two",
        "You said: two",
    ]
    tty.say("/clear")
    tty.say("/load /etc/hostname")
    tty.sees("error: /etc/hostname: it is no JSON")
    tty.say("/load talk.json")
    tty.sees("2 turns from talk.json")
    tty.say("three")
    tty.sees("You said: three")
    assert len(server.requests[-1]["messages"]) == 5
    tty.say("/stats")
    tty.sees("3 turns")
    tty.say("/quit")
    assert tty.close() == 0


def test_ctrl_c_stops_a_server_and_the_history_survives(server: Scripted, terminal: Start) -> None:
    tty = terminal(["chat", server.url], fresh=True)
    tty.say("slow please")
    tty.sees("word9")
    tty.type("\x03")
    tty.sees("[cut]", 10)
    tty.until(lambda: server.left == 1, 10)
    tty.say("next")
    tty.sees("You said: next")
    assert server.requests[-1]["messages"][1]["content"].startswith("word0 word1"), "what came is kept"
    tty.ready()
    tty.type("\x04")
    assert tty.close() == 0
    tty = terminal(["chat", server.url])
    tty.ready()
    tty.type("\x1b[A\x1b[A")
    tty.until(lambda: tty.line == ">>> slow please", 10)
    tty.type("\x15\x04")
    assert tty.close() == 0


def test_what_is_typed_ahead_waits_for_the_prompt(server: Scripted, terminal: Start) -> None:
    tty = terminal(["chat", server.url])
    tty.say("slow and short")
    tty.sees("word9")
    tty.type("typed ahead\r")
    tty.sees("word40")
    assert "typed ahead" not in tty.text, "it does not show in the answer"
    tty.sees("You said: typed ahead")
    assert tty.text.count("word0 word1 ") == 1
    tty.ready()
    tty.type("\x04")
    assert tty.close() == 0


def test_a_file_gets_the_words_and_the_terminal_the_rest(
    server: Scripted, terminal: Start, tmp_path: Path
) -> None:
    tty = terminal(["chat", server.url], stdout=tmp_path / "out.txt")
    tty.until(lambda: tty.line == ">>>")
    tty.type("hello\r")
    tty.sees("1 token, ")
    tty.until(lambda: tty.line == ">>>")
    tty.type("\x04")
    assert tty.close() == 0
    assert (tmp_path / "out.txt").read_text() == "You said: hello\n"


def test_a_server_that_goes_away_is_one_line(terminal: Start) -> None:
    with serving(script) as server:
        tty = terminal(["chat", server.url])
        tty.say("one")
        tty.sees("You said: one")
    tty.say("two")
    tty.sees("connection refused")
    tty.ready()
    tty.type("\x04")
    assert tty.close() == 0 and "Traceback" not in tty.text


# -- pipes ---------------------------------------------------------------------------------------------


def test_a_pipe_gets_plain_text(model_dir: Path, server: Scripted, tmp_path: Path) -> None:
    done = kllm(*command(model_dir), cwd=tmp_path, stdin="你好\n", env=ENV)
    assert done.stdout.endswith("\n") and len(done.stdout) > 3
    assert done.stderr == "note: cut after 8 tokens\n"
    shown = kllm("chat", server.url, cwd=tmp_path, stdin="markdown, think", env=ENV)
    assert shown.stdout == "Done *thinking*.\n" and shown.stderr == ""
    called = kllm("chat", server.url, "--tools", "calculator", cwd=tmp_path, stdin="calculate", env=ENV)
    assert called.stdout == "It is **56088**.\n" and called.stderr == "[calculator] 123*456 -> 56088\n"
    for one in (done, shown, called):
        assert "\x1b" not in one.stdout + one.stderr and ">>>" not in one.stdout


def test_json_with_calls(server: Scripted, tmp_path: Path) -> None:
    done = kllm(
        "chat", server.url, "--tools", "calculator", "-p", "calculate", "--json", cwd=tmp_path, env=ENV
    )
    row = json.loads(done.stdout)
    assert row["text"] == "It is **56088**." and row["finish_reason"] == "stop"
    assert row["tool_calls"][0]["result"] == "56088" and row["usage"]["completion_tokens"] == 3


def test_ctrl_c_ends_a_one_shot_answer_with_130(model_dir: Path) -> None:
    options = command(model_dir, "--prompt", "go", max_tokens=7000)
    process = Command(*options, cwd=Path.cwd(), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.stdout.read(), process.stderr.read()
    assert process.wait(20) == 130
    assert out.endswith("\n") and "Traceback" not in err
