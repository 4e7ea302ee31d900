"""What each command does with its arguments; the work behind it is replaced where it trains."""

from __future__ import annotations

import json
import sys
import types

import pytest
from test_cli_app import call

from kllm.config.load import load_recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def pipeline(monkeypatch):
    """Records the calls that reach `kllm.run.pipeline`."""
    calls = []
    module = types.ModuleType("kllm.run.pipeline")
    module.run_stage = lambda loaded, name, **options: calls.append((loaded, name, options)) or 0
    module.run_recipe = lambda loaded, **options: calls.append((loaded, None, options)) or 3
    monkeypatch.setitem(sys.modules, "kllm.run.pipeline", module)
    return calls


def test_pretrain_alone_trains_a_tokenizer_first(capsys, here, pipeline):
    code, _, _ = call(
        capsys, "pretrain", "--data", "a.jsonl@0.3", "--data", "b.txt", "--preset", "k-tiny", "--json"
    )
    assert code == 0
    ((loaded, name, given),) = pipeline
    assert name == "pretrain"
    assert [stage.name for stage in loaded.recipe.stages] == ["tokenizer", "pretrain"]
    assert loaded.recipe.name == "pretrain-k-tiny"
    assert [source.path for source in loaded.recipe.stage("tokenizer").data] == ["a.jsonl", "b.txt"]
    assert loaded.recipe.stage("pretrain").data[0].weight == 0.3
    assert given == {"out": None, "dry_run": False, "fresh": False, "reporter_mode": "json"}


@pytest.mark.parametrize("flag", ["--tokenizer", "--model"])
def test_pretrain_with_a_tokenizer_at_hand_has_one_stage(capsys, here, pipeline, flag):
    call(capsys, "pretrain", flag, "somewhere")
    assert [stage.name for stage in pipeline[0][0].recipe.stages] == ["pretrain"]


def test_out_names_the_run(capsys, here, pipeline):
    call(capsys, "sft", "--model", "runs/old", "--out", "runs/my chat", "--quiet", "--fresh")
    ((loaded, name, given),) = pipeline
    assert (loaded.recipe.name, name) == ("my-chat", "sft")
    assert given["out"].as_posix() == "runs/my chat"
    assert (given["reporter_mode"], given["fresh"]) == ("quiet", True)
    call(capsys, "sft", "--model", "user/Model-1.5")
    assert pipeline[1][0].recipe.name == "sft-Model-1.5"


def test_flags_win_over_set_and_set_over_the_recipe(capsys, here, pipeline):
    call(
        capsys,
        "pretrain",
        "--recipe",
        "quickstart",
        "--set",
        "optim.lr=5",
        "--set",
        "train.steps=9",
        "--lr",
        "6",
        "--set",
        "tokenizer.vocab_size=999",
        "--set",
        "sft.optim.lr=7",
    )
    ((loaded, name, _),) = pipeline
    stage = loaded.recipe.stage("pretrain")
    assert (name, stage.optim.lr, stage.train.steps, stage.train.tokens) == ("pretrain", 6, 9, None)
    assert loaded.recipe.stage("tokenizer").vocab_size == 999
    assert loaded.recipe.stage("sft").optim.lr == 7
    assert loaded.origins["pretrain.optim.lr"] == "flag --lr"


def test_eval_takes_its_model_as_an_argument(capsys, here, pipeline):
    call(capsys, "eval", "runs/x", "--limit", "5")
    ((loaded, name, _),) = pipeline
    assert (name, loaded.recipe.stage("eval").model.path, loaded.recipe.stage("eval").limit) == (
        "eval",
        "runs/x",
        5,
    )
    assert loaded.recipe.name == "eval-x"


def test_which_of_several_stages(capsys, here, pipeline):
    code, _, err = call(capsys, "eval", "--recipe", "quickstart")
    assert code == 2
    assert "--stage eval-pretrain|eval" in err
    call(capsys, "eval", "--recipe", "quickstart", "--stage", "eval-pretrain")
    assert pipeline[0][1] == "eval-pretrain"


