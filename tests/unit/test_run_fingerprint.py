"""A stage depends on its settings and on contents, not on times, logs or the device."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from run_support import load

from kllm.config.load import Loaded
from kllm.config.stages import EvalStage
from kllm.errors import UserError
from kllm.run.fingerprint import Identity, changes, data_paths, digest, hash_data, hash_directory, identity


def of(loaded: Loaded, name: str, folder: Path, **inputs: str) -> Identity:
    stage = loaded.recipe.stage(name)
    data = hash_data(stage, folder / "hashes.json")
    return identity(stage, seed=loaded.recipe.seed, inputs=inputs, data=data)


def test_log_device_and_processes_do_not_count(tmp_path: Path) -> None:
    one = of(load(tmp_path), "pretrain", tmp_path)
    two = of(load(tmp_path, "device=cpu", "nproc=2", "pretrain.log.project=x"), "pretrain", tmp_path)
    assert digest(one) == digest(two)


def test_settings_seed_inputs_and_code_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = of(load(tmp_path), "pretrain", tmp_path, tokenizer="a")
    others = [
        of(load(tmp_path, "pretrain.optim.lr=2e-3"), "pretrain", tmp_path, tokenizer="a"),
        of(load(tmp_path, "seed=8"), "pretrain", tmp_path, tokenizer="a"),
        of(load(tmp_path), "pretrain", tmp_path, tokenizer="b"),
    ]
    monkeypatch.setitem(__import__("kllm.run.fingerprint", fromlist=["x"]).CODE_VERSIONS, "pretrain", 99)
    others.append(of(load(tmp_path), "pretrain", tmp_path, tokenizer="a"))
    digests = {digest(i) for i in (base, *others)}
    assert len(digests) == 5


def test_changes_name_key_value_and_line(tmp_path: Path) -> None:
    before = json.loads(json.dumps(of(load(tmp_path), "pretrain", tmp_path)))
    loaded = load(tmp_path, "pretrain.train.steps=9")
    text = [str(c) for c in changes(before, of(loaded, "pretrain", tmp_path), "pretrain", loaded.origins)]
    assert text == ["train.steps: 4 -> 9 (flag --set)"]
    recipe = (tmp_path / "recipe.yaml").read_text(encoding="utf-8").replace("lr: 1e-3", "lr: 2e-3")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    from kllm.config.load import load_recipe

    loaded = load_recipe(tmp_path / "recipe.yaml")
    line = recipe[: recipe.index("lr: 2e-3")].count("\n") + 1
    text = [str(c) for c in changes(before, of(loaded, "pretrain", tmp_path), "pretrain", loaded.origins)]
    assert text == [f"optim.lr: 0.001 -> 0.002 ({tmp_path / 'recipe.yaml'}:{line})"]


def test_a_stored_identity_equals_its_source(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    now = of(loaded, "pretrain", tmp_path)
    assert changes(json.loads(json.dumps(now)), now, "pretrain", loaded.origins) == []


def test_touching_data_changes_nothing_and_editing_does(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    before = of(loaded, "pretrain", tmp_path)
    data = tmp_path / "corpus.jsonl"
    os.utime(data, (1, 1))
    assert digest(of(loaded, "pretrain", tmp_path)) == digest(before)
    with data.open("a") as file:
        file.write('{"text": "more"}\n')
    found = changes(before, of(loaded, "pretrain", tmp_path), "pretrain", loaded.origins)
    assert [str(c) for c in found] == [f"data {data} changed"]


def test_a_model_folder_is_hashed_by_content_without_its_card(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    memo = tmp_path / "hashes.json"
    first = hash_directory(model, memo)
    (model / "README.md").write_text("card")
    os.utime(model / "model.safetensors", (5, 5))
    assert hash_directory(model, memo) == first
    (model / "model.safetensors").write_bytes(b"two")
    assert hash_directory(model, memo) != first


def test_missing_data_is_a_user_error(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match="no such file"):
        of(loaded, "pretrain", tmp_path)


def test_evaluation_depends_on_the_data_of_its_tasks(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    tasks = ["builtin:world/facts", "builtin:identity", f"preference:{held}", "format:builtin:reasoning/eval"]
    stage = EvalStage(tasks=tasks)
    read = ["builtin:world/eval", "builtin:identity/eval", str(held), "builtin:reasoning/eval"]
    assert data_paths(stage) == read
    before = hash_data(stage, tmp_path / "hashes.json")
    held.write_text('{"prompt": "a", "chosen": "c", "rejected": "b"}\n')
    after = hash_data(stage, tmp_path / "hashes.json")
    assert [path for path in read if before[path] != after[path]] == [str(held)]
    assert data_paths(EvalStage(tasks=["hellaswag"])) == []
