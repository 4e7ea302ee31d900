"""CodeAct: a scripted model whose code really runs, in the sandbox, over several turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_chat_conversation import FakeModel

from kllm.chat.conversation import Conversation, Note
from kllm.chat.model import Called
from kllm.chat.oneshot import to_json
from kllm.chat.saved import load, save
from kllm.tools.registry import Toolbox, find_tools
from kllm.tools.sandbox import Limits


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


def test_rounds_are_limited(talk: Any) -> None:
    chat, _ = talk(*[code(f"print({i})") for i in range(20)])
    items = list(chat.ask("?"))
    assert len(outputs(items)) == 8 and [i.text for i in items if isinstance(i, Note)] == [
        "stopped after 8 rounds of code"
    ]


def test_the_same_code_twice_in_a_row_ends_it(talk: Any) -> None:
    chat, _ = talk(code("1"), code("2"), code("1"), code("1"), "never")
    items = list(chat.ask("?"))
    assert outputs(items) == ["1\n", "2\n", "1\n"] and "twice in a row" in items[-1].text


def test_ctrl_c_ends_the_code(talk: Any) -> None:
    chat, model = talk(code("while True: pass"), "never")
    pressed: list[bool] = []

    def interrupted() -> bool:
        if chat.box.sandbox._worker is not None:  # the code runs
            pressed.append(True)
        return bool(pressed)

    told = outputs(list(chat.ask("?", interrupted)))
    assert "interrupted" in told[0] and len(model.asked) == 1


def test_code_of_another_language_is_no_code_and_text_ends(talk: Any) -> None:
    chat, _ = talk("Use:\n```bash\nls\n```")
    assert outputs(list(chat.ask("how?"))) == [] and len(chat.turns[0].said) == 1


def test_saved_and_loaded_the_turns_are_the_same(talk: Any, tmp_path: Path) -> None:
    chat, _ = talk(code("print(1)"), "1", "ok")
    list(chat.ask("?"))
    list(chat.ask("Output: what is it?"))
    save(chat, tmp_path / "c.json")
    other, _ = talk()
    load(other, tmp_path / "c.json")
    assert other.turns[0].question == "?" and other.messages() == chat.messages()
