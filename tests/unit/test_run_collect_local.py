"""A teacher in this process: batched answers are those of each question alone, thinking is told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_support import chat_model
from collect_support import job_of, prompts_file, rows_of, run

from kllm.engine import Engine, SamplingParams
from kllm.errors import KllmError, UserError
from kllm.export.load import load_model
from kllm.observe.console import QuietReporter
from kllm.run import collect_local
from kllm.run.collect import collect
from kllm.run.collect_client import Sampling
from kllm.run.collect_filter import Rules
from kllm.tokenizer.chat import ChatEncoder

ANY = Rules(language="any", refusals=False, max_repetition=1.0)
SAMPLING = Sampling(max_tokens=40, temperature=1.0, top_p=0.9, extra={"top_k": 40, "stop": ["a", "e", "世"]})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "teacher", context=256)


def journal(folder: Path) -> dict[str, Any]:
    return {json.dumps([row["id"], row["sample"]]): row for row in rows_of(folder / "out.jsonl.answers")}


def test_batched_answers_are_those_of_each_question_alone(tmp_path: Path, teacher: Path) -> None:
    prompts_file(tmp_path, 10)
    options: dict[str, Any] = {
        "sampling": SAMPLING,
        "rules": ANY,
        "samples": 3,
        "best": "longest",
        "device": "cpu",
    }
    report = run(tmp_path, str(teacher), parallel=7, **options)
    assert (
        report.model == "teacher"
        and report.requests == 30
        and report.completion_tokens > 100
        and report.kept > 3
    )
    alone = tmp_path / "alone"
    alone.mkdir()
    prompts_file(alone, 10)
    run(alone, str(teacher), parallel=1, **options)
    assert journal(alone) == journal(tmp_path)
    assert (alone / "out.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    texts = {row["message"]["content"] for row in journal(alone).values()}
    assert len(texts) > 15, "every answer has a seed of its own"


def test_a_greedy_answer_is_the_engines(tmp_path: Path, teacher: Path) -> None:
    prompts_file(tmp_path, 2)
    greedy = Sampling(max_tokens=12, temperature=0.0, top_p=1.0)
    with pytest.raises(KllmError, match="no answer passed: cut by max_tokens 2"):
        run(tmp_path, str(teacher), sampling=greedy, rules=ANY, device="cpu")
    model, tokenizer = load_model(teacher)
    assert tokenizer is not None
    for row, prompt in zip(
        rows_of(tmp_path / "out.jsonl.answers"), rows_of(tmp_path / "prompts.jsonl"), strict=True
    ):
        ids = ChatEncoder(tokenizer).prompt([{"role": "user", "content": prompt["prompt"]}])
        (done,) = Engine(model.eval(), tokenizer).generate(
            [ids], SamplingParams(max_tokens=12, temperature=0.0, top_p=1.0)
        )
        assert (
            row["message"]["content"] == done.text and row["finish_reason"] == done.finish_reason == "length"
        )
        assert (row["prompt_tokens"], row["completion_tokens"]) == (len(ids), 12)


def test_a_finished_collection_does_not_load_the_model(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts_file(tmp_path, 2)
    options: dict[str, Any] = {"sampling": SAMPLING, "rules": ANY, "device": "cpu", "samples": 8}
    assert run(tmp_path, str(teacher), **options).kept
    monkeypatch.setattr(collect_local, "LocalTeacher", None)
    assert run(tmp_path, str(teacher), **options).requests == 0
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in teacher.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert run(tmp_path, str(copy), **options).requests == 0, "the content counts, not the place"
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(TypeError):
        run(tmp_path, str(copy), **options)  # other weights: it would be asked


def test_a_question_that_does_not_fit_costs_only_itself(tmp_path: Path, teacher: Path) -> None:
    prompts_file(tmp_path, 2)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "the cat " * 300}) + "\n")
    report = run(tmp_path, str(teacher), sampling=SAMPLING, rules=ANY, device="cpu", samples=8)
    assert report.failed == {"the model cannot take it": 1} and report.requests >= 2


def test_thinking_that_the_template_opens_is_thinking(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer begins inside it: the opening tag is in the prompt."""
    folder = tmp_path / "thinker"
    folder.mkdir()
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = (folder / "chat_template.jinja").read_text()
    opening = "{%- if add_generation_prompt and enable_thinking %}{{- '<think>\\n' }}{%- endif %}"
    (folder / "chat_template.jinja").write_text(template + opening)
    prompts_file(tmp_path, 1)
    seen = []
    for thinking in (True, False):
        sampling = replace(SAMPLING, enable_thinking=thinking)
        with pytest.raises(
            KllmError, match="no answer passed: the thinking never ends 1" if thinking else "."
        ):
            run(tmp_path, str(folder), sampling=sampling, rules=replace(ANY, min_chars=999), device="cpu")
        seen.append(rows_of(tmp_path / "out.jsonl.answers")[-1]["message"]["content"])
    assert seen[0].startswith("<think>\n") and not seen[1].startswith("<think>")


def test_wrong_models_and_options_are_said(tmp_path: Path, teacher: Path) -> None:
    prompts_file(tmp_path, 1)
    bare = chat_model(tmp_path / "bare", template=False)
    with pytest.raises(UserError, match="no chat template"):
        run(tmp_path, str(bare), device="cpu")
    with pytest.raises(UserError, match="no option 'frequency'"):
        run(tmp_path, str(teacher), sampling=Sampling(extra={"frequency": 1}))
    with pytest.raises(UserError, match="top_p"):
        run(tmp_path, str(teacher), sampling=Sampling(top_p=1.5))
    with pytest.raises(UserError, match="nowhere"):
        run(tmp_path, str(tmp_path / "nowhere"))


def test_an_engine_that_breaks_ends_the_run(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts_file(tmp_path, 6)

    def broken(self: Engine) -> Any:
        raise RuntimeError("the step went wrong")

    monkeypatch.setattr(Engine, "step", broken)
    with pytest.raises(RuntimeError, match="the step went wrong"):
        collect(job_of(tmp_path, str(teacher), device="cpu"), QuietReporter())
