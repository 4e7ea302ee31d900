"""The conversation's memory and its loops, with a model whose answers are scripted."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kllm.chat.conversation import Calling, Conversation, Note
from kllm.chat.model import NEVER, Called, ContextFull, Said, Settings
from kllm.chat.oneshot import to_json
from kllm.chat.saved import load, path_of, save
from kllm.chat.settings import set_option
from kllm.errors import KllmError, UserError
from kllm.tokenizer.messages import normalise
from kllm.tokenizer.parts import Part
from kllm.tools.registry import Toolbox, find_tools
from kllm.tools.tool import tool_of


class FakeModel:
    """Says what it is told to: texts, lists of parts, or exceptions to raise."""

    name, context, names = "fake", 1000, ()

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[list[dict[str, Any]]] = []
        self.tools: list[Any] = []
        self.calls: list[bool] = []
        self.settings: list[Settings] = []
        self.closed = False

    def describe(self) -> str:
        return "says what it is told to"

    def prompt(self, messages: Any, tools: Any, settings: Settings) -> str:
        return "|".join(f"{m['role']}:{m['content']}" for m in messages)

    def shows(self, tools: Any) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    def ask(
        self,
        messages: Any,
        tools: Any,
        settings: Settings,
        *,
        calls: bool = True,
        interrupted: Callable[[], bool] = NEVER,
    ) -> Iterator[Any]:
        self.asked.append(json.loads(json.dumps(list(messages))))
        self.tools.append(tools)
        self.calls.append(calls)
        self.settings.append(settings)
        answer = self.answers.pop(0)
        parts = [Part("content", c) for c in answer] if isinstance(answer, str) else answer
        if isinstance(answer, Exception):
            raise answer
        reason, count = "stop", 0
        for part in parts:
            if isinstance(part, Exception):
                raise part
            if isinstance(part, str):
                reason = part
                continue
            count += 1
            reason = "tool_calls" if part.kind == "call" else reason
            yield part
            if interrupted():
                reason = "cancelled"
                break
        yield Said(reason, 10, count, 0.5, 1.0)


def call(name: str, arguments: dict[str, Any], index: int = 0) -> list[Part]:
    return [
        Part("call", index=index, id=f"c{index}", name=name),
        Part("arguments", json.dumps(arguments), index),
    ]


def chat_of(*answers: Any, **options: Any) -> tuple[Conversation, FakeModel]:
    model = FakeModel(*answers)
    return Conversation(model, **options), model


def roles(messages: list[dict[str, Any]]) -> list[str]:
    return [f"{m['role'][0]}:{m['content']}" for m in messages]


def test_the_model_is_shown_the_whole_conversation() -> None:
    chat, model = chat_of("hello", "fine", system="be kind")
    items = list(chat.ask("hi"))
    assert [i.text for i in items if isinstance(i, Part)] == list("hello") and isinstance(items[-1], Said)
    list(chat.ask("how?"))
    assert roles(model.asked[1]) == ["s:be kind", "u:hi", "a:hello", "u:how?"]
    assert [t.question for t in chat.turns] == ["hi", "how?"]
    assert model.tools == [None, None] and model.calls == [True, True], "a server may have its own"


def test_undo_retry_clear() -> None:
    chat, model = chat_of("a", "b", "c", "d", settings=Settings({"seed": 5}))
    assert chat.undo() is None
    with pytest.raises(UserError, match="nothing to retry"):
        list(chat.retry())
    list(chat.ask("one"))
    list(chat.ask("two"))
    list(chat.retry(attempt=2))
    assert roles(model.asked[-1]) == ["u:one", "a:a", "u:two"] and chat.turns[-1].answer["content"] == "c"
    assert [s.sampling["seed"] for s in model.settings] == [5, 5, 7], "or retry would say the same"
    assert chat.undo() == "two" and [t.question for t in chat.turns] == ["one"]
    chat.clear()
    list(chat.ask("three"))
    assert roles(model.asked[-1]) == ["u:three"]


def test_a_greeting_has_no_question_to_retry(tmp_path: Path) -> None:
    chat, model = chat_of("never")
    path = tmp_path / "greeting.json"
    said = (("assistant", "Hello, what is it?"), ("user", "hi"), ("assistant", "yes"))
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}))
    list(load(chat, path))
    assert chat.undo() == "hi"
    with pytest.raises(UserError, match="nothing to retry"):
        list(chat.retry())
    assert model.asked == [] and chat.turns[0].answer["content"].startswith("Hello")


def test_an_interrupted_answer_is_kept_as_far_as_it_came() -> None:
    chat, model = chat_of("long answer", "next")
    count = iter(range(100))
    list(chat.ask("go on", lambda: next(count) >= 3))
    assert chat.turns[0].answer["content"] == "long" and chat.turns[0].finish_reason == "cancelled"
    list(chat.ask("and?"))
    assert roles(model.asked[1]) == ["u:go on", "a:long", "u:and?"]


def test_an_answer_that_was_cut_before_it_began_is_no_turn_but_can_be_asked_again() -> None:
    chat, _ = chat_of(["cancelled"], "now")
    list(chat.ask("hi", lambda: True))
    assert chat.turns == [] and chat.unanswered == "hi"
    list(chat.retry())
    assert chat.turns[0].answer["content"] == "now" and chat.unanswered is None


def test_a_failure_in_the_middle_keeps_what_came() -> None:
    chat, _ = chat_of([Part("content", "ha"), KllmError("gone")], "half", KllmError("dead"), "back")
    with pytest.raises(KllmError, match="gone"):
        list(chat.ask("one"))
    assert chat.turns[0].answer["content"] == "ha" and chat.turns[0].finish_reason == "cancelled"
    list(chat.retry())
    assert [t.answer["content"] for t in chat.turns] == ["half"]
    with pytest.raises(KllmError, match="dead"):  # nothing came: the old answer stays
        list(chat.retry())
    assert [t.answer["content"] for t in chat.turns] == ["half"] and chat.unanswered is None
    list(chat.retry())
    assert [t.answer["content"] for t in chat.turns] == ["back"]


def test_the_context_is_full() -> None:
    full = ContextFull("2,000 tokens, the context is 1,000")
    chat, model = chat_of("a", "b", full)
    list(chat.ask("one"))
    list(chat.ask("two"))
    with pytest.raises(UserError, match="/clear starts afresh, --context-shift forgets"):
        list(chat.ask("three"))
    assert len(chat.turns) == 2 and chat.unanswered == "three"
    chat, model = chat_of("a", "b", full, full, "c", shift=True)
    for question in ("one", "two"):
        list(chat.ask(question))
    notes = [i for i in chat.ask("three") if isinstance(i, Note)]
    assert notes == [Note("the context is full: the oldest 2 turns forgotten")]
    assert roles(model.asked[-1]) == ["u:three"] and len(chat.turns) == 1
    assert len(chat.turns) == 1
    model.answers += [full, full]
    with pytest.raises(ContextFull):  # it alone is too long: nothing is forgotten for it
        list(chat.ask("long"))
    assert [t.question for t in chat.turns] == ["three"] and chat.unanswered == "long"
    assert chat.undo() == "long"


def test_retry_with_a_shift_replaces_the_answer() -> None:
    full = ContextFull("too long")
    chat, _ = chat_of("a", "b", "c", full, "new", shift=True)
    for question in "ABC":
        list(chat.ask(question))
    list(chat.retry())
    assert [(t.question, t.answer["content"]) for t in chat.turns] == [("B", "b"), ("C", "new")]


# -- tools -----------------------------------------------------------------------------------------------


def box() -> Toolbox:
    return Toolbox(find_tools(["calculator"]))


def test_calls_are_run_and_their_results_read() -> None:
    first = [Part("content", "Let me see."), *call("calculator", {"expression": "6*7"})]
    chat, model = chat_of(first, "It is 42.", "thanks", box=box())
    items = list(chat.ask("6 times 7?"))
    assert [i for i in items if isinstance(i, Calling)] == [Calling("calculator", '{"expression": "6*7"}')]
    (called,) = [i for i in items if isinstance(i, Called)]
    assert (called.name, called.text, called.error) == ("calculator", "42", False)
    second = model.asked[1]
    assert [m["role"] for m in second] == ["user", "assistant", "tool"]
    assert (
        second[1]["tool_calls"][0]["id"] == second[2]["tool_call_id"] == "c0" and second[2]["content"] == "42"
    )
    assert model.calls == [True, True] and model.tools[0][0]["function"]["name"] == "calculator"
    list(chat.ask("ok"))
    assert [m["role"] for m in model.asked[2]] == ["user", "assistant", "tool", "assistant", "user"]
    row = to_json(chat.turns[0], "fake")
    assert row["text"] == "It is 42." and row["finish_reason"] == "stop" and row["reasoning"] is None
    assert row["tool_calls"][0] | {"seconds": 0} == {
        "name": "calculator", "arguments": '{"expression": "6*7"}', "result": "42", "error": False, "seconds": 0,
    }  # fmt: skip
    assert row["usage"] == {"prompt_tokens": 20, "completion_tokens": 12, "total_tokens": 32}


def test_a_model_that_only_calls_is_asked_a_last_time_without() -> None:
    same = [call("calculator", {"expression": "1+1"}) for _ in range(2)]
    chat, model = chat_of(*same, "two", box=box())
    notes = [i.text for i in chat.ask("1+1?") if isinstance(i, Note)]
    assert notes == ["no more calls: the same call twice in a row"]
    assert model.calls == [True, True, False] and chat.turns[0].answer["content"] == "two"
    chat, model = chat_of(
        *(call("calculator", {"expression": f"1+{i}"}) for i in range(8)), "enough", box=box()
    )
    assert [i.text for i in chat.ask("count") if isinstance(i, Note)] == [
        "no more calls: too many rounds of calls"
    ]
    assert model.calls == [True] * 8 + [False]


def test_a_call_without_a_result_never_stays() -> None:
    deaf = [call("calculator", {"expression": f"1+{i}"}) for i in range(9)]  # heeds no tool_choice
    chat, model = chat_of(*deaf, "next", box=box())
    notes = [i.text for i in chat.ask("count") if isinstance(i, Note)]
    assert notes[-1] == "no answer: the model goes on calling tools"
    assert chat.turns[0].finish_reason == "tool_calls" and not chat.turns[0].answer["content"]
    list(chat.ask("and?"))
    for message, after in zip(model.asked[-1], model.asked[-1][1:], strict=False):
        assert not message.get("tool_calls") or after["role"] == "tool"


def test_ctrl_c_between_two_calls_and_a_tool_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    pressed: list[bool] = []

    def step(number: int) -> str:
        """Counts."""
        ran.append(number)
        pressed.append(True)
        return "done"

    first = [part for i in range(4) for part in call("step", {"number": i}, i)]
    chat, model = chat_of(first, "never", box=Toolbox([tool_of(step)]))
    items = list(chat.ask("go", lambda: bool(pressed)))
    assert ran == [0] and [i.error for i in items if isinstance(i, Called)] == [False, True, True, True]
    assert len(model.asked) == 1 and len(chat.turns[0].messages) == 6
    assert chat.turns[0].finish_reason == "cancelled"

    gate = threading.Event()

    def hang() -> str:
        """Never ends."""
        gate.wait(30)
        return "late"

    monkeypatch.setattr("kllm.chat.conversation.SECONDS", 0.1)
    monkeypatch.setattr("kllm.chat.conversation.GRACE", 0.1)
    chat, model = chat_of(call("hang", {}), "Sorry.", box=Toolbox([tool_of(hang)]))
    (called,) = [i for i in chat.ask("go") if isinstance(i, Called)]
    assert called.error and "not finished: a tool took over 0.1 s" in called.text and called.seconds > 0.1
    assert model.calls == [True, False] and chat.turns[0].answer["content"] == "Sorry."
    gate.set()


def test_results_are_shown_as_they_come() -> None:
    first = [*call("calculator", {"expression": "1"}, 0), *call("calculator", {"expression": "2"}, 1)]
    chat, _ = chat_of(first, "ok", box=box())
    shown = [
        i.arguments[16:17] if isinstance(i, Calling) else i.text
        for i in chat.ask("?")
        if isinstance(i, Calling | Called)
    ]
    assert shown == ["1", "1", "2", "2"]


def test_calls_of_a_cut_answer_are_dropped() -> None:
    cut = [Part("content", "a"), *call("calculator", {"expression": "1"}), "length"]
    chat, model = chat_of(cut, "b", box=box())
    list(chat.ask("x"))
    assert "tool_calls" not in chat.turns[0].answer and chat.turns[0].finish_reason == "length"
    list(chat.ask("y"))
    assert roles(model.asked[1]) == ["u:x", "a:a", "u:y"]


def test_a_result_that_does_not_fit_is_shown_in_part() -> None:
    def flood() -> str:
        """Says much."""
        return "7" * 3000

    full = ContextFull("the conversation takes 4,000 tokens", where="prompt")
    chat, model = chat_of(call("flood", {}), full, "Many sevens.", "ok", box=Toolbox([tool_of(flood)]))
    notes = [i.text for i in chat.ask("go") if isinstance(i, Note)]
    assert notes == ["what came back does not fit the context: the model is shown less of it"]
    assert len(model.asked[1][-1]["content"]) == 3000 > len(model.asked[2][-1]["content"])
    assert (
        model.asked[2][-1]["content"].startswith("777") and chat.turns[0].answer["content"] == "Many sevens."
    )
    list(chat.ask("next"))
    assert len(model.asked[-1][2]["content"]) < 500, "it stays short"
    chat, _ = chat_of(call("flood", {}), full, full, box=Toolbox([tool_of(flood)]))
    with pytest.raises(ContextFull):
        list(chat.ask("go"))


def test_a_call_where_nothing_was_offered_is_told() -> None:
    chat, _ = chat_of('<tool_call>\n{"name": "calculator"', "plain")
    assert [i.text for i in chat.ask("?") if isinstance(i, Note)] == [
        "the model called a tool and was offered none: --tools, or /tools"
    ]
    assert not [i for i in chat.ask("?") if isinstance(i, Note)]


def test_own_functions_cannot_read_the_terminal_or_write_among_the_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def nosy() -> str:
        """Prints and asks."""
        print("debug")
        return input("name? ")

    before = sys.stdin, sys.stdout
    chat, model = chat_of(call("nosy", {}), "Sorry.", box=Toolbox([tool_of(nosy)]))
    list(chat.ask("go"))
    assert "EOFError" in model.asked[1][-1]["content"] and (sys.stdin, sys.stdout) == before
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("debug")


def test_thinking_is_kept_apart() -> None:
    chat, _ = chat_of([Part("reasoning", "hm"), Part("content", "yes")])
    list(chat.ask("x"))
    assert chat.turns[0].answer == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert to_json(chat.turns[0], "m")["reasoning"] == "hm"


# -- files ---------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_goes_on_as_it_was(tmp_path: Path) -> None:
    answers = [[Part("reasoning", "hm"), *call("calculator", {"expression": "6*7"})], "42", "你好", "next"]
    chat, model = chat_of(
        *answers, box=box(), system="be kind", settings=Settings({"temperature": 0.5}, True)
    )
    list(chat.ask("6*7?"))
    list(chat.ask("嗨"))
    path = tmp_path / "talk.json"
    assert save(chat, path) == 7
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") == 1, "a line of it is a row of training data"
    row = json.loads(text)
    assert row["settings"] == {"temperature": 0.5, "thinking": True} and row["model"] == "fake"
    assert row["tools"][0]["function"]["name"] == "calculator" and row["messages"][0]["role"] == "system"

    other, again = chat_of("next", box=box())
    notes = load(other, path)
    assert notes == ["settings: temperature=0.5"] and other.settings.thinking is True
    assert [t.question for t in other.turns] == ["6*7?", "嗨"] and other.system == "be kind"
    list(chat.ask("more"))
    list(other.ask("more"))
    assert normalise(model.asked[-1]) == normalise(again.asked[-1]), "the template is given the same"


def test_what_training_and_the_page_write_loads_too(tmp_path: Path) -> None:
    chat, _ = chat_of()
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n' * 2
    )
    assert load(chat, path) == ["1 more conversations in the file were left out"]
    assert roles(chat.messages()) == ["u:a", "a:b"]
    path.write_text(json.dumps([{"role": "user", "content": "a"}]))
    assert load(chat, path) == ["it ends with a question: /retry answers it"] and chat.unanswered == "a"
    path.write_text(
        json.dumps(
            {
                "chats": [
                    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
                ]
            }
        )
    )
    load(chat, path)
    assert roles(chat.messages()) == ["u:q", "a:r"]
    odd = [
        ("system", "one"),
        ("assistant", "hello"),
        ("user", "a\u2028b"),
        ("system", "two"),
        ("assistant", "c"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in odd]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row), encoding="utf-8")
    load(chat, path)
    assert roles(chat.messages()) == ["s:one", "a:hello", "u:a\u2028b", "s:two", "a:c"]
    user, broken = {"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": "{"}
    path.write_text(json.dumps({"messages": [user, broken]}))
    with pytest.raises(UserError, match="no conversation"):
        load(chat, path)
    calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    path.write_text(
        json.dumps({"messages": [user, {"role": "assistant", "content": "", "tool_calls": calls}]})
    )
    load(chat, path)
    assert "tool_calls" not in chat.turns[0].answer, "nobody answered them"


@pytest.mark.parametrize("name", [".", "x" * 300, "/proc/nothing/x.json", "a\0b"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    chat, _ = chat_of("a")
    list(chat.ask("one"))
    with pytest.raises(KllmError, match="cannot write") as failure:
        save(chat, tmp_path / name)
    assert "\n" not in str(failure.value) and "--out" not in str(failure.value)
    with pytest.raises(UserError, match="nosuchuser"):
        path_of("~nosuchuser/x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read it: No such file"),
        (b"\xff\xfe\x00", "it is no UTF-8 text"),
        (b"hello", "it is no JSON"),
        (b"", "no JSON|no conversation"),
        (b"[]", "no conversation"),
        (b"3", "no conversation"),
        (b'{"text": "a"}', "no conversation"),
        (b'{"messages": 3}', "no conversation"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}', "no conversation"),
        (b"[" * 100_000, "it is no JSON"),
    ],
)
def test_a_file_that_is_no_conversation_is_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    chat, _ = chat_of("a")
    list(chat.ask("one"))
    path = tmp_path / "f.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as failure:
        load(chat, path)
    assert "\n" not in str(failure.value) and str(path) in str(failure.value)
    assert [t.question for t in chat.turns] == ["one"], "what there was stays"


def test_a_file_that_is_no_conversation_is_not_overwritten(tmp_path: Path) -> None:
    chat, _ = chat_of("hello", "again", box=box())
    list(chat.ask("hi"))
    source, talk = tmp_path / "tool.py", tmp_path / "talk.json"
    source.write_text("def f(): ...")
    with pytest.raises(UserError, match="holds no conversation"):
        save(chat, source)
    assert source.read_text() == "def f(): ..."
    save(chat, talk)
    list(chat.ask("more"))
    assert save(chat, talk) == 4, "an older one is replaced"
    assert (
        load(chat_of()[0], talk)[0]
        == "it had the tools calculator, which are not offered now: /tools, or --tools"
    )
    assert load(chat_of(box=box())[0], talk) == []


def test_settings_are_changed_from_text() -> None:
    settings = set_option(Settings(), "temperature", "0.25")
    settings = set_option(settings, "max-tokens", "7")
    assert settings.sampling == {"temperature": 0.25, "max_tokens": 7}
    assert set_option(settings, "temperature", "none").sampling == {"max_tokens": 7}
    for key, value in (
        ("temperature", "hot"),
        ("temperature", ""),
        ("warmth", "1"),
        ("temperature", "-1"),
        ("top_p", "0"),
    ):
        with pytest.raises(UserError):
            set_option(settings, key, value)


def test_a_saved_conversation_is_a_row_to_train_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kllm.cli.app import main

    chat, _ = chat_of([*call("calculator", {"expression": "6*7"})], "It is 42.", box=box())
    list(chat.ask("6*7?"))
    save(chat, tmp_path / "talk.json")
    with pytest.raises(SystemExit) as left:
        main(["data", "inspect", str(tmp_path / "talk.json")])
    out = capsys.readouterr().out
    assert not left.value.code and "1 good, 0 bad" in out
    assert '"expression": "6*7"' in out and "It is 42." in out
