"""The evaluation with tools: calls are run, the conversation goes on, and each question is judged by its rule."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from chat_support import chat_model

from kllm.data.builtin import generate
from kllm.engine import Engine
from kllm.errors import UserError
from kllm.eval.asking import Asker, Reply
from kllm.eval.names import check_task, task_data
from kllm.eval.scoring import says
from kllm.eval.tasks import run_task
from kllm.eval.tooluse import run_tools
from kllm.export.load import load_model
from kllm.run.results import tables
from kllm.tokenizer.chat import ChatEncoder
from kllm.tools.registry import schemas

Prompt = tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("The result is 1554.", "1554", True),
        ("1554", "1554", True),
        ("结果是1554。", "1554", True),
        ("It is **1,554**.", "1554", True),
        ("It is 11554.", "1554", False),
        ("It is -1554.", "1554", False),
        ("It is -1554.", "-1554", True),
        ("It is 2.1554", "1554", False),
        ("1554 or 1555", "1554", False),
        ("'oragnak'.", "oragnak", True),
        ("KALO", "kalo", False),
        ("[1, 2, 3]", "[1, 2, 3]", True),
        ("[11, 2, 3]", "[1, 2, 3]", False),
        ("现在是12:14。", "12:14", True),
        ("It is 09:12:14.", "12:14", False),
        ("", "1", False),
    ],
)
def test_what_an_answer_says(answer: str, expected: str, right: bool) -> None:
    assert says(answer, expected) is right


class Scripted:
    """An asker whose model answers by rule, told the question's row; like `Asker`, for tests."""

    def __init__(self, answer: Callable[[Prompt, dict[str, Any]], Reply], batch_size: int = 1000) -> None:
        self.answer, self.batch_size = answer, batch_size
        self.asked: list[list[Prompt]] = []
        self.rows: dict[int, dict[str, Any]] = {}
        self.kept: list[Any] = []

    def replies(self, prompts: list[Prompt]) -> list[Reply]:
        rows = list(generate("eval", subject="tools"))
        for messages, _, _ in prompts:  # a question's conversation is one list that grows
            if id(messages) not in self.rows:
                self.rows[id(messages)] = rows[len(self.rows)]
                self.kept.append(messages)  # or another list may get its id
        self.asked.append(list(prompts))
        return [self.answer(prompt, self.rows[id(prompt[0])]) for prompt in prompts]


def measured(answer: Callable[[Prompt, dict[str, Any]], Reply], limit: int) -> dict[str, Any]:
    asker: Any = Scripted(answer)
    return run_tools(asker, limit=limit)


def said(text: str, *calls: tuple[str, dict[str, str]]) -> Reply:
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
        for i, (n, a) in enumerate(calls)
    ]
    return Reply(
        {"role": "assistant", "content": text or None, **({"tool_calls": made} if made else {})}, True
    )


def obedient(prompt: Prompt, row: dict[str, Any]) -> Reply:
    """Calls what gives the answer, then says what came back."""
    messages = prompt[0]
    if messages[-1]["role"] == "tool":
        result = messages[-1]["content"].strip()
        if row["category"] == "error" or row["tool"] == "clock":
            return said(row["answer"])
        return said(f"The result is {result}.")
    if not row["tool"]:
        return said(row["answer"])
    arguments = {
        "calculator": {"expression": "1/0" if row["category"] == "error" else row["answer"]},
        "python": {"code": f"print({row['answer']!r})"},
        "clock": {},
    }[row["tool"]]
    return said("", (row["tool"], arguments))


