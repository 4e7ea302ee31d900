"""Results as tables: every task's counts and figures are shown, whatever it counts."""

from __future__ import annotations

from kllm.eval.scoring import tally
from kllm.run.results import sample_answers, tables

MARKS = [("en", "name", True), ("zh", "name", False), ("en", "home", True)]


def test_a_task_that_counts_exact_answers() -> None:
    result = {"builtin:world": {"task": "builtin:world", **tally(MARKS), "style": "chat", "samples": []}}
    (table,) = tables(result)
    assert table.title == "builtin:world: exact answers 66.7% (2/3)"
    assert table.columns == ("category", "en", "zh")
    assert table.rows == [
        ("name", "100.0% (1/1)", "0.0% (0/1)"),
        ("home", "100.0% (1/1)", ""),
        ("all", "100.0% (2/2)", "0.0% (0/1)"),
    ]


def test_other_counts_and_figures_of_a_task() -> None:
    result = {
        "format:x": {
            "task": "format:x",
            **tally(MARKS),
            "measure": "answers in form",
            "answers": {**tally(MARKS[:1])},
            "faults": {"thinking": {"no think block": 2}, "direct": {}},
            "thought_chars": 12.5,
            "switch": True,
            "samples": [],
        },
        "val/loss": 1.5,
    }
    figures, form, answers, faults = tables(result)
    assert figures.rows == [("val/loss", "1.5")]
    assert form.title == "format:x: answers in form 66.7% (2/3)"
    assert answers.title == "format:x / answers: exact answers 100.0% (1/1)"
    assert faults.title == "format:x: figures"
    assert faults.rows == [("faults / thinking / no think block", "2"), ("thought_chars", "12.5")]


def test_samples_say_whether_they_are_exact_or_right() -> None:
    sample = {"question": "q", "answer": "a", "expected": "b", "correct": False}
    found = sample_answers(
        {"one": {"samples": [sample]}, "two": {"samples": [sample], "measure": "x"}, "n": 3}
    )
    assert [table.columns[-1] for table in found] == ["exact", "right"]
    assert found[0].rows == [("q", "a", "b", "no")]
