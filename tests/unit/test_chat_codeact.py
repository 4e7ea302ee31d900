"""CodeAct: a scripted model whose code really runs, in the sandbox, over several turns."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_chat_conversation import FakeModel

from kllm.chat.conversation import Conversation, Note
from kllm.chat.model import Called
from kllm.chat.oneshot import to_json
from kllm.chat.saved import load, save
from kllm.tokenizer.parts import Part
from kllm.tools.registry import Toolbox, find_tools
from kllm.tools.sandbox import Limits
from kllm.tools.tool import tool_of


def code(text: str) -> str:
    return f"Let me see.\n```python\n{text}\n```"


@pytest.fixture
def talk() -> Iterator[Any]:
    opened: list[Toolbox] = []

    def start(*answers: Any, tools: str = "", limits: Limits | None = None) -> tuple[Conversation, FakeModel]:
        opened.append(Toolbox(find_tools([tools]), code=True, limits=limits))
        model = FakeModel(*answers)
        return Conversation(model, box=opened[-1], code=True, system="Be brief."), model

    yield start
    for box in opened:
        box.close()


def outputs(items: list[Any]) -> list[str]:
    return [item.text for item in items if isinstance(item, Called)]


def test_code_runs_over_several_turns_and_keeps_its_variables(talk: Any) -> None:
    answers = (
        code("x = [3, 1, 2]\nprint(sorted(x))"),
        code("x.append(7)\nlen(x)"),
        "There are 4.",
        code("sum(x)"),
        "13",
    )
    chat, model = talk(*answers, tools="calculator")
    assert outputs(list(chat.ask("How many?"))) == ["[1, 2, 3]\n", "4\n"]
    system = model.asked[0][0]["content"]
    assert system.startswith("Be brief.\n\n") and "def calculator(expression: str) -> str:" in system
    second = model.asked[1]
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert second[-1]["content"] == "Output:\n[1, 2, 3]\n"
    assert model.tools == [None] * 3, "the functions stand in the prompt, not in the template's tools"
    assert outputs(list(chat.ask("And the sum?"))) == ["13\n"], "variables live on to the next question"
    assert [t.question for t in chat.turns] == ["How many?", "And the sum?"]
    row = to_json(chat.turns[0], "m")
    assert row["text"] == "There are 4." and [c["name"] for c in row["tool_calls"]] == ["python"] * 2


def test_errors_and_tools_go_back_to_the_model(talk: Any) -> None:
    chat, model = talk(code("undefined_name"), code("print(calculator('6*7'))"), "42", tools="calculator")
    told = outputs(list(chat.ask("?")))
    assert "NameError: name 'undefined_name' is not defined" in told[0] and told[1] == "42\n"
    assert model.asked[1][-1]["content"].startswith("Output:\nTraceback")


def test_time_and_output_are_limited_and_the_model_is_told(talk: Any) -> None:
    loops = code("y = 1\nwhile True: pass")
    chat, _ = talk(loops, code("y"), code("print('a' * 10**6)"), "ok", limits=Limits(seconds=0.5))
    told = outputs(list(chat.ask("?")))
    assert "time-out" in told[0] and "variables and files are lost" in told[0]
    assert "NameError" in told[1], "a fresh worker goes on"
    assert len(told[2]) < 5000 and "bytes cut" in told[2]
    assert chat.turns[0].answer["content"] == "ok"


def test_rounds_are_limited_and_then_an_answer_is_asked_for(talk: Any) -> None:
    chat, model = talk(*[code(f"print({i})") for i in range(8)], code("print('never')"))
    items = list(chat.ask("?"))
    assert len(outputs(items)) == 8
    assert [i.text for i in items if isinstance(i, Note)] == ["no more code: 8 rounds"]
    assert (
        model.asked[-1][-1]["content"]
        == "Output:\n7\n\nNo more code is run (8 rounds). Say the answer in plain text."
    )
    assert chat.turns[0].answer["content"] == code("print('never')"), "asked once more, and not run"


def test_the_same_code_twice_in_a_row_is_not_run_again(talk: Any) -> None:
    chat, model = talk(code("1"), code("2"), code("1"), code("1"), "It is 1.")
    items = list(chat.ask("?"))
    assert outputs(items) == ["1\n", "2\n", "1\n"] and "twice in a row" in model.asked[-1][-1]["content"]
    assert "nothing was printed" not in model.asked[-1][-1]["content"], "it was not run"
    assert chat.turns[0].answer["content"] == "It is 1."


def test_time_is_limited_over_all_rounds(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kllm.chat.conversation.SECONDS", 0.05)
    chat, model = talk(code("import time; time.sleep(0.1)"), "ok", limits=Limits(seconds=5))
    list(chat.ask("?"))
    assert "No more code is run (it took more than 0.05 s)" in model.asked[-1][-1]["content"]


def test_a_function_that_does_not_end_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kllm.chat.conversation.GRACE", 0.1)
    gate = threading.Event()

    def hang() -> str:
        """Never ends."""
        gate.wait(30)
        return "late"

    with Toolbox([tool_of(hang)], code=True, limits=Limits(seconds=0.3)) as box:
        chat = Conversation(FakeModel(code("x = 1\nhang()"), code("x"), "ok"), box=box, code=True)
        started = time.monotonic()
        told = outputs(list(chat.ask("?")))
        assert time.monotonic() - started < 10 and "a function did not end" in told[0]
        assert "NameError" in told[1]
    gate.set()


def test_cut_code_is_not_run(talk: Any) -> None:
    chat, _ = talk([Part("content", "```python\nprint(1"), "length"])
    assert outputs(list(chat.ask("?"))) == [] and chat.turns[0].finish_reason == "length"


def test_clear_forgets_the_variables_and_neighbours_of_the_user_are_joined(talk: Any) -> None:
    chat, model = talk(code("x = 5"), "ok", code("x"), "gone")
    list(chat.ask("one"))
    chat.clear()
    assert "NameError" in outputs(list(chat.ask("two")))[0]
    chat.turns[-1].messages.pop()  # as Ctrl-C leaves it: what the code printed is last
    model.answers.append("fine")
    list(chat.ask("three"))
    roles = [m["role"] for m in model.asked[-1]]
    assert roles == ["system", "user", "assistant", "user"] and model.asked[-1][-1]["content"].endswith(
        "\n\nthree"
    )


def test_ctrl_c_ends_the_code(talk: Any) -> None:
    chat, model = talk(code("while True: pass"), "never")
    pressed: list[bool] = []

    def interrupted() -> bool:
        if chat.box.sandbox._worker is not None:  # the code runs
            pressed.append(True)
        return bool(pressed)

    told = outputs(list(chat.ask("?", interrupted)))
    assert "interrupted" in told[0] and len(model.asked) == 1
    assert chat.turns[0].finish_reason == "cancelled"


def test_code_of_another_language_is_no_code_and_text_ends(talk: Any) -> None:
    chat, _ = talk("Use:\n```bash\nls\n```")
    assert outputs(list(chat.ask("how?"))) == [] and len(chat.turns[0].said) == 1


def test_saved_and_loaded_the_turns_are_the_same(talk: Any, tmp_path: Path) -> None:
    chat, _ = talk(code("print(1)"), "1", "ok")
    list(chat.ask("?"))
    list(chat.ask("Output: what is it?"))
    save(chat, tmp_path / "c.json")
    row = json.loads((tmp_path / "c.json").read_text())
    assert row["messages"][0]["content"].startswith("Be brief.\n\nYou solve tasks"), (
        "a row to train on is whole"
    )
    other, _ = talk()
    load(other, tmp_path / "c.json")
    assert [t.question for t in other.turns] == ["?", "Output: what is it?"]
    assert other.system == "Be brief." and other.messages() == chat.messages()
