"""The terminal's commands and the one-shot answer, without a terminal."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from kllm.chat import repl
from kllm.chat.repl import Repl, run_chat, set_option
from kllm.chat.session import Session
from kllm.engine import Event, SamplingParams
from kllm.errors import UserError


class FakeEngine:
    """Says what it is told to, a character per token."""

    max_context = 1000
    parameters = 0

    def __init__(self, *answers):
        self.answers = list(answers)
        self.prompts: list[list[int]] = []

    def stream(self, prompt, sampling):
        self.prompts.append(prompt)
        text = self.answers.pop(0)
        for i, char in enumerate(text):
            yield Event(0, (i,), char, "stop" if i == len(text) - 1 else None)


class FakeTokenizer:
    """No template: prompts are the bare text, a character per token."""

    chat_template = None
    added_tokens: dict[str, int] = {}  # noqa: RUF012

    def encode(self, text):
        return [ord(c) for c in text]

    def encode_raw(self, text, add_special_tokens=False):
        return self.encode(text)


def session_of(*answers):
    return Session(FakeEngine(*answers), FakeTokenizer(), system=None, sampling=SamplingParams())  # type: ignore[arg-type]


def repl_of(*answers):
    return Repl(session_of(*answers), "m")


def asked(chat):
    return ["".join(map(chr, p)) for p in chat.session.engine.prompts]


def test_answers_are_shown_and_remembered(capsys):
    chat = repl_of("hello", "fine")
    assert chat.handle("hi") is False
    chat.handle("how?")
    out = capsys.readouterr().out
    assert "hello\n5 tokens" in out and "fine\n4 tokens" in out
    assert asked(chat) == ["hi", "hihellohow?"]


def test_an_unknown_command_is_one_error_line(capsys):
    chat = repl_of()
    for line in ("/nonsense and more", "/", "/answer", "/_say", "/etc/passwd", "/handle x"):
        assert chat.handle(line) is False
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: unknown command /")
        assert captured.err.count("\n") == 1


def test_two_slashes_say_one(capsys):
    chat = repl_of("ok")
    chat.handle("//help me")
    assert asked(chat) == ["/help me"]


def test_every_listed_command_exists_and_help_lists_every_command(capsys):
    chat = repl_of()
    chat.handle("/help")
    listed = {line.split()[0][1:] for line in capsys.readouterr().out.splitlines() if line.startswith("/")}
    existing = {name[3:] for name in dir(Repl) if name.startswith("do_")}
    assert existing - {"exit", "bye"} == listed - {"/text"}


def test_undo_retry_clear_on_an_empty_conversation(capsys):
    chat = repl_of()
    chat.handle("/undo")
    chat.handle("/retry")
    assert capsys.readouterr().err == "error: nothing to undo\nerror: nothing to retry\n"
    chat.handle("/clear")
    chat.handle("/stats")
    assert "0 turns, context 1000" in capsys.readouterr().out


def test_undo_retry_clear(capsys):
    chat = repl_of("a", "b", "c", "d")
    chat.handle("one")
    chat.handle("two")
    chat.handle("/retry")
    assert asked(chat)[1:] == ["oneatwo", "oneatwo"]
    chat.handle("/undo")
    assert "forgot: two" in capsys.readouterr().out
    assert [t.question for t in chat.session.turns] == ["one"]
    chat.handle("/clear")
    chat.handle("three")
    assert asked(chat)[-1] == "three"
    chat.handle("/stats")
    assert "1 turn, 6 of 1000 tokens" in capsys.readouterr().out


def test_system_and_set(capsys):
    chat = repl_of()
    chat.handle("/system be kind")
    assert chat.session.system == "be kind"
    chat.handle("/system -")
    assert chat.session.system is None
    chat.handle("/set temperature=0.25")
    chat.handle("/set max_tokens 7")
    chat.handle("/set seed=3")
    assert chat.session.sampling == SamplingParams(temperature=0.25, max_tokens=7, seed=3)
    chat.handle("/set seed=none")
    chat.handle("/set")
    assert "temperature=0.25" in capsys.readouterr().out
    for bad in ("temperature=hot", "temperature", "warmth=1", "temperature=-1", "top_p=0"):
        with pytest.raises(UserError):
            set_option(chat.session.sampling, *bad.replace("=", " ").partition(" ")[::2])


def test_the_model_cannot_drive_the_terminal(capsys):
    chat = repl_of("a\x1b[31mb\x07\x9b2Jc\td\n好e")
    chat.handle("hi")
    assert capsys.readouterr().out.startswith("a[31mb2Jc\td\n好e\n")


def test_quit_and_the_loop(monkeypatch, capsys):
    lines = iter(["hi", "/undo x", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert repl_of("yes").run() == 0
    assert next(lines) == "never"


@pytest.mark.parametrize(("keys", "code"), [([KeyboardInterrupt] * 2, 130), ([EOFError], 0)])
def test_leaving_by_keys(monkeypatch, capsys, keys, code):
    presses = iter(keys)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(next(presses)))
    assert repl_of().run() == code
    assert ("Ctrl-C again" in capsys.readouterr().out) == (code == 130)


def test_one_ctrl_c_between_lines_is_forgiven(monkeypatch, capsys):
    presses = iter([KeyboardInterrupt, "/stats", KeyboardInterrupt, EOFError])

    def read(prompt):
        press = next(presses)
        if isinstance(press, str):
            return press
        raise press

    monkeypatch.setattr("builtins.input", read)
    assert repl_of().run() == 0


def test_an_error_does_not_end_the_chat(monkeypatch, capsys):
    lines = iter(["x" * 2000, "/set top_k=-1", "hi"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    assert repl_of("fine").run() == 0
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == captured.err.count("\n") == 2
    assert "fine" in captured.out


# -- one answer for a script -------------------------------------------------------------------------


class Pipe(io.TextIOWrapper):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))


def one_shot(monkeypatch, *answers, stdin=b"", prompt=None, json_output=False):
    session = session_of(*answers)
    monkeypatch.setattr(repl, "open_session", lambda *a, **k: session)
    monkeypatch.setattr(sys, "stdin", Pipe(stdin))
    code = run_chat(
        "m", prompt=prompt, system=None, sampling=SamplingParams(), device="cpu", json_output=json_output
    )
    return code, ["".join(map(chr, p)) for p in session.engine.prompts]


def test_prompt_and_piped_text_are_joined(monkeypatch, capsys):
    assert one_shot(monkeypatch, "hello", stdin=b"hi\n") == (0, ["hi"])
    assert capsys.readouterr() == ("hello\n", "")
    assert one_shot(monkeypatch, "ok\n", prompt="sum up", stdin="\ufeff你好\n".encode()) == (
        0,
        ["sum up\n\n你好"],
    )
    assert capsys.readouterr().out == "ok\n"
    assert one_shot(monkeypatch, "x", prompt="just this")[1] == ["just this"]


def test_bytes_that_are_no_utf8_do_not_crash(monkeypatch, capsys):
    assert one_shot(monkeypatch, "x", stdin=b"a\xffb")[1] == ["a\ufffdb"]


def test_json_is_one_object(monkeypatch, capsys):
    one_shot(monkeypatch, "你好", prompt="hi", json_output=True)
    row = json.loads(capsys.readouterr().out)
    assert set(row) == {"text", "finish_reason", "usage", "timings"}
    assert (row["text"], row["finish_reason"]) == ("你好", "stop")
    assert row["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


@pytest.mark.parametrize("stdin", [b"", b" \n\n"])
def test_nothing_to_answer_is_a_user_error_before_the_model_is_loaded(monkeypatch, stdin):
    with pytest.raises(UserError, match="nothing to answer"):
        one_shot(monkeypatch, stdin=stdin)


def test_json_in_a_terminal_needs_a_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="needs a question"):
        run_chat("m", prompt=None, system=None, sampling=SamplingParams(), device="cpu", json_output=True)