def test_tokenizer_train(capsys, here, pipeline):
    call(
        capsys,
        "tokenizer",
        "train",
        "--data",
        "a.txt",
        "--vocab-size",
        "8k",
        "--max-bytes",
        "1GiB",
        "--dry-run",
    )
    ((loaded, name, given),) = pipeline
    stage = loaded.recipe.stage("tokenizer")
    assert (name, stage.vocab_size, stage.max_bytes, given["dry_run"]) == ("tokenizer", 8000, 1 << 30, True)


def test_run_hands_everything_on(capsys, here, pipeline):
    code, _, _ = call(
        capsys,
        "run",
        "--recipe",
        "quickstart",
        "--from",
        "sft",
        "--until",
        "eval",
        "--force",
        "sft",
        "--only",
        "sft",
        "--only",
        "eval",
        "--smoke",
        "--dry-run",
        "--fresh",
        "--in-process",
        "--seed",
        "5",
        "--set",
        "sft.optim.lr=2",
        "--out",
        "x",
    )
    assert code == 3
    ((loaded, _, given),) = pipeline
    assert (loaded.recipe.seed, loaded.recipe.stage("sft").optim.lr) == (5, 2)
    assert given.pop("out").as_posix() == "x"
    assert given == {
        "from_": "sft",
        "until": "eval",
        "force": ["sft"],
        "only": ["sft", "eval"],
        "smoke": True,
        "dry_run": True,
        "fresh": True,
        "in_process": True,
        "reporter_mode": None,
    }


def test_the_real_pipeline_takes_these_arguments():
    """The recorded calls above fit the signatures they stand for."""
    import inspect

    pipeline = pytest.importorskip("kllm.run.pipeline")
    stage = inspect.signature(pipeline.run_stage).parameters
    assert {"out", "dry_run", "fresh", "reporter_mode"} <= set(stage)
    recipe = inspect.signature(pipeline.run_recipe).parameters
    wanted = {
        "out",
        "only",
        "from_",
        "until",
        "force",
        "dry_run",
        "smoke",
        "fresh",
        "in_process",
        "reporter_mode",
    }
    assert wanted <= set(recipe)


def test_recipe_ls(capsys, here):
    code, out, _ = call(capsys, "recipe", "ls", "--json")
    names = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert names["quickstart"]["stages"][0] == "tokenizer"
    assert "finetune-qwen3" in call(capsys, "recipe", "ls")[1]


def test_recipe_show_names_the_origin_of_every_value(capsys, here):
    (here / "r.yaml").write_text("stages:\n- stage: tokenizer\n- stage: pretrain\n  optim:\n    lr: 1e-4\n")
    _, out, _ = call(capsys, "recipe", "show", "r.yaml", "--set", "pretrain.train.steps=3")
    lines = {line.split(" = ")[0].strip(): line.split() for line in out.splitlines() if " = " in line}
    assert lines["pretrain.optim.lr"][2:] == ["0.0001", "r.yaml:5"]
    assert lines["pretrain.train.steps"][2:] == ["3", "flag", "--set"]
    assert lines["pretrain.optim.eps"][2:] == ["1e-08", "default"]
    assert lines["pretrain.model.hidden_size"][2:] == ["512", "preset", "k-small"]
    _, out, _ = call(capsys, "recipe", "show", "r.yaml", "--changed")
    assert "default" not in out
    _, out, _ = call(capsys, "recipe", "show", "r.yaml", "--json")
    assert json.loads(out)["pretrain.optim.lr"] == {"value": 1e-4, "origin": "r.yaml:5"}
    _, out, _ = call(capsys, "recipe", "show", "r.yaml", "--yaml")
    (here / "again.yaml").write_text(out)
    assert load_recipe("again.yaml").recipe == load_recipe("r.yaml").recipe
    _, out, _ = call(capsys, "recipe", "show", "quickstart", "--source")
    assert out.startswith("# yaml-language-server")


