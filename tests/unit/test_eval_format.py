"""The form of answers that think: the rules, and the task on a model that says what it is told to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_support import chat_model

from kllm.data.builtin import generate
from kllm.errors import UserError
from kllm.eval.asking import Said
from kllm.eval.format import run_format
from kllm.eval.reply import Reply, read_reply
from kllm.eval.tasks import run_task
from kllm.export.load import load_model
from kllm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize(
    ("text", "thought", "answer", "fault"),
    [
        ("<think>\n1+1=2\n</think>\n\nIt is 2.", "1+1=2", "It is 2.", ""),
        ("<think>\n\n</think>\n\nIt is 2.", "", "It is 2.", ""),
        ("It is 2.", None, "It is 2.", ""),
        ("<think>a</think><answer>2</answer>", "a", "2", ""),
        ("<think>a</think>\n<answer>\n2\n</answer>\n", "a", "2", ""),
        ("<answer>2</answer>", None, "2", ""),
        ("<think>a</think>b<think>c</think>2", "a</think>b<think>c", "2", "more than one think block"),
        ("<think>a</think>b</think>2", "a</think>b", "2", "more than one think block"),
        ("<think>1+1", "1+1", "", "think block not closed"),
        ("2</think>", "", "", "think tags out of order"),
        ("</think>a<think>2", "", "a2", "think tags out of order"),
        ("Well. <think>a</think>2", "a", "2", "words before the think block"),
        ("<think>a</think>", "a", "", "no answer"),
        ("", None, "", "no answer"),
        ("<think>a</think><answer>2", "a", "2", "answer tags out of order"),
        ("<think>a</think></answer>2<answer>", "a", "", "answer tags out of order"),
        ("<think>a<answer>2</answer></think>3", "a<answer>2</answer>", "3", "answer tags out of order"),
        ("<answer><think>a</think>2</answer>", "a", "2", "answer tags out of order"),
        ("<think>a</think>so <answer>2</answer>", "a", "2", "words outside the answer tags"),
        ("<think>a</think><answer>2</answer> so", "a", "2", "words outside the answer tags"),
    ],
)
def test_the_form(text: str, thought: str | None, answer: str, fault: str) -> None:
    assert read_reply(text) == Reply(thought, answer, fault)


def test_what_the_prompt_opened_belongs_to_the_answer() -> None:
    assert read_reply("1+1\n</think>\n2", opened=True) == Reply("1+1", "2")
    assert read_reply("<think>a</think>2", opened=True).fault == "more than one think block"
    assert read_reply("<think>a</think>2", ended=False).fault == "cut before its end"


class Scripted:
    """An asker whose model answers by rule; like `Asker`, for tests."""

    def __init__(self, tokenizer: Tokenizer, answer: Callable[[str, bool], Said]) -> None:
        self.tokenizer, self.answer = tokenizer, answer

    def chat(self, conversations: list[list[dict[str, Any]]], **variables: Any) -> list[Said]:
        thinking = variables["enable_thinking"]
        return [self.answer(messages[-1]["content"], thinking) for messages in conversations]


ROWS = list(generate("eval", subject="reasoning"))[:32]
RIGHT = {row["question"]: row for row in ROWS}


def obedient(question: str, thinking: bool) -> Said:
    row = RIGHT[question]
    block = f"<think>\n{row['reasoning_content']}\n</think>\n\n" if thinking else ""
    return Said(f"{block}{row['answer']}", True)


def measured(directory: Path, answer: Callable[[str, bool], Said], limit: int = 32) -> dict[str, Any]:
    asker: Any = Scripted(Tokenizer.load(directory), answer)
    return run_format(asker, "builtin:reasoning/eval", limit=limit)


def test_an_obedient_model_is_perfect(directory: Path) -> None:
    result = measured(directory, obedient)
    assert (result["accuracy"], result["total"]) == (1.0, 64)
    assert result["answers"]["accuracy"] == 1.0
    assert set(result["by_category"]["zh"]) == {"thinking", "direct"}
    kinds = ("addition", "subtraction", "comparison", "chain")
    assert set(result["answers"]["by_category"]["en"]) == {
        f"{m} / {k}" for m in result["faults"] for k in kinds
    }
    assert result["faults"] == {"thinking": {}, "direct": {}}
    assert result["switch"] is True
    assert result["thought_chars"] > 5
    assert len(result["samples"]) == 20


def test_each_mode_is_judged_by_its_own_rule(directory: Path) -> None:
    always = measured(directory, lambda question, _: obedient(question, True))
    never = measured(directory, lambda question, _: obedient(question, False))
    for result, mode, fault in (
        (always, "direct", "thinks though it should not"),
        (never, "thinking", "no think block"),
    ):
        assert result["accuracy"] == 0.5
        assert result["faults"][mode] == {fault: 32}
        assert result["by_category"]["en"][mode]["correct"] == 0
        assert result["answers"]["accuracy"] == 1.0  # what is said is right all the same


def test_empty_thinking_cut_answers_and_wrong_ones_count(directory: Path) -> None:
    empty = measured(directory, lambda q, t: Said("<think>\n\n</think>\n\n1" if t else "1", True))
    assert empty["faults"]["thinking"] == {"empty think block": 32}
    assert empty["answers"]["accuracy"] < 0.2
    cut = measured(directory, lambda q, t: Said(obedient(q, t).text, False))
    assert cut["faults"]["direct"] == {"cut before its end": 32}


def test_a_real_model_with_two_questions_a_mode(directory: Path) -> None:
    result = run_task("format:builtin:reasoning/eval", *load_model(directory), limit=2, max_new_tokens=4)
    assert result["total"] == 4
    assert result["accuracy"] == 0.0  # it never thinks, and never ends
    assert result["faults"]["thinking"] == {"no think block": 2}
    json.dumps(result)


def test_files_of_prompts_and_conversations(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    chinese = next(row for row in ROWS if "多少" in row["question"])
    rows = [
        {"question": ROWS[0]["question"], "answer": ROWS[0]["answer"]},
        {"conversations": [{"from": "human", "value": chinese["question"]}, {"from": "gpt", "value": "x"}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asker: Any = Scripted(Tokenizer.load(directory), obedient)
    result = run_format(asker, file)
    assert (result["correct"], result["total"]) == (4, 4)
    assert result["answers"]["total"] == 2  # of the other nothing is known
    assert set(result["by_language"]) == {"en", "zh"}
    file.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.jsonl:1"):
        run_format(asker, file)
