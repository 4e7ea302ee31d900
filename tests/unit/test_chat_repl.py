"""The terminal's commands, how answers look, the one-shot answer and the editor's rules, without a terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_chat_conversation import FakeModel, call

from kllm.chat import editor, start
from kllm.chat.commands import ARGUMENTS, HELP, Commands
from kllm.chat.conversation import Calling, Conversation, Note
from kllm.chat.markdown import last_lines, split_blocks
from kllm.chat.model import Called, Settings
from kllm.chat.repl import Repl
from kllm.chat.show import PlainShow, RichShow
from kllm.chat.start import ChatOptions, run_chat
from kllm.errors import EXIT_INTERRUPTED, KllmError, UserError, harmless
from kllm.tokenizer.parts import Part
from kllm.tools.registry import Toolbox, find_tools


class Typist:
    """An editor whose user says these lines; exceptions are keys."""

    def __init__(self, *lines: Any) -> None:
        self.lines = list(lines)
        self.defaults: list[str] = []

    def read(self, default: str = "") -> str:
        self.defaults.append(default)
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return str(line)


def repl_of(*answers: Any, lines: tuple[Any, ...] = (), **options: Any) -> tuple[Repl, FakeModel]:
    model = FakeModel(*answers)
    chat = Conversation(model, **options)
    return Repl(
        chat,
        Typist(*lines),
        PlainShow(sys.stdout, sys.stdout),
        lambda name: FakeModel(name),
        aside=sys.stdout,
    ), model


# -- commands ------------------------------------------------------------------------------------------


def test_answers_are_shown_with_their_figures(capsys: pytest.CaptureFixture[str]) -> None:
    repl, _ = repl_of("hello", lines=("hi",))
    assert repl.run() == 0
    out = capsys.readouterr().out
    assert "hello\n5 tokens, 4 tokens/s, first after 0.50 s\n" in out
    assert out.startswith("fake: says what it is told to\n/help lists the commands")


def test_an_unknown_command_is_one_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ("/nonsense and more", "/", "/run", "/do_help", "/etc/passwd", "/__class__ x", "/Help")
    repl, _ = repl_of(lines=lines)
    assert repl.run() == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(lines) and all(e.startswith("error: unknown command /") for e in errors)


def test_two_slashes_say_one() -> None:
    repl, model = repl_of("ok", lines=("//help me",))
    repl.run()
    assert model.asked[0][-1]["content"] == "/help me"


def test_every_listed_command_exists_and_help_lists_every_command() -> None:
    listed = {line.split()[0][1:] for line in HELP.splitlines() if line.startswith("/")} - {"/text"}
    existing = {name[3:] for name in dir(Commands) if name.startswith("do_")}
    assert existing == listed == set(ARGUMENTS)


def test_undo_retry_edit_clear(capsys: pytest.CaptureFixture[str]) -> None:
    lines = (
        "/undo",
        "/retry",
        "/edit",
        "one",
        "two",
        "/retry",
        "/undo",
        "/edit",
        "one!",
        "/clear",
        "/stats",
        "/save x",
    )
    repl, model = repl_of("a", "b", "c", "d", lines=lines)
    repl.run()
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "error: nothing to undo",
        "error: nothing to retry",
        "error: nothing to edit",
        "error: nothing to save: nothing was said yet",
    ]
    assert "forgot: two" in out and "0 turns, 0 of 1,000 tokens of context" in out
    typist = repl._editor
    assert isinstance(typist, Typist) and "one" in typist.defaults, "the question stands on the line again"
    assert [m["content"] for m in model.asked[-1]] == ["one!"]


def test_system_set_think_show_tools_model(capsys: pytest.CaptureFixture[str]) -> None:
    lines = (
        "/system be kind", "/set temperature=0.25", "/set max_tokens 7", "/set", "/think off", "/think",
        "/show params", "/show prompt", "/show tokens", "/show thinking", "/tools", "/system -", "/model other",
    )  # fmt: skip
    repl, model = repl_of(lines=lines, box=Toolbox(find_tools(["calculator"])))
    repl.run()
    out = capsys.readouterr().out
    for wanted in (
        "system prompt: be kind", "temperature=0.25  max_tokens=7", "thinking: off", "system:be kind",
        "0 of 1,000 tokens of context", "there was none", "calculator(expression: str) -> str  Computes",
        "system prompt: none",
    ):  # fmt: skip
        assert wanted in out, wanted
    assert repl.chat.settings == Settings({"temperature": 0.25, "max_tokens": 7}, False)
    assert model.closed and repl.chat.model is not model


def test_several_options_at_once_and_back_to_the_model_s_own() -> None:
    repl, _ = repl_of(
        lines=("/set temperature=0.2 top_k=5", "/set min_p=0.1", "/set temperature= min_p=default")
    )
    repl.run()
    assert repl.chat.settings.sampling == {"top_k": 5}


def test_code_that_ran_is_no_part_of_what_a_pipe_gets() -> None:
    out, aside = io.StringIO(), io.StringIO()
    show = PlainShow(out, aside, hold=True)
    for item in (
        Part("content", "```python\nprint(1)\n```"),
        Calling("python", "print(1)"),
        Part("content", "It is 1."),
    ):
        show.item(item)
    show.end()
    assert out.getvalue() == "It is 1.\n" and "print(1)" in aside.getvalue()


def test_model_lists_those_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    repl, model = repl_of(lines=("/model",))
    model.names = ("fake", "other")
    repl.run()
    assert capsys.readouterr().out.strip().endswith("there: fake, other")


def test_tools_are_changed_in_the_middle(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ("hi", "/tools calculator,clock", "sum?", "/tools nothing", "/tools off", "bye")
    answers = ("hello", call("calculator", {"expression": "1+1"}), "2", "ok")
    repl, model = repl_of(*answers, lines=lines)
    repl.run()
    offered = [[t["function"]["name"] for t in tools or ()] for tools in model.tools]
    assert offered == [[], ["calculator", "clock"], ["calculator", "clock"], []]
    said = capsys.readouterr()
    assert "calculator(expression: str) -> str" in said.out and "none; there are calculator" in said.out
    assert said.err.startswith("error: /tools: no tool named 'nothing'") and said.err.count("\n") == 1
    repl.chat.code = True
    with pytest.raises(UserError, match="chosen at its start"):
        repl.chat.offer([])


@pytest.mark.parametrize(
    "line",
    ["/set temperature=hot", "/set warmth=1", "/set top_p=0", "/set temperature", "/think maybe", "/show me", "/save",
     "/load", "/load /nothing/there"],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    repl, _ = repl_of("a", lines=("hi", line))
    assert repl.run() == 0
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_save_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "talk.json"
    repl, _ = repl_of("a", lines=("hi", f"/save {path}"))
    repl.run()
    other, model = repl_of("b", lines=(f"/load {path}", "more"))
    other.run()
    assert f"2 messages in {path}" in (out := capsys.readouterr().out) and f"1 turn from {path}" in out
    assert [m["content"] for m in model.asked[0]] == ["hi", "a", "more"]


def test_keys_leave_or_are_forgiven(capsys: pytest.CaptureFixture[str]) -> None:
    stop = KeyboardInterrupt
    assert repl_of(lines=(stop(), stop()))[0].run() == EXIT_INTERRUPTED
    assert "Ctrl-C again or Ctrl-D leaves" in capsys.readouterr().out
    assert repl_of(lines=(stop(), "/stats", stop(), EOFError()))[0].run() == 0, "a word between two presses"
    assert repl_of(lines=(stop("half a line"), stop("half a line"), "/quit", "never"))[0].run() == 0


def test_an_error_does_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    repl, _ = repl_of(KllmError("the server is gone\x1b[2J"), "fine", lines=("hi", "/retry"))
    assert repl.run() == 0
    out, err = capsys.readouterr()
    assert err == "error: the server is gone[2J\n" and "fine" in out


# -- how it looks --------------------------------------------------------------------------------------


def test_the_model_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[31mb\x07\x9b2Jc\td\n好e\u202ef"
    assert harmless(evil) == "a[31mb2Jc\td\n好ef"
    repl, _ = repl_of(evil, lines=("hi",))
    repl.run()
    assert "\x1b" not in capsys.readouterr().out
    out = io.StringIO()
    show = RichShow(Console(file=out, force_terminal=True, width=60, color_system=None))
    show.begin()
    for item in (
        Part("reasoning", evil),
        Part("content", f"{evil} [link](http://x) [bold]x[/bold]"),
        Calling("f\x1b[2J", "{}"),
        Called("f\x1b[2J", '{"x": "\\u001b]0;t\\u0007"}', "r\x1b[2J", True, 0.1),
        Note("n\x1b[2J"),
    ):
        show.item(item)
    show.end()
    for bad in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\x1b[31m"):
        assert bad not in out.getvalue(), repr(bad)
    assert "[bold]x[/bold]" in out.getvalue(), "a model's brackets are no markup"


def shown(*items: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=60, color_system=None, height=20)
    show = RichShow(console)
    show.begin()
    for item in items:
        show.item(item)
    show.end()
    return out.getvalue()


def test_thinking_folds_and_calls_stand_in_boxes() -> None:
    text = shown(
        Part("reasoning", "first line\nsecond"),
        Part("content", "Yes, **bold**.\n\n- one\n- two"),
        Calling("calculator", '{"expression": "6*7"}'),
        Called("calculator", '{"expression": "6*7"}', "42", False, 0.25),
        Part("content", "It is 42."),
    )
    assert "second" not in text and "thought for" in text and "17 characters" in text
    assert "Yes, bold." in text and "• one" in text
    assert "calculator" in text and "6*7" in text and "42" in text and "0.25 s" in text and "╭" in text
    assert text.index("bold") < text.index("6*7") < text.index("It is 42.")
    long = shown(Called("python", '{"code": "x"}', "\n".join(map(str, range(50))), False, 0))
    assert "38 more lines" in long


def test_nothing_of_an_answer_is_dropped() -> None:
    for text, wanted in (
        ("<answer>\n42\n</answer>", "<answer>"),
        ("if a<b and c>d then", "if a<b and c>d then"),
        ("new List<String>()", "new List<String>()"),
        ("<div>hello</div>", "<div>hello</div>"),
        ("\\( x^2 \\) and \\[ y \\]", "\\( x^2 \\) and \\[ y \\]"),
        ("a \\* b", "a * b"),
        ("roses are red\nviolets are blue", "roses are red\nviolets are blue"),
        ("[link](http://x)", "http://x"),
    ):
        lines = [line.rstrip() for line in shown(Part("content", text)).splitlines()]
        assert wanted in "\n".join(lines), text
    assert "\u202e" not in shown(Part("content", "a &#x202E; b"))


def test_a_tools_name_is_no_markup() -> None:
    out = io.StringIO()
    show = RichShow(Console(file=out, force_terminal=True, width=60, color_system="standard"))
    show.begin()
    for name in ("[/x]", "[link=http://evil]calc[/link]", "[bold]"):
        show.item(Called(name, "{}", "1", False, 0.1))
    show.item(Called("deep", "[" * 3000, "1", False, 0.1))
    show.end()
    assert "[/x]" in out.getvalue() and "\x1b]8" not in out.getvalue()


@pytest.mark.parametrize(
    "text", ["a" * 50_000, "```py\n" + "x = 1\n" * 20_000, "- item\n" * 20_000, "a b " * 20_000]
)
def test_drawing_does_not_grow_with_the_answer(text: str) -> None:
    tail = last_lines(text, 40, 80)
    assert len(tail) <= 40 * 80 + 10 and (text.endswith(tail[-20:]))
    assert tail.startswith("```py\n") == text.startswith("```")
    assert last_lines("short\ntext", 40, 80) == "short\ntext"


LINES = ("a", "", "```", "- x", "1. y", "    c", "|t|", "# h", " ", "a```b", "  - z", "你好")


@given(st.lists(st.sampled_from(LINES), max_size=12), st.integers(1, 9))
def test_blocks_add_up_however_they_come(lines: list[str], step: int) -> None:
    """What was printed and what is left is the text, and code is never cut."""
    text = "\n".join(lines)
    printed, tail = "", ""
    for at in range(0, len(text), step):
        done, tail = split_blocks(tail + text[at : at + step])
        printed += done
        assert done.splitlines().count("```") % 2 == 0
    assert printed + tail == text


def test_a_list_and_code_are_never_cut() -> None:
    assert split_blocks("a\n\nb") == ("a\n\n", "b")
    assert split_blocks("- a\n\n- b") == ("", "- a\n\n- b")
    assert split_blocks("- a\n\n  more") == ("", "- a\n\n  more")
    assert split_blocks("```\na\n\nb") == ("", "```\na\n\nb")
    assert split_blocks("a\n\n") == ("", "a\n\n")


# -- one answer for a script -------------------------------------------------------------------------


class Pipe(io.TextIOWrapper):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


def one_shot(
    monkeypatch: pytest.MonkeyPatch,
    *answers: Any,
    stdin: bytes = b"",
    prompt: str | None = None,
    **options: Any,
) -> tuple[int, list[str]]:
    model = FakeModel(*answers)
    monkeypatch.setattr(start, "open_model", lambda options: model)
    monkeypatch.setattr(sys, "stdin", Pipe(stdin))
    code = run_chat(ChatOptions(model="m", prompt=prompt, **options))
    return code, [messages[-1]["content"] for messages in model.asked]


def test_prompt_and_piped_text_are_joined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one_shot(monkeypatch, "hello", stdin=b"hi\n") == (0, ["hi"])
    assert capsys.readouterr() == ("hello\n", "")
    both = one_shot(monkeypatch, "ok\n", prompt="sum up", stdin="\ufeff你好\n".encode())
    assert both == (0, ["sum up\n\n你好"]) and capsys.readouterr().out == "ok\n"
    assert one_shot(monkeypatch, "x", prompt="just this")[1] == ["just this"]
    assert one_shot(monkeypatch, "x", stdin=b"a\xffb")[1] == ["a\ufffdb"], "bytes that are no UTF-8"


def test_json_is_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one_shot(monkeypatch, [Part("reasoning", "hm"), Part("content", "你好")], prompt="hi", json_output=True)
    row = json.loads(capsys.readouterr().out)
    assert set(row) == {"text", "reasoning", "tool_calls", "finish_reason", "model", "usage", "timings"}
    assert (row["text"], row["reasoning"], row["finish_reason"], row["tool_calls"]) == (
        "你好",
        "hm",
        "stop",
        [],
    )


def test_what_the_command_line_says_goes_before_what_a_file_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    messages = [
        {"role": "system", "content": "old"},
        *({"role": r, "content": "OLD"} for r in ("user", "assistant")),
    ]
    path.write_text(
        json.dumps({"messages": messages, "settings": {"temperature": 0.9, "top_k": 3, "thinking": True}})
    )
    model = FakeModel("a", ["cancelled"])
    monkeypatch.setattr(start, "open_model", lambda options: model)
    monkeypatch.setattr(sys, "stdin", Pipe(b""))
    options = ChatOptions(
        model="m", prompt="hi", load=str(path), sampling={"temperature": 0.0}, system="new", thinking=False
    )
    assert run_chat(options) == 0
    assert model.settings[0] == Settings({"temperature": 0.0, "top_k": 3}, False)
    assert [m["content"] for m in model.asked[0]] == ["new", "OLD", "OLD", "hi"]
    assert "note: settings: temperature=0.9 top_k=3" in capsys.readouterr().err
    assert run_chat(replace(options, json_output=True)) == EXIT_INTERRUPTED
    assert json.loads(capsys.readouterr().out)["text"] == "", "not the old answer"


def test_a_disk_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            raise OSError(9, "none")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(KllmError, match="cannot write the answer: No space left"):
        one_shot(monkeypatch, "x", prompt="hi")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(KllmError, match="nowhere to write"):
        one_shot(monkeypatch, "x", prompt="hi")


def test_an_address_without_its_scheme_is_told() -> None:
    for model in ("127.0.0.1:8000", "localhost:8000/v1"):
        with pytest.raises(UserError, match="an address begins with http://"):
            run_chat(ChatOptions(model=model, prompt="x"))
    assert ChatOptions(model="HTTP://x").url == "HTTP://x"


def test_tools_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = (call("calculator", {"expression": "6*7"}), "It is 42.")
    one_shot(monkeypatch, *answers, prompt="?", tools=("calculator",))
    assert capsys.readouterr() == ("It is 42.\n", "[calculator] 6*7 -> 42\n")


def test_tools_that_the_template_does_not_show_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeModel, "shows", lambda self, tools: False)
    one_shot(monkeypatch, "hi", prompt="?", tools=("calculator",))
    assert capsys.readouterr().err == "note: its chat template shows it no tools: it will not call any\n"


def test_a_model_that_never_answers_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deaf = [call("calculator", {"expression": f"1+{i}"}) for i in range(9)]
    assert one_shot(monkeypatch, *deaf, prompt="?", tools=("calculator",))[0] == 1
    assert capsys.readouterr().err.splitlines()[-1] == "note: no answer: the model goes on calling tools"


def test_ctrl_c_while_a_tool_runs_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "slow.py"
    path.write_text(
        "import signal, time\n\ndef nap() -> str:\n    'Sleeps.'\n"
        "    signal.raise_signal(signal.SIGINT)\n    time.sleep(0.2)\n    return 'rested'\n"
    )
    code, _ = one_shot(
        monkeypatch, call("nap", {}), "never", prompt="?", tools=(f"{path}:nap",), json_output=True
    )
    assert code == EXIT_INTERRUPTED
    row = json.loads(capsys.readouterr().out)
    assert row["finish_reason"] == "cancelled" and row["tool_calls"][0]["name"] == "nap"


def test_unsafe_python_without_python_is_refused() -> None:
    with pytest.raises(UserError, match="no Python to run"):
        run_chat(ChatOptions(model="m", prompt="x", tools=("calculator",), unsafe_python=True))


@pytest.mark.parametrize("stdin", [b"", b" \n\n"])
def test_nothing_to_answer_is_a_user_error_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, stdin: bytes
) -> None:
    with pytest.raises(UserError, match="nothing to answer"):
        one_shot(monkeypatch, stdin=stdin)


def test_json_in_a_terminal_needs_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="needs a question"):
        run_chat(ChatOptions(model="m", json_output=True))


def test_a_failed_answer_leaves_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KllmError, match="gone"):
        one_shot(monkeypatch, KllmError("gone"), prompt="hi")


# -- the editor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "open_", "meant"),
    [
        ("hi", False, "hi"),
        ('"""hi', True, '"""hi'),
        ('"""\na\nb\n"""', False, "a\nb"),
        ('"""a"""', False, "a"),
        ("a\\", True, "a\\"),
        ("a\\\nb", False, "a\\\nb"),
        ('say """x""" now', False, 'say """x""" now'),
        ('"""', True, '"""'),
    ],
)
def test_several_lines(text: str, open_: bool, meant: str) -> None:
    assert editor.is_open(text) is open_ and editor.unquoted(text) == meant


def test_a_bare_editor_reads_several_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('hi\n"""\na\nb"""\nc\\\nd\n'))
    bare = editor.BareEditor()
    assert [bare.read(), bare.read(), bare.read()] == ["hi", "a\nb", "c\nd"]
    with pytest.raises(EOFError):
        bare.read()
    assert capsys.readouterr().err.count(">>> ") == 4, "stdout may be a file"


def test_the_history_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    history = editor._history(True)
    history.append_string("秘密\nof two lines")
    path = editor.history_path()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0
    assert list(editor._history(True).load_history_strings()) == ["秘密\nof two lines"]
    assert "Memory" in type(editor._history(False)).__name__
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    assert "Memory" in type(editor._history(True)).__name__, "no home is no reason not to talk"


def completions(text: str) -> Iterator[str]:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    for one in editor._completer(ARGUMENTS).get_completions(Document(text), CompleteEvent()):
        yield one.text


def test_commands_options_and_files_complete(tmp_path: Path) -> None:
    assert list(completions("/und")) == ["undo"] and set(completions("/")) == set(ARGUMENTS)
    assert list(completions("/set te")) == ["temperature="] and list(completions("/think o")) == ["on", "off"]
    (tmp_path / "talk.json").write_text("")
    assert list(completions(f"/load {tmp_path}/ta")) == ["lk.json"]
    assert list(completions("hello /s")) == [] and list(completions("/undo x")) == []
