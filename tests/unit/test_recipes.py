"""Every shipped recipe is valid, says what it costs, and comes along with an installation."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from kllm.cli.recipes import title_of
from kllm.cli.resolved import preset_errors, resolved_rows
from kllm.config.dump import dump_yaml
from kllm.config.jsonschema import recipe_schema
from kllm.config.load import load_recipe
from kllm.config.shipped import recipes_dir, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
EXPECTED = {"quickstart", "small", "base", "moe", "finetune-qwen3", "reasoning"}


def test_they_are_found():
    assert len(FILES) >= 6
    assert set(shipped_recipes()) >= EXPECTED
    assert sorted(path.resolve() for path in shipped_recipes().values()) == FILES
    assert recipes_dir() is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_valid_and_round_trip(path, tmp_path):
    loaded = load_recipe(path)
    assert loaded.recipe.name == path.stem
    assert list(preset_errors(loaded)) == []
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(loaded.recipe, loaded.origins), encoding="utf-8")
    assert load_recipe(again).recipe == loaded.recipe
    assert {key for key, _, _ in resolved_rows(loaded)} >= {"name", "seed"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_says_what_it_costs(path):
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nname:") if "\nname:" in text else 0]
    assert header.startswith("# yaml-language-server: $schema=schema.json\n")
    assert len(title_of(text)) > 20
    assert "Cost" in header
    assert "CPU" in header
    assert "RTX 3090" in header
    assert re.search(r"estimated from FLOPs|measured", header)
    assert f"kllm run --recipe {path.stem}" in header


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_commands_in_the_header_are_right(path):
    """Keys that a header tells people to set exist."""
    text = path.read_text(encoding="utf-8")
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    keys = re.findall(r"--set '?([\w.\-]+)=", header)
    load_recipe(path, [f"{key}={_value(key)}" for key in keys])


def _value(key):
    return {"tokens": "20M", "epochs": "1", "loss": "simpo"}.get(key.rpartition(".")[2], "x.jsonl")


def test_costs_in_the_headers_follow_from_the_sizes():
    """The FLOPs per token that headers state are those of the arithmetic, within rounding."""
    from kllm.model.presets import flops_per_token, get_preset

    checked = 0
    for path in FILES:
        loaded = load_recipe(path)
        text = path.read_text(encoding="utf-8").replace("\n# ", " ")
        stated = [float(number) for number in re.findall(r"(\d+) MFLOP/token", text)]
        for stage in loaded.recipe.stages:
            preset = getattr(getattr(stage, "model", None), "preset", None)
            if preset and stated and stage.stage == "pretrain":
                exact = flops_per_token(get_preset(preset), stage.dataset.seq_len) / 1e6
                assert stated[0] == pytest.approx(exact, rel=0.01), path
                checked += 1
    assert checked >= 3


def test_quickstart_needs_no_network_and_shows_both_models():
    recipe = load_recipe("quickstart").recipe
    assert all(source.path.startswith("builtin:") for stage in recipe.stages[:2] for source in stage.data)
    evals = [stage for stage in recipe.stages if stage.stage == "eval"]
    assert [recipe.inputs(stage.name)["model"] for stage in evals] == [
        "stage:pretrain",
        "stage:sft",
        "stage:dpo",
    ]


def test_reasoning_weighs_its_tags():
    stage = load_recipe("reasoning").recipe.stage("sft")
    assert stage.train.token_weights == {"<think>": 10, "</think>": 10}
    assert 0 < stage.dataset.keep_empty_think < 1


def test_fine_tuning_takes_the_tokenizer_of_the_hub_model():
    recipe = load_recipe("finetune-qwen3").recipe
    assert recipe.inputs("sft") == {"model": "Qwen/Qwen3-0.6B", "tokenizer": "Qwen/Qwen3-0.6B"}


def test_schema_file_is_fresh():
    """After a change of the options: kllm recipe schema --out recipes/schema.json"""
    stored = json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8"))
    assert skeleton(stored) == skeleton(recipe_schema())


def skeleton(schema):
    """What must not go stale; the exact wording of a schema differs between versions of pydantic."""
    sections = {"recipe": schema, **schema["$defs"]}
    return {
        name: {key: option.get("description") for key, option in _properties(section).items()}
        for name, section in sections.items()
    }


def _properties(section):
    return section["properties"] if "properties" in section else section["anyOf"][1]["properties"]


def test_schema_accepts_the_recipes_and_refuses_typos():
    jsonschema = pytest.importorskip("jsonschema")
    from kllm.config.yamlfile import parse_yaml

    validator = jsonschema.Draft202012Validator(recipe_schema())
    for path in FILES:
        data = parse_yaml(path.read_text(encoding="utf-8"), path.name).data
        assert [error.message for error in validator.iter_errors(data)] == [], path
    assert list(validator.iter_errors({"stages": [{"stage": "sft", "lerning_rate": 1}]}))


def test_schema_allows_what_is_written():
    definitions = recipe_schema()["$defs"]
    tokens = definitions["TrainSection"]["properties"]["tokens"]["anyOf"]
    assert {form.get("type") for form in tokens} == {"integer", "string", "null"}
    assert {form.get("type") for form in definitions["TokenizerRef"]["anyOf"]} == {"string", "object"}
    assert definitions["PretrainStage"]["required"] == ["stage"]
    assert "extends" in recipe_schema()["properties"]
    assert definitions["OptimSection"]["properties"]["lr"]["description"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_packages_are_all_listed():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "kllm").rglob("__init__.py")
    }
    assert set(listed) == folders | {"kllm.recipes"}
    assert listed == sorted(listed)