def test_recipe_cp(capsys, here):
    code, out, _ = call(capsys, "recipe", "cp", "quickstart", "mine.yaml")
    assert code == 0
    assert "kllm run --recipe mine.yaml" in out
    assert load_recipe("mine.yaml").recipe == load_recipe("quickstart").recipe
    assert "$schema=/" in (here / "mine.yaml").read_text().replace("\\", "/").replace("=C:", "=")
    code, _, err = call(capsys, "recipe", "cp", "small", "mine.yaml")
    assert code == 2
    assert "exists" in err
    assert call(capsys, "recipe", "cp", "small", "mine.yaml", "--force")[0] == 0
    assert call(capsys, "recipe", "cp", "moe", ".")[0] == 0
    assert (here / "moe.yaml").exists()


def test_recipe_check(capsys, here):
    (here / "good.yaml").write_text("stages: [{stage: tokenizer}]\n")
    (here / "bad.yaml").write_text("stages: [{stage: tokenizer, x: 1}]\n")
    (here / "preset.yaml").write_text(
        "stages:\n- stage: tokenizer\n- stage: pretrain\n  model: {preset: k-smal}\n"
    )
    (here / "shape.yaml").write_text(
        "stages:\n- stage: tokenizer\n- stage: pretrain\n  model: {head_dim: 63}\n"
    )
    assert call(capsys, "recipe", "check", "good.yaml")[:2] == (0, "good.yaml: ok\n")
    code, out, err = call(capsys, "recipe", "check", ".")
    assert code == 2
    assert out == "good.yaml: ok\n"
    assert len(err.splitlines()) == 3
    assert "preset.yaml:4: pretrain.model.preset: unknown preset 'k-smal' (did you mean k-small?)" in err
    assert "63 is odd" in err
    code, out, _ = call(capsys, "recipe", "check", ".", "--json")
    assert code == 2
    assert [row["ok"] for row in json.loads(out)] == [False, True, False, False]
    assert call(capsys, "recipe", "check")[0] == 0


def test_recipe_schema(capsys, here):
    _, out, _ = call(capsys, "recipe", "schema")
    assert "PretrainStage" in json.loads(out)["$defs"]
    assert call(capsys, "recipe", "schema", "--out", "s.json")[0] == 0
    assert json.loads((here / "s.json").read_text()) == json.loads(out)


def test_info_of_presets(capsys):
    code, out, _ = call(capsys, "info", "k-small", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"]["total"] == 25_829_888 == sum(facts["parameters"]["by_part"].values())
    assert facts["memory"]["training"]["weights"] == 4 * 25_829_888
    assert facts["memory"]["training"]["optimizer"] == 8 * 25_829_888
    assert facts["memory"]["inference"]["weights_bfloat16"] == 2 * 25_829_888
    assert facts["flops_per_token"]["training"] == 3 * facts["flops_per_token"]["inference"]
    text = call(capsys, "info", "k-moe")[1]
    assert "145,029,760 parameters" in text
    assert "experts" in text
    rows = json.loads(call(capsys, "info", "--json")[1])
    assert {"k-tiny", "k-base", "k3-moe"} <= {row["name"] for row in rows}
    assert "k-tiny" in call(capsys, "info")[1]
    bigger = json.loads(call(capsys, "info", "k-small", "--vocab-size", "10k", "--json")[1])
    assert bigger["parameters"]["total"] == 25_829_888 + (10_000 - 6400) * 512


def test_info_of_a_folder(capsys, here):
    (here / "m").mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (here / "m" / "config.json").write_text(json.dumps(config))
    facts = json.loads(call(capsys, "info", "m", "--json")[1])
    assert facts["shape"]["head_dim"] == 8
    assert (
        facts["parameters"]["total"] == 512 * 64 + 5 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 172 + 128) + 64
    )


