"""The tool protocol: functions as tools, the calculator, the clock, the loop, CodeAct's texts."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kllm.errors import KllmError, UserError
from kllm.tools import codeact
from kllm.tools.clock import clock
from kllm.tools.loop import Result, ToolLoop
from kllm.tools.registry import NAMES, Toolbox, find_tools, schemas
from kllm.tools.text import clipped
from kllm.tools.tool import ToolError, tool_of


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C", *, copy: bool = False) -> dict[str, Any]:
    """Forecasts the weather.

    As far as anybody can.

    Args:
        city: where, with
            its country.
        days: how many.

    Returns:
        city: no parameter.
    """
    return {"city": city, "days": days, "unit": unit, "copy": copy}


# -- a function is a tool ------------------------------------------------------------------------------


def test_schema_and_prompt_come_from_the_function() -> None:
    tool = tool_of(weather)
    function = tool.schema()["function"]
    assert tool.schema()["type"] == "function" and function["name"] == "weather"
    assert function["description"] == "Forecasts the weather.\n\nAs far as anybody can."
    parameters = function["parameters"]
    assert parameters["required"] == ["city"] and parameters["type"] == "object"
    assert parameters["properties"] == {
        "city": {"type": "string", "description": "where, with its country."},
        "days": {"type": "integer", "default": 1, "description": "how many."},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "copy": {"type": "boolean", "default": False},
    }
    text = tool.prompt()
    assert text.startswith(
        "def weather(city: str, days: int = 1, unit: Literal['C', 'F'] = 'C', *, copy: bool"
    )
    ast.parse(text + "\n    pass")  # a model is shown Python that is Python
    assert "city: where, with its country." in text and "no parameter" not in text


def test_a_call_is_checked_and_answered_as_text() -> None:
    tool = tool_of(weather)
    assert json.loads(tool.call('{"city": "北京", "days": "3"}')) == {
        "city": "北京",
        "days": 3,
        "unit": "C",
        "copy": False,
    }
    assert "北京" in tool.call('{"city": "北京"}')
    for wrong, said in (
        ("{}", "city: Field required"),
        ('{"city": 1}', "city"),
        ('{"city": "x", "days": "many"}', "days"),
        ('{"city": "x", "unit": "K"}', "unit"),
        ('{"city": "x", "town": 1}', "town"),
        ("[1]", "must be a JSON object"),
        ('{"city": ', "no JSON"),
        ("[" * 100_000, "no JSON"),
    ):
        with pytest.raises(ToolError, match=said):
            tool.call(wrong)


def test_python_calls_it_as_python_does() -> None:
    tool = tool_of(weather)
    assert tool.invoke(["Paris"], {"days": 2})["days"] == 2
    for args, kwargs in ([], {}), (["a", 1, "C", True], {}), (["a"], {"city": "b"}):
        with pytest.raises(ToolError, match="weather"):
            tool.invoke(args, kwargs)


def test_whatever_a_tool_raises_is_told() -> None:
    def broken(x: float) -> float:
        """Divides."""
        return 1 / x

    def odd() -> Any:
        """Gives what JSON has not."""
        return {1: {2, 3}, "nan": math.nan, "path": Path("x"), "self": odd}

    with pytest.raises(ToolError, match="broken: ZeroDivisionError: "):
        tool_of(broken).call('{"x": 0}')
    assert json.loads(tool_of(odd).call("{}"))["nan"] == "NaN"


def test_what_is_no_tool_is_refused_in_a_line() -> None:
    def silent(x: int) -> int:
        return x

    def untyped(x) -> int:  # type: ignore[no-untyped-def]
        """Says something."""
        return x

    def starred(*x: int) -> int:
        """Says something."""
        return 1

    def alien(x: Path | type(open)) -> int:  # type: ignore[valid-type]
        """Says something."""
        return 1

    async def late(x: int) -> int:
        """Says something."""
        return x

    for function, said in (
        (silent, "no function with a docstring"),
        (untyped, "x needs a type"),
        (starred, "has no name in JSON"),
        (alien, "alien"),
        (dict, "no function"),
        (lambda: 1, "no name for a tool"),
        (late, "late is async"),
    ):
        with pytest.raises(UserError, match=said) as failure:
            tool_of(function)
        assert "\n" not in str(failure.value)


def test_tools_are_found_by_name_module_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [tool.name for tool in find_tools(["clock, calculator", "python,clock"])] == [
        "clock",
        "calculator",
        "python",
    ]
    assert [one["function"]["name"] for one in schemas(NAMES)] == list(NAMES)
    (tmp_path / "own_tools_of_mine.py").write_text(
        'def twice(x: int) -> int:\n    """Doubles."""\n    return 2*x\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    for name in (
        "own_tools_of_mine:twice",
        "own_tools_of_mine.py:twice",
        f"{tmp_path}/own_tools_of_mine.py:twice",
    ):
        assert find_tools([name])[0].call('{"x": 4}') == "8"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("abacus", "no tool named 'abacus' \\(known: calculator, clock, python"),
        ("no.such.module:f", "cannot import no.such.module"),
        ("nothing.py:f", "no such file"),
        ("math:nothing", "math has no function 'nothing'"),
        ("math:pi", "a float is no function"),
        (":f", "no tool named"),
        ("json:", "no tool named"),
    ],
)
def test_a_tool_that_is_not_there_is_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as failure:
        find_tools([name])
    assert "\n" not in str(failure.value) and "flag --tools" in str(failure.value)


def test_two_tools_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('def clock() -> str:\n    """Ticks."""\n    return "tick"\n')
    with pytest.raises(UserError, match="two tools are named clock"):
        find_tools(["clock", f"{file}:clock"])


def test_a_module_that_fails_to_import_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    for text, said in ("1/0", "division by zero"), ("import sys; sys.exit(0)", "cannot import .*: 0"):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            find_tools([f"{file}:f"])


def test_what_lies_beside_a_tool_takes_no_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by its folder nor as the tool's own module: torch imports timeit."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text("STEP = 2\n")
    source = 'from beside_it import STEP\ndef f() -> int:\n    """Steps."""\n    return STEP\n'
    real = {"timeit": "Timer", "sched": "scheduler"}
    for name in ("steps_of_mine", *real):
        (tmp_path / f"{name}.py").write_text(source)
    for tool in ("steps_of_mine", "sched", "timeit"):
        for name in real:
            monkeypatch.delitem(sys.modules, name, raising=False)
        assert find_tools([f"{tmp_path / tool}.py:f"])[0].call("{}") == "2"
        for name, known in real.items():
            assert hasattr(importlib.import_module(name), known)


def test_a_file_is_run_once_and_may_have_dataclasses_and_neighbours(tmp_path: Path) -> None:
    (tmp_path / "the_neighbour.py").write_text("STEP = 2\n")
    file = tmp_path / "stateful.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from the_neighbour import STEP\n"
        "@dataclass\nclass State:\n    count: int = 0\n"
        "state = State()\n"
        'def up() -> int:\n    """Counts."""\n    state.count += STEP\n    return state.count\n'
        'def now() -> int:\n    """Tells."""\n    return state.count\n'
        'def leave() -> int:\n    """Leaves."""\n    raise SystemExit(3)\n'
    )
    up, now, leave = find_tools([f"{file}:up,{file}:now", f"{file}:up", f"{file}:leave"])
    assert (up.call("{}"), now.call("{}")) == ("2", "2")
    with pytest.raises(ToolError, match="SystemExit"):
        leave.call("{}")


def test_the_clock_tells_the_time() -> None:
    day, weekday, hour, zone = clock("UTC").split()
    told = datetime.fromisoformat(f"{day}T{hour}+00:00")
    assert abs(datetime.now(told.tzinfo) - told) < timedelta(minutes=1)
    assert weekday == told.strftime("%A") and zone == "UTC+00:00"
    assert clock("Asia/Shanghai").endswith("UTC+08:00") and clock()
    for wrong in ("Moon/Base", "../../etc/passwd", "/etc/passwd", "\x00"):
        with pytest.raises(ToolError, match="no time zone named"):
            clock(wrong)


# -- the loop around calls -----------------------------------------------------------------------------


def call(name: str, number: str = "c1", **arguments: Any) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def box_of(*functions: Any) -> Toolbox:
    return Toolbox([tool_of(f) for f in functions])


def test_calls_are_run_in_order_and_errors_are_texts() -> None:
    loop = ToolLoop(Toolbox(find_tools(["calculator"])))
    seen: list[str] = []
    results = loop.run(
        [
            call("calculator", "a", expression="6*7"),
            call("abacus", "b"),
            call("calculator", "c", expression="1/0"),
        ],
        lambda result: seen.append(result.id),
    )
    assert [r.text for r in results] == [
        "42",
        "error: there is no tool 'abacus'; there is calculator",
        "error: division by zero",
    ]
    assert [r.error for r in results] == [False, True, True] and seen == ["a", "b", "c"]
    assert results[0].message() == {
        "role": "tool",
        "tool_call_id": "a",
        "name": "calculator",
        "content": "42",
    }
    assert loop.ended is None


def test_the_same_calls_twice_in_a_row_are_not_run_again() -> None:
    count = []

    def tick() -> int:
        """Counts."""
        count.append(1)
        return len(count)

    loop = ToolLoop(box_of(tick, weather))
    loop.run([call("tick")])
    loop.run([call("weather", city="x")])
    loop.run([call("tick")])  # not in a row
    assert loop.ended is None
    (result,) = loop.run([call("tick", "other id")])
    assert len(count) == 2 and result.error and "twice in a row" in result.text
    assert loop.ended is not None and "twice" in loop.ended


@pytest.mark.parametrize(
    ("name", "first", "second", "same"),
    [
        ("calculator", '{"expression": "1+1"}', '{"expression":" 1 + 1 "}', True),
        ("calculator", '{"expression": "2**3//4"}', '{"expression": "2 ** 3 // 4"}', True),
        ("calculator", '{"expression": "1 000*2"}', '{"expression": "1000*2"}', False),  # a correction
        ("calculator", '{"expression": "2* *3"}', '{"expression": "2**3"}', False),
        ("calculator", '{"expression": "1+1"}', '{"expression": "1+2"}', False),
        ("weather", '{"city": "x", "days": 2}', '{ "days":2,"city":"x" }', True),
        ("weather", '{"city": "x"}', '{"city": " x\\n"}', True),
        ("weather", '{"city": "New York"}', '{"city": "NewYork"}', False),
        ("weather", '{"city": "\\u0058"}', '{"city": "X"}', True),
        ("weather", "", "{}", True),
        ("weather", "{city: x}", " {city: x}\n", True),
        ("weather", "{city: x}", "{city: y}", False),
        ("weather", '{"city": {"a": ["b "]}}', '{"city": {"a": ["b"]}}', True),
        ("weather", "[" * 100_000, "[" * 100_001, False),
    ],
)
def test_a_call_is_the_same_however_it_is_written(name: str, first: str, second: str, same: bool) -> None:
    loop = ToolLoop(Toolbox([*find_tools(["calculator"]), tool_of(weather)]))
    for arguments in (first, second):
        loop.run([{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}])
    assert (loop.ended is not None) == same


def test_rounds_and_seconds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(100))

    def more() -> int:
        """Counts."""
        return next(numbers)

    loop = ToolLoop(box_of(more, weather), rounds=3)
    for i in range(3):
        assert loop.ended is None
        (result,) = loop.run([call("more" if i % 2 else "weather", **({} if i % 2 else {"city": str(i)}))])
        assert not result.error
    assert loop.ended == "too many rounds of calls"
    now = [0.0]
    monkeypatch.setattr("kllm.tools.loop.time.monotonic", lambda: now[0])

    def slow() -> str:
        """Takes 20 seconds."""
        now[0] += 20
        return "done"

    loop = ToolLoop(box_of(slow), seconds=30)
    results = loop.run([call("slow", str(i)) for i in range(3)])
    assert [r.error for r in results] == [False, False, True]
    assert loop.ended == "the tools took more than 30 s" and "not run" in results[2].text


def test_long_results_are_cut_in_the_middle() -> None:
    def long() -> str:
        """Says much."""
        return "a" * 5000 + "汉" * 5000

    (result,) = ToolLoop(box_of(long)).run([call("long")])
    assert result.text.startswith("aaa") and result.text.endswith("汉") and "bytes cut ...]" in result.text
    assert len(result.text.encode()) < 4096 + 40


@given(st.text(max_size=300), st.integers(10, 200))
@example("x" * 23, 23)
def test_clipped_keeps_both_ends(text: str, most: int) -> None:
    short = clipped(text, most)
    if len(text.encode("utf-8", "replace")) <= most:
        assert short == text.encode("utf-8", "replace").decode()
    else:
        assert len(short.encode()) <= most + 40 and "bytes cut" in short


# -- CodeAct -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("It is 4.", None),
        ("```python\nprint(1)\n```", "print(1)"),
        ("a\n```py\nx = 1\n```\nb\n~~~Python\nprint(x)\n~~~\nc", "x = 1\n\nprint(x)"),
        ("```python\nprint(4)\n```\nprints\n```\n4\n```", "print(4)"),
        ("```\nx\n```", "x"),
        ("````python\nx\n`````\nprose", "x"),
        ("```python\r\nx\r\n```\r\nprose", "x"),
        ("1. do\n\n     ```python\n     for i in x:\n       i\n     ```", "for i in x:\n  i"),
        ("```python\nprint('cut", "print('cut"),
        ("```json\n{}\n```", None),
        ("```\n\n```", None),
        ("inline ```python print(1)``` is no block", None),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ('```python title="x"\nprint(1)\n```', "print(1)"),
    ],
)
def test_code_is_found_in_fences(answer: str, code: str | None) -> None:
    assert codeact.code_of(answer) == code


def test_hostile_fences_are_read_in_time() -> None:
    started = time.perf_counter()
    for text in (
        "```" + "a" * 1_000_000,
        "```" * 300_000,
        "`" * 1_000_000,
        "```\n" * 200_000,
        "~~~ \n" * 200_000,
    ):
        codeact.code_of(text)
    assert time.perf_counter() - started < 20


def test_the_system_prompt_names_the_functions() -> None:
    text = codeact.system_prompt(find_tools(["calculator"]), "Be kind.")
    assert text.startswith("Be kind.\n\n") and "def calculator(expression: str) -> str:" in text
    assert "functions are defined" not in codeact.system_prompt([])
    assert codeact.shown("4\n") == "Output:\n4\n" and "nothing" in codeact.shown(" \n")


# -- Python in the box ---------------------------------------------------------------------------------


@pytest.fixture
def python_box() -> Iterator[Toolbox]:
    with Toolbox(find_tools(["python", "calculator"])) as box:
        yield box


def test_python_keeps_its_variables_and_its_errors_are_results(python_box: Toolbox) -> None:
    loop = ToolLoop(python_box)

    def ran(code: str) -> Result:
        return loop.run([call("python", code=code)])[0]

    assert (ran("x = sorted([3, 1, 2])").text, ran("print(x)").text) == ("(no output)", "[1, 2, 3]\n")
    assert ran("x[-1]").text == "3\n", "the last value, as in a REPL"
    wrong = ran("x[7]")
    assert wrong.error and "IndexError" in wrong.text and "x[7]" in wrong.text
    assert "calculator" not in ran("print(dir())").text, "only code that acts has functions"
    assert loop.run([call("python", source="1")])[0].text.startswith("error: python: code: Field required")


def test_ctrl_c_and_the_end_of_the_box(python_box: Toolbox) -> None:
    python_box.interrupted = lambda: True
    with pytest.raises(ToolError, match="interrupted"):
        python_box.call("python", '{"code": "while True: pass"}')
    python_box.interrupted = None
    assert python_box.call("python", '{"code": "1+1"}') == "2\n"
    assert python_box.sandbox is not None
    python_box.close()
    with pytest.raises(KllmError, match="closed"):
        python_box.call("python", '{"code": "1+1"}')


def test_without_a_sandbox_python_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from kllm.tools.sandbox import process

    monkeypatch.setattr(process, "landlock_abi", lambda: 0)
    for options in {"tools": find_tools(["python"])}, {"tools": [], "code": True}:
        with pytest.raises(UserError, match="needs Linux 5.13.*--unsafe-python") as failure:
            Toolbox(**options)  # type: ignore[arg-type]
        assert "\n" not in str(failure.value)
    with Toolbox(find_tools(["python"]), unsafe_python=True) as box:
        assert box.call("python", '{"code": "1+1"}') == "2\n"
    Toolbox(find_tools(["calculator"]))  # the others need none


def test_code_calls_the_other_tools_as_functions() -> None:
    with Toolbox([*find_tools(["calculator,python"]), tool_of(weather)], code=True) as box:
        ran = box.run("w = weather('北京', days=2)\nprint(w['city'], w['days'] + int(calculator('2*3')))")
        assert (ran.output, ran.error) == ("北京 8\n", None)
        ran = box.run("calculator('1/0')")
        assert ran.error is not None and "division by zero" in ran.output
        assert "NameError" in box.run("python('1')").output
        assert [tool.name for tool in box.functions()] == ["calculator", "weather"]
