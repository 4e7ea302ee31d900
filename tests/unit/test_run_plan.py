"""`--dry-run` says what would happen and what it costs, and writes nothing; so does `kllm info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_support import FakeWork, load, write_recipe

from kllm.errors import UserError
from kllm.model.presets import PRESETS, count_parameters, flops_per_token, parameters_by_part
from kllm.run import info, plan, speeds
from kllm.run.listing import describe, find_runs
from kllm.run.pipeline import run_recipe
from kllm.run.rundir import RunDir
from kllm.run.shapes import fresh_shape, steps_and_tokens, training_memory, vocab_of_directory


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWork:
    fake = FakeWork()
    monkeypatch.setattr("kllm.run.work.do_work", fake)
    monkeypatch.setattr("kllm.observe.plots.available", lambda: False)
    monkeypatch.chdir(tmp_path)
    return fake


def run(folder: Path, **options: object) -> int:
    return run_recipe(load(folder), in_process=True, reporter_mode="quiet", **options)  # type: ignore[arg-type]


def test_dry_run_is_quick_writes_nothing_and_loads_no_torch(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code = (
        "import sys\n"
        "from kllm.cli.app import main\n"
        "try: main(['run', '--recipe', 'recipe.yaml', '--dry-run', '--json'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    began = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    spent = os.times().children_user - began
    assert done.returncode == 0, done.stderr.decode()
    assert spent < 3.0
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    table = next(row for row in rows if row["event"] == "table")
    assert [row[0] for row in table["rows"]] == ["tokenizer", "pretrain", "sft", "eval"]
    spans = [row for row in rows if row["event"] == "spans"]
    assert len(spans) == 2
    assert all(piece["trained"] for piece in spans[0]["spans"])
    chat = spans[1]["spans"]
    assert [piece["trained"] for piece in chat][:2] == [False, True]
    assert chat[0]["text"].endswith("assistant\n") and chat[1]["text"].endswith("<|im_end|>")


def test_the_plan_counts(work: FakeWork, tmp_path: Path) -> None:
    loaded = load(tmp_path)
    names = [s.name for s in loaded.recipe.stages]
    plans = {p.decision.name: p for p in plan.make_plan(loaded, RunDir(tmp_path / "run"), names, [])}
    shape = PRESETS["k-tiny"].with_(vocab_size=400)
    pretrain = plans["pretrain"]
    assert pretrain.parameters == count_parameters(shape)
    assert (pretrain.steps, pretrain.tokens) == (4, 2048)
    assert pretrain.flops == flops_per_token(shape, 128) * 2048
    assert pretrain.seconds is None
    assert plans["sft"].parameters == pretrain.parameters


def test_the_plan_knows_what_is_done_and_how_fast_it_was(work: FakeWork, tmp_path: Path) -> None:
    run(tmp_path, until="pretrain")
    loaded = load(tmp_path, "pretrain.optim.lr=1")
    names = ["tokenizer", "pretrain", "sft"]
    plans = plan.make_plan(loaded, RunDir(Path("runs/small")), names, [])
    assert [p.decision.action for p in plans] == ["skip", "rerun", "run"]
    speed = speeds.recall(Path("runs/small"), "auto", 1)
    assert speed is not None and speed["tok_s"] == 100.0
    assert plans[1].seconds == pytest.approx(plans[1].flops / speed["flops_s"])  # type: ignore[operator]
    assert speeds.recall(Path("runs/small"), "cuda", 1) is None
    assert speeds.recall(Path("runs/small"), "auto", 8) is None


def test_what_follows_a_change_may_change(work: FakeWork, tmp_path: Path) -> None:
    run(tmp_path)
    loaded = load(tmp_path, "pretrain.optim.lr=1")
    plans = plan.make_plan(loaded, RunDir(Path("runs/small")), ["tokenizer", "pretrain", "sft", "eval"], [])
    assert [p.decision.action for p in plans] == ["skip", "rerun", "wait", "wait"]
    assert plans[2].decision.reason == "after pretrain, if its result changes"


def test_all_mistakes_come_in_one_pass_with_their_lines(tmp_path: Path) -> None:
    text = """\
