"""`--smoke` makes a test of any recipe: small, offline, and still the same recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_support import load

from kllm.config.load import load_recipe
from kllm.config.recipe import stage_kind
from kllm.model.presets import count_parameters
from kllm.run import checks
from kllm.run.rundir import RunDir
from kllm.run.shapes import planned_shape
from kllm.run.smoke import MODEL, TOKENIZER, shrink

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_shrinks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(path)
    small = shrink(loaded)
    kept = [s.name for s in small.recipe.stages if s.name not in (TOKENIZER, MODEL)]
    assert kept == [s.name for s in loaded.recipe.stages]
    names = [s.name for s in small.recipe.stages]
    checks.check_all(small, RunDir(tmp_path / "run"), names)
    for stage in small.recipe.stages:
        if stage_kind(stage) in ("pretrain", "sft"):
            shape = planned_shape(small.recipe, stage.name, None, None)
            assert shape is not None and count_parameters(shape) < 300_000
            assert stage.train.steps == 6  # type: ignore[union-attr]


def test_shrinking_twice_changes_nothing(tmp_path: Path) -> None:
    once = shrink(load(tmp_path))
    assert shrink(once).recipe == once.recipe


def test_what_is_not_here_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = """\
name: outside
stages:
  - {stage: sft, model: {path: Qwen/Qwen3-0.6B}, data: [missing.jsonl, someone/chats]}
  - {stage: eval, tasks: ["perplexity:missing.txt"]}
"""
    (tmp_path / "r.yaml").write_text(text)
    small = shrink(load_recipe(tmp_path / "r.yaml"))
    assert [s.name for s in small.recipe.stages] == [TOKENIZER, MODEL, "sft", "eval"]
    sft = small.recipe.stage("sft")
    assert sft.model.path == f"stage:{MODEL}"  # type: ignore[union-attr]
    assert [d.path for d in sft.data] == ["builtin:world/sft"] * 2  # type: ignore[union-attr]
    assert small.recipe.stage("eval").tasks == ["builtin:world"]  # type: ignore[union-attr]
    assert small.origins["sft.model.path"] == "--smoke"


def test_what_is_here_is_kept_but_capped(tmp_path: Path) -> None:
    small = shrink(load(tmp_path))
    pretrain = small.recipe.stage("pretrain")
    assert [d.path for d in pretrain.data] == [str(tmp_path / "corpus.jsonl")]  # type: ignore[union-attr]
    assert pretrain.dataset.max_bytes == 256 * 1024  # type: ignore[union-attr]
    assert pretrain.optim.lr == 1e-3  # type: ignore[union-attr]
    assert small.origins["pretrain.optim.lr"].startswith(str(tmp_path / "recipe.yaml"))


def test_a_mixture_of_experts_stays_one(tmp_path: Path) -> None:
    text = "name: moe\nstages:\n  - {{stage: tokenizer}}\n  - {{stage: pretrain, model: {{preset: {}}}}}\n"
    for preset, experts, shared in (("k-moe", 4, 1), ("k3-moe", 4, 0), ("k-small", 0, 0)):
        (tmp_path / "r.yaml").write_text(text.format(preset))
        recipe = shrink(load_recipe(tmp_path / "r.yaml")).recipe
        shape = planned_shape(recipe, "pretrain", None, None)
        assert shape is not None
        assert (shape.num_experts, shape.num_shared_experts) == (experts, shared)
        assert json.dumps(shape.to_dict())