def test_data_inspect(capsys, here):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
        {"oops": 1},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\nnot json\n"
    (here / "c.jsonl").write_text(text)
    code, out, _ = call(capsys, "data", "inspect", "c.jsonl")
    assert code == 0
    assert "openai (1 rows)" in out
    assert "1 good, 2 bad" in out
    assert "c.jsonl:2" in out
    assert "c.jsonl:3" in out
    assert "assistant: [Hello!" in out
    assert "\x1b" not in out
    facts = json.loads(call(capsys, "data", "inspect", "c.jsonl", "--json")[1])
    assert (facts["rows"], facts["bad_rows"]) == (1, 2)


def test_runs_ls(capsys, here):
    assert call(capsys, "runs", "ls", "--json")[1] == "[]\n"
    run = here / "runs" / "demo"
    (run / "01-tokenizer").mkdir(parents=True)
    stages = [
        {"name": "tokenizer", "kind": "tokenizer", "dir": "01-tokenizer"},
        {"name": "pretrain", "kind": "pretrain", "dir": "02-pretrain"},
    ]
    facts = {"format": 1, "name": "demo", "updated": "2026-01-01T00:00:00+00:00", "stages": stages}
    (run / "run.json").write_text(json.dumps(facts))
    status = {"state": "done", "result": {"vocab_size": 600}}
    (run / "01-tokenizer" / "status.json").write_text(json.dumps(status))
    (row,) = json.loads(call(capsys, "runs", "ls", "--json")[1])
    assert (row["name"], row["state"]) == ("demo", "unfinished")
    assert [stage["state"] for stage in row["stages"]] == ["done", "pending"]
    code, out, _ = call(capsys, "runs", "ls")
    assert code == 0
    assert "runs/demo" in out
    assert "1/2 (next: pretrain)" in out
    assert "vocab_size 600" in out
    result = {"val/loss": 1.5, "mem/peak": 9.0, "builtin:world": {"accuracy": 0.925}}
    (run / "01-tokenizer" / "status.json").write_text(json.dumps({"state": "done", "result": result}))
    assert "builtin:world 92.5%" in call(capsys, "runs", "ls")[1]


def test_chat_checks_its_flags_together(capsys):
    code, _, err = call(capsys, "chat", "m", "--temperature", "-1", "--top-p", "3", "--max-tokens", "abc")
    assert code == 2
    assert err.splitlines() == [
        "error: flag --max-tokens: expected a whole number, got 'abc'",
        "error: flag --temperature: must be at least 0, got '-1'",
        "error: flag --top-p: must be at most 1, got '3'",
    ]


def test_chat_hands_everything_on(capsys, monkeypatch):
    from kllm.chat import start

    calls = []
    monkeypatch.setattr(start, "run_chat", lambda options: calls.append(options) or 130)
    monkeypatch.setenv("KLLM_API_KEY", "sesame other")
    code, _, _ = call(
        capsys, "chat", "runs/x", "--temperature", "0", "--max-tokens", "1k", "-p", "Hi", "--seed", "4",
        "--tools", "clock", "--tools", "calculator", "--no-think", "--system", "S", "--no-history", "--codeact",
    )  # fmt: skip
    assert code == 130
    assert calls == [
        start.ChatOptions(
            model="runs/x", prompt="Hi", system="S", thinking=False, tools=("clock", "calculator"), codeact=True,
            keep_history=False, api_key="sesame", sampling={"temperature": 0.0, "max_tokens": 1000, "seed": 4},
        )
    ]  # fmt: skip
    assert "sesame" not in repr(calls[0]), "keys are not logged"


def test_chat_defaults_are_those_of_the_engine():
    from dataclasses import asdict

    params = pytest.importorskip("kllm.engine.params")
    from kllm.config.parts import SamplingSection

    own = SamplingSection().model_dump()
    assert own == {name: value for name, value in asdict(params.SamplingParams()).items() if name in own}