name: bad
stages:
  - {{stage: tokenizer, data: [nothing.jsonl]}}
  - stage: pretrain
    model: {{preset: k-smal}}
    data: [empty.jsonl]
  - {{stage: eval, tasks: [arithmetic]}}
"""
    (tmp_path / "empty.jsonl").write_text("")
    text = text.replace("empty.jsonl", str(tmp_path / "empty.jsonl"))
    loaded = load(tmp_path, text=text)
    with pytest.raises(UserError) as caught:
        plan.make_plan(loaded, RunDir(tmp_path / "run"), ["tokenizer", "pretrain", "eval"], [])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and caught.value.exit_code == 2
    for line, parts in zip(
        lines,
        [
            ("recipe.yaml:3", "nothing.jsonl", "no such file"),
            ("recipe.yaml:6", "empty.jsonl", "empty"),
            ("recipe.yaml:5", "k-smal", "did you mean k-small?"),
            ("recipe.yaml:7", "arithmetic", "builtin:world"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line


def test_a_shape_without_exact_target_is_refused(tmp_path: Path) -> None:
    loaded = load(tmp_path, "pretrain.model.qk_norm=true", "pretrain.model.attention_bias=true")
    with pytest.raises(UserError, match="no exact target"):
        plan.make_plan(loaded, RunDir(tmp_path / "run"), ["pretrain"], [])


def test_steps_follow_from_tokens_and_epochs(tmp_path: Path) -> None:
    def of(*overrides: str) -> tuple[int | None, int | None]:
        stage = load(tmp_path, "pretrain.train.steps=null", *overrides).recipe.stage("pretrain")
        return steps_and_tokens(stage, 5000)  # type: ignore[arg-type]

    assert of("pretrain.train.tokens=5000") == (10, 5120)
    assert of("pretrain.train.epochs=2") == (20, 10240)


def test_memory_parts_are_exact_where_they_can_be() -> None:
    shape = PRESETS["k-small"]
    n = count_parameters(shape)
    memory = training_memory(shape, 4096)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * n, 4 * n, 8 * n)
    assert memory.total == 16 * n + memory.activations
    assert training_memory(shape, 8192).activations > 1.5 * memory.activations
    assert training_memory(shape, 4096, checkpointing=True).activations < 0.3 * memory.activations
    assert training_memory(shape, 4096, optimizer="muon").optimizer < memory.optimizer


ADAPTER = ("sft.lora.rank=4", "sft.lora.base=int4")


def test_an_adapter_is_checked_before_it_is_trained(tmp_path: Path) -> None:
    for override, words in (
        ("sft.lora.targets=[q_porj]", "'q_porj' matches no layer"),
        ("sft.lora.targets=[experts]", "'experts' matches no layer"),
        ("sft.lora.rank=129,sft.lora.init=pissa", "k_proj is 128 x 256: it has no 129 singular values"),
    ):
        loaded = load(tmp_path, *ADAPTER, *override.split(","))
        with pytest.raises(UserError, match=words):
            plan.make_plan(loaded, RunDir(tmp_path / "run"), ["tokenizer", "pretrain", "sft"], [])


def test_the_plan_counts_an_adapter_alone(tmp_path: Path) -> None:
    """Its gradients and moments, the base at its width, no gradient of a frozen weight."""
    loaded = load(tmp_path, *ADAPTER)
    shape = PRESETS["k-tiny"].with_(vocab_size=400)
    n, parts = count_parameters(shape), parameters_by_part(shape)
    *_, found = plan.make_plan(loaded, RunDir(tmp_path / "run"), ["tokenizer", "pretrain", "sft"], [])
    trained = 4 * 4 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + shape.intermediate_size))
    matrices = parts["attention"] + parts["mlp"]
    assert found.memory is not None and found.flops is not None and found.tokens is not None
    assert (found.memory.gradients, found.memory.optimizer) == (4 * trained, 8 * trained)
    assert found.memory.weights == 4 * (n - matrices + trained) + 0.75 * matrices
    whole, weights = flops_per_token(shape, 1024), flops_per_token(shape) / 6
    assert found.flops / found.tokens == pytest.approx(whole - 2 * weights + 6 * trained)


def test_a_planned_adapter_is_the_one_that_is_trained() -> None:
    from kllm.config.align import LoraOnSection
    from kllm.model.lora import add_lora, lora_parameters
    from kllm.model.transformer import Transformer
    from kllm.run.assemble import lora_config, planned_adapter

    shape = PRESETS["k-moe"].with_(
        hidden_size=32, num_hidden_layers=2, vocab_size=50, moe_intermediate_size=16
    )
    section = LoraOnSection(rank=3, targets=["all", "experts", "router"], use_dora=True, base="int8")
    model = Transformer(shape)
    add_lora(model, lora_config(section), 0)
    planned = planned_adapter(section, shape)
    assert planned.trained == sum(p.numel() for p in lora_parameters(model).values())
    experts = sum(p.numel() for n, p in lora_parameters(model).items() if ".experts." in n)
    idle = shape.num_experts - shape.num_experts_per_tok
    assert planned.active == planned.trained - experts * idle // shape.num_experts
    frozen = [m for n, m in model.named_modules() if n.endswith("q_proj.base")]
    stored = sum(t.numel() * t.element_size() for m in frozen for t in m.parts())
    weights = sum(m.shape.numel() for m in frozen)
    assert planned.base_bytes * weights == pytest.approx(stored, rel=0.15)  # and a scale for every row


def test_vocabulary_is_read_without_the_tokenizer(tmp_path: Path) -> None:
    assert vocab_of_directory(tmp_path) is None
    spec = {"model": {"vocab": {"a": 0, "b": 9}}, "added_tokens": [{"id": 12, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert vocab_of_directory(tmp_path) == 13


def test_info_of_presets_and_paths(work: FakeWork, tmp_path: Path) -> None:
    found = info.facts("k-small", info.find_shape("k-small"), 1024, 8192)
    assert found["parameters"]["total"] == 25_829_888
    assert sum(found["parameters"]["by_part"].values()) == 25_829_888
    assert found["memory"]["training"]["total"] == sum(
        v for k, v in found["memory"]["training"].items() if k != "total"
    )
    with pytest.raises(UserError, match="did you mean k-small"):
        info.find_shape("k-smal")
    run(tmp_path, until="pretrain")
    assert info.find_shape("runs/small").vocab_size == 400
    assert {info.summary(name)["parameters"] for name in PRESETS} >= {25_829_888, 104_030_976}


def test_an_override_of_the_width_keeps_the_heads_exact(tmp_path: Path) -> None:
    loaded = load(tmp_path, "pretrain.model.hidden_size=512")
    shape = fresh_shape(loaded.recipe.stage("pretrain").model, 400)  # type: ignore[union-attr]
    assert shape.head_dim == 128


def test_runs_are_listed_with_their_state_and_loss(work: FakeWork, tmp_path: Path) -> None:
    run(tmp_path, until="pretrain")
    run(tmp_path, out=tmp_path / "runs" / "other")
    found = {r["name"] + r["path"][-5:]: r for r in find_runs(tmp_path / "runs")}
    half, whole = describe(Path("runs/small")), describe(Path("runs/other"))
    assert len(found) == 2
    assert half["state"] == "unfinished" and whole["state"] == "done"
    assert half["loss"] == 0.75 and half["age"] < 60
    assert [s["state"] for s in half["stages"]] == ["done", "done", "pending", "pending"]
    assert find_runs(tmp_path / "runs" / "other")[0]["state"] == "done"
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "nowhere")
