"""What preferences and distillation learn from: references, teachers, the model's own answers, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_support import chat_model
from collect_fake_server import FakeTeacher, said
from data_tools import chat, write_jsonl

from kllm.config.align import RolloutSection
from kllm.config.load import make_recipe
from kllm.errors import KllmError, UserError, UserErrors
from kllm.observe.console import QuietReporter
from kllm.run.collect_journal import Reply
from kllm.run.collect_prompts import read_prompt
from kllm.run.context import StageContext
from kllm.run.judge import judge_of, mark_of
from kllm.run.training import TrainingRun

SIZES = [
    "dataset.seq_len=64", "train.batch_tokens=256", "train.micro_batch_tokens=256", "train.steps=2",
    "train.compile=off", "train.dtype=float32", "log.sinks=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("align")
    chat_model(where / "model", context=512)
    write_jsonl(where / "chats.jsonl", [chat(f"the cat {i}", "the mat") for i in range(12)])
    pairs = [{"prompt": f"the cat {i}", "chosen": "the mat", "rejected": "a fish"} for i in range(30)]
    write_jsonl(where / "pairs.jsonl", pairs)
    return where


def started(lab: Path, kind: str, *more: str, out: Path | None = None) -> TrainingRun:
    """A stage up to its first step."""
    data = "pairs.jsonl" if kind == "dpo" else "chats.jsonl"
    given = [f"data={lab / data}", f"model.path={lab / 'model'}", f"dataset.cache_dir={lab / 'cache'}"]
    if kind == "distill":
        given.append(f"teacher.path={lab / 'model'}")
    recipe = make_recipe(kind, [*given, *SIZES, *more]).recipe
    out = out or lab / "run"
    inputs = {"model": lab / "model"} | ({"teacher": lab / "model"} if kind == "distill" else {})
    stage: Any = recipe.stages[0]
    return TrainingRun(StageContext(recipe, stage, out / "01", out, inputs, QuietReporter(), device="cpu"))


def test_a_reference_is_of_the_model_as_it_is_trained(lab: Path) -> None:
    plain, other = (started(lab, "dpo", *more) for more in ((), ("model.rope_theta=100",)))
    then, now = (run.source.take(1)[0].extras["reference"] for run in (plain, other))
    assert (then - now).abs().max() > 1e-3
    assert (then - started(lab, "dpo").source.take(1)[0].extras["reference"]).abs().max() == 0


def test_a_teacher_is_kept_by_the_precision_it_ran_in(lab: Path) -> None:
    kinds = [started(lab, "distill", "distill.top_k=4", f"train.dtype={x}") for x in ("float32", "bfloat16")]
    then, now = (run.source.take(1)[0].extras["teacher_logprobs"] for run in kinds)
    assert (then - now).abs().max() > 0


ONLINE = ["online=true", "rollout.reward=brief", "rollout.max_tokens=8", "rollout.samples=2"]


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_without_reference_warns_of_held_out_answers(
    loss: str, lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = started(lab, "dpo", f"preference.loss={loss}", "dataset.val_fraction=0.3")
    assert run._held_out(run.model)["val/chosen_drift"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        run.model.lm_head.weight *= -1
    assert run._held_out(run.model)["val/chosen_drift"] < -0.5
    assert capsys.readouterr().err.count("chosen answers have lost") == 1


@pytest.mark.parametrize("base", ["none", "int4"])
def test_online_with_an_adapter_needs_no_second_model(
    base: str, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kllm.run.rollouts.copy", None)
    prompts = f"rollout.prompts={lab / 'chats.jsonl'}"
    run = started(
        lab, "dpo", *ONLINE, prompts, "lora.rank=2", f"lora.base={base}", "dataset.val_fraction=0.3"
    )
    (batch,) = run.source.take(1)
    assert not batch.extras and run.objective.reference == "adapters_off"  # type: ignore[attr-defined]
    assert float(run.objective(run.model, batch).metrics["pref/kl"][0]) == pytest.approx(0, abs=1e-4)
    assert run._held_out(run.model)["val/chosen_drift"] == pytest.approx(0, abs=1e-4)


def test_online_without_an_adapter_is_annotated(lab: Path) -> None:
    run = started(lab, "dpo", *ONLINE, f"rollout.prompts={lab / 'chats.jsonl'}")
    assert run.source.take(1)[0].extras.keys() == {"reference"}


def test_match_wants_prompts_with_answers_before_anything_is_sampled(lab: Path) -> None:
    with pytest.raises(UserError, match=r"chats\.jsonl:1: the prompt has no known answer"):
        started(lab, "dpo", *ONLINE, "rollout.reward=match", f"rollout.prompts={lab / 'chats.jsonl'}")


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("dpo", ["online=true", "rollout.max_tokens=64"], "no room for a prompt"),
        ("distill", ["distill.on_policy=1", "rollout.max_tokens=64", "teacher=t"], "no room for a prompt"),
        ("distill", ["distill.top_k=4", "distill.hidden_weight=1", "teacher=t"], "keeps no hidden states"),
    ],
)
def test_what_cannot_be_is_refused_with_the_recipe(kind: str, given: list[str], words: str) -> None:
    with pytest.raises(UserErrors, match=words):
        make_recipe(kind, [*SIZES, *given])
    given = [*given, "model.path=m"]
    make_recipe(kind, [*SIZES, *(x.replace("=64", "=63").replace("weight=1", "weight=0") for x in given)])


def test_what_is_too_long_is_said(lab: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i}", "chosen": "the mat" * (1 + i % 3 // 2 * 90), "rejected": "a"} for i in range(1, 41)
    ]
    run = started(lab, "dpo", f"data={write_jsonl(tmp_path / 'long.jsonl', rows)}")
    assert "left out: 13 of 40 pairs, too long for dataset.seq_len" in run._header(False)["data"]


# ---- who marks the answers

ASKED = read_prompt({"prompt": "What is 2 + 2?", "answer": "4"})


@pytest.mark.parametrize(
    ("content", "mark"),
    [
        ("7", 7), ("**8.5**", 8.5), ("7/10", 7), ("9 / 10. It has 2 flaws.", 9), ("out of 10 I give 3", 3),
        ("The mark of 10 is for perfect. I give 3.", 3), ("Score: 3 (out of 10)", 3), ("0-10 scale: 7", 7),
        ("clear 8/10, right 6/10, in all 7/10", 7), ("<think>\nitem 1 of 2\n</think>\n\n6", 6),
        ("first 9, but 2\n</think>\n\n6", 6), ("我给7分", 7), ("7分（满分10分）", 7), ("GPT-4 says 10", 10),
    ],
)  # fmt: skip
def test_the_mark_is_the_number_that_is_meant(content: str, mark: float) -> None:
    assert mark_of(Reply({"content": content}), "judge") == mark


@pytest.mark.parametrize(
    ("content", "finish", "words"),
    [
        ("The mark of 10 is for", "length", "is cut"),
        ("<think>\nLet me see, item 1 of 2", "stop", "thinking never ends"),
        ("no idea", "stop", "no number: 'no idea'"),
        ("42", "stop", "42 is not between 0 and 10"),
        ("-3", "stop", "-3 is not between"),
    ],
)
def test_what_is_no_mark_is_a_failure(content: str, finish: str, words: str) -> None:
    with pytest.raises(KllmError, match=words):
        mark_of(Reply({"content": content}, finish), "judge")


def test_a_judge_is_asked_not_to_think_where_it_knows_how() -> None:
    def strict(body: dict[str, Any], before: int) -> Any:
        unknown = "chat_template_kwargs" in body
        error = {"error": {"message": "Unrecognized request argument: chat_template_kwargs"}}
        return (400, error) if unknown else said("5")

    for answer, asked in ((lambda body, before: said("7"), 2), (strict, 4)):
        with FakeTeacher(answer).listening() as server:
            marks = judge_of(RolloutSection(reward=server.url))([(ASKED, "4"), (ASKED, "5")])
        assert marks == ([7, 7] if asked == 2 else [5, 5]) and len(server.asked) == asked
        assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


def fails(messages: Any, text: str, answer: Any) -> Any:
    raise RuntimeError("boom")


def gives_none(messages: Any, text: str, answer: Any) -> Any:
    return None


def gives_nan(messages: Any, text: str, answer: Any) -> float:
    return float("nan")


@pytest.mark.parametrize(
    ("name", "words"), [("fails", "boom"), ("gives_none", "NoneType"), ("gives_nan", "nan is no mark")]
)
def test_a_reward_of_ones_own_that_fails_is_said_in_one_line(name: str, words: str) -> None:
    judge = judge_of(RolloutSection(reward=f"{__name__}:{name}"))
    with pytest.raises(UserError, match=rf"rollout.reward: {__name__}:{name}: .*{words}"):
        judge([(ASKED, "4")])


def test_a_module_that_cannot_be_loaded_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="cannot load broken_reward:f: division by zero"):
        judge_of(RolloutSection(reward="broken_reward:f"))


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["kind=dpo", "rollout.reward=http://user:s3cret@host/v1"], "OPENAI_API_KEY"),
        (
            ["kind=distill", "prompts=p", "from_endpoint=https://host/v1?api_key=s3cret"],
            "collect.api_key_env",
        ),
        (["kind=distill", "prompts=p", "from_endpoint=http://u:s3cret@host"], "collect.api_key_env"),
    ],
)
def test_no_address_holds_a_key(given: list[str], hint: str) -> None:
    kind, *rest = given
    with pytest.raises(UserErrors, match=hint) as error:
        make_recipe(kind.removeprefix("kind="), rest)
    assert "s3cret" not in str(error.value)