@pytest.fixture(autouse=True)
def python_without_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints what the scripted code prints; the sandbox has tests of its own."""
    from kllm.tools.registry import Toolbox

    def run(self: Toolbox, tool: Any, arguments: str) -> str:
        return f"{eval(tool.checked(arguments)['code'].removeprefix('print'))}\n"

    monkeypatch.setattr(Toolbox, "_python", run)
    monkeypatch.setattr("kllm.tools.sandbox.check_platform", lambda: None)


def test_an_obedient_model_is_perfect() -> None:
    asker: Any = Scripted(obedient)
    result = run_tools(asker, limit=90)
    assert (result["accuracy"], result["total"]) == (1.0, 90)
    assert result["calls"]["accuracy"] == result["well_formed"] == result["results"] == 1.0
    assert result["by_tool"] == dict.fromkeys(("calculator", "python", "clock", "none"), 1.0)
    assert result["faults"] == {}
    assert set(result["by_category"]) == {"en", "zh"}
    assert [len(prompts) for prompts in asker.asked] == [90, 70]  # all at once, then those that called
    messages, tools, _ = asker.asked[1][0]
    assert [m["role"] for m in messages[-2:]] == ["assistant", "tool"]
    assert tools and {"type", "function"} == set(tools[0])
    titles = [table.title for table in tables({"builtin:tools": result})]
    assert "builtin:tools: right answers 100.0% (90/90)" in titles
    assert json.loads(json.dumps(result, ensure_ascii=False)) == result


def test_prompts_offer_exactly_the_tools_of_the_row() -> None:
    asker: Any = Scripted(obedient)
    run_tools(asker, limit=18)
    for messages, tools, _ in asker.asked[0]:
        assert tools == schemas(asker.rows[id(messages)]["tools"])


def test_a_model_that_never_calls() -> None:
    result = measured(lambda _, row: said(row["answer"]), 18)
    assert result["accuracy"] == 1.0  # it knows everything
    assert (result["calls"]["correct"], result["calls"]["total"]) == (4, 18)
    assert (result["well_formed"], result["results"]) == (None, 0.0)


def test_faults_are_counted() -> None:
    def calls(name: str, arguments: dict[str, str]) -> Callable[[Prompt, dict[str, Any]], Reply]:
        first = said("", (name, arguments))
        return lambda prompt, _: said("I give up") if prompt[0][-1]["role"] == "tool" else first

    for answer, fault in (
        (calls("oracle", {"q": "?"}), "no such tool"),
        (lambda *_: said('<tool_call>\n{"name": calculator'), "broken call"),
        (lambda *_: Reply({"role": "assistant", "content": ""}, False), "cut before its end"),
    ):
        result = measured(answer, 18)
        assert (result["accuracy"], result["faults"]) == (0.0, {fault: 18})
        assert result["well_formed"] == 0.0
    result = measured(calls("calculator", {"sum": "1+1"}), 2)
    assert result["faults"] == {"wrong arguments": 2}
    assert result["calls"]["accuracy"] == 1.0


def test_questions_are_asked_in_waves_so_that_sandboxes_do_not_add_up() -> None:
    asker: Any = Scripted(obedient, batch_size=16)
    result = run_tools(asker, limit=90)
    assert (result["accuracy"], result["total"]) == (1.0, 90)
    assert max(len(prompts) for prompts in asker.asked) == 16
    done = run_tools(Scripted(obedient), limit=90)  # type: ignore[arg-type]
    assert result == done


def test_a_model_that_calls_for_ever_is_asked_a_last_time_as_chat_does() -> None:
    again = said("", ("calculator", {"expression": "1"}))
    asker: Any = Scripted(lambda prompt, _: again if prompt[2] else said("Enough."))
    result = run_tools(asker, limit=1)
    assert [prompts[0][2] for prompts in asker.asked] == [True, True, False]  # the same call twice
    assert all(prompts[0][1] for prompts in asker.asked), "the prompt keeps the tools"
    assert result["samples"][0]["answer"].endswith("Enough.")


def test_the_clock_stands_still() -> None:
    told = []

    def answer(prompt: Prompt, row: dict[str, Any]) -> Reply:
        if row["tool"] == "clock" and prompt[0][-1]["role"] == "tool":
            told.append(prompt[0][-1]["content"] == row["results"]["clock"])
        return obedient(prompt, row)

    measured(answer, 36)
    assert told == [True] * 4


# ---- with an engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return load_model(chat_model(tmp_path_factory.mktemp("model") / "m", context=2048))


class Fixed(Engine):
    """Draws given texts instead of its own, and keeps the prompts."""

    texts: list[str]

    def ids(self, text: str) -> list[int]:
        """The text's tokens, its marks as their own ones."""
        assert self.tokenizer is not None
        added = self.tokenizer.added_tokens
        pieces = re.split("(</?tool_call>)", text)
        marked = [[added[p]] if p in added else self.tokenizer.encode(p) for p in pieces if p]
        return [*(token for piece in marked for token in piece), self.tokenizer.eos_token_id]

    def generate(self, prompts: Any, params: Any, on_event: Any = None) -> Any:
        from kllm.engine import Completion

        self.prompts, self.params = [list(prompt) for prompt in prompts], params
        ids = [self.ids(text) for text in self.texts]
        return [Completion(i, text, "stop") for i, text in zip(ids, self.texts, strict=True)]


def test_calls_are_read_out_of_an_answer_s_text(model: Any) -> None:
    engine = Fixed(*model, max_batch=4, max_context=2048)
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call>'
    engine.texts = [call, f"Let me see.\n{call}\n{call}", "Just so."]
    messages = [{"role": "user", "content": "1+1?"}]
    tools = schemas(["calculator"])
    one, two, none = Asker(engine, model[1]).replies(
        [(messages, tools, True)] * 2 + [(messages, tools, False)]
    )
    call_token = model[1].added_tokens["<tool_call>"]
    assert [bool(p.logit_bias) for p in engine.params] == [False, False, True]
    assert engine.params[2].logit_bias == ((call_token, -100.0),)
    assert [c["function"]["name"] for c in one.message["tool_calls"]] == ["calculator"]
    assert json.loads(one.message["tool_calls"][0]["function"]["arguments"]) == {"expression": "1+1"}
    assert (len(two.message["tool_calls"]), two.message["content"]) == (2, "Let me see.")
    assert (none.message.get("tool_calls"), none.message["content"], none.ended) == (None, "Just so.", True)
    assert engine.prompts[0] == ChatEncoder(model[1]).prompt(messages, tools)


def test_a_random_model_and_too_long_prompts(model: Any) -> None:
    result = run_task("builtin:tools", *model, limit=4, batch_size=4, max_new_tokens=8)
    assert (result["task"], result["total"], result["accuracy"]) == ("builtin:tools", 4, 0.0)
    short = Engine(*model, max_batch=4, max_context=256)
    result = run_tools(Asker(short, model[1], max_new_tokens=8), limit=4)
    assert result["faults"] == {"cut before its end": 4}


def test_its_name() -> None:
    check_task("builtin:tools")
    assert task_data("builtin:tools") == ["builtin:tools/eval"]
    with pytest.raises(UserError, match=r"mean builtin:tools\?"):
        check_task("tools")
    with pytest.raises(UserError, match="nothing to ask"):
        measured(obedient, 0)
