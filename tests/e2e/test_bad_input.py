"""What a careless user does: each gives one clear line and the right exit code, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import TINY, Command, kllm

TEXT = [{"text": f"document number {i} says hello to the world, {i * 7}."} for i in range(60)]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"what is {i}?"},
            {"role": "assistant", "content": f"{i} it is"},
        ]
    }
    for i in range(60)
]


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, chats, a tokenizer and a small trained model."""
    lab = tmp_path_factory.mktemp("lab")
    lines(lab / "texts.jsonl", TEXT)
    lines(lab / "chats.jsonl", CHAT)
    kllm(
        "pretrain", "--data", "texts.jsonl", "--out", "base", *TINY, "--steps", "2", "--batch-tokens", "256",
        "--seq-len", "64", "--model.max_position_embeddings", "128", "--set", "tokenizer.vocab_size=320", "-q", cwd=lab,
    )  # fmt: skip
    return lab


def fails(lab: Path, code: int, *args: str | Path, words: tuple[str, ...]) -> str:
    """Runs kllm, expects `code` and one line on stderr that has all `words`."""
    result = kllm(*args, cwd=lab, check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0], errors[0]
    return errors[0]


def pretrain(*more: str | Path) -> list[str | Path]:
    return [
        "pretrain",
        "--tokenizer",
        "base",
        *TINY,
        "--steps",
        "2",
        "--seq-len",
        "64",
        "--batch-tokens",
        "256",
        "-q",
        *more,
    ]


def test_missing_file(lab: Path) -> None:
    fails(lab, 2, *pretrain("--data", "text.jsonl", "--out", "a"), words=("text.jsonl", "texts.jsonl"))
    assert not (lab / "a").exists() or not list((lab / "a").glob("*/checkpoints"))


def test_empty_file(lab: Path) -> None:
    (lab / "empty.jsonl").write_text("")
    fails(lab, 2, *pretrain("--data", "empty.jsonl", "--out", "b"), words=("empty.jsonl", "empty"))


def test_broken_json_names_the_line(lab: Path) -> None:
    rows = (lab / "texts.jsonl").read_text().splitlines()
    (lab / "broken.jsonl").write_text("\n".join([*rows[:16], '{"text": "half', *rows[16:]]))
    fails(lab, 2, *pretrain("--data", "broken.jsonl", "--out", "c"), words=("broken.jsonl:17", "JSON"))
    # and it may be tolerated, counted
    kllm(*pretrain("--data", "broken.jsonl", "--out", "c2", "--dataset.max_bad_rows", "1"), cwd=lab)
    status = json.loads((lab / "c2" / "01-pretrain" / "status.json").read_text())
    assert status["data"]["bad_rows"] == 1


def test_wrong_dialect_names_the_right_command(lab: Path) -> None:
    fails(lab, 2, *pretrain("--data", "chats.jsonl", "--out", "d"), words=("chats.jsonl:1", "sft"))
    fails(
        lab, 2, "sft", "--model", "base", "--data", "texts.jsonl", "--seq-len", "64", "--out", "d2", "-q",
        words=("texts.jsonl:1", "pretrain"),
    )  # fmt: skip


def test_unknown_key_and_wrong_type_come_with_line_and_hint(lab: Path) -> None:
    recipe = lab / "bad.yaml"
    recipe.write_text(
        "name: bad\nstages:\n  - stage: pretrain\n    optim: {lr: fast}\n    train:\n      stepz: 5\n"
    )
    result = kllm("run", "--recipe", recipe, cwd=lab, check=False)
    assert result.returncode == 2
    assert "bad.yaml:4" in result.stderr
    assert "bad.yaml:6" in result.stderr
    assert "steps" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_flag_command_and_preset(lab: Path) -> None:
    assert kllm("pretrain", "--stepz", "5", cwd=lab, check=False).returncode == 2
    assert "Did you mean" in kllm("pretrian", cwd=lab, check=False).stderr
    fails(
        lab,
        2,
        "pretrain",
        "--preset",
        "k-smal",
        "--tokenizer",
        "base",
        "--out",
        "e",
        "-q",
        words=("k-small",),
    )


def test_sequence_longer_than_the_positions(lab: Path) -> None:
    fails(
        lab, 2, "sft", "--model", "base", "--data", "chats.jsonl", "--seq-len", "512", "--out", "f", "-q",
        words=("512", "128", "positions"),
    )  # fmt: skip


def test_vocabulary_larger_than_the_shards_dtype(lab: Path) -> None:
    """Ids above 65,535 need 32 bits; a shard whose ids do not fit its model is refused, not wrapped around."""
    import numpy as np

    from kllm.data.shards import Shard, prepare
    from kllm.errors import UserError
    from kllm.tokenizer.tokenizer import Tokenizer

    class Source:
        path, weight = str(lab / "texts.jsonl"), 1.0

    tokenizer = Tokenizer.load(next(lab.glob("base/*-tokenizer/final")))
    made = prepare([Source()], tokenizer, kind="text", cache_dir=lab / "cache", seq_len=64)
    assert made.train[0].tokens.dtype == np.uint16
    folder = next(p.parent for p in (lab / "cache").rglob("*.json") if (p.parent / "meta.json").exists())
    with pytest.raises(UserError, match="vocabulary"):
        Shard.open(folder, vocab_size=100)


def test_checkpoint_of_another_shape(lab: Path) -> None:
    args = pretrain("--data", "texts.jsonl", "--out", "g", "--save-every", "1", "--fresh")
    kllm(*args, cwd=lab)
    stage = lab / "g" / "01-pretrain"
    config = json.loads((stage / "final" / "config.json").read_text())
    config["hidden_size"] = 128
    (stage / "final" / "config.json").write_text(json.dumps(config))
    fails(lab, 2, "eval", "--model", "g", "--limit", "1", "-q", words=("shape", "config"))


def test_changed_configuration_is_refused_with_the_difference(lab: Path) -> None:
    kllm(*pretrain("--data", "texts.jsonl", "--out", "h"), cwd=lab)
    line = fails(lab, 2, *pretrain("--data", "texts.jsonl", "--out", "h", "--lr", "0.01"), words=("--fresh",))
    result = kllm(*pretrain("--data", "texts.jsonl", "--out", "h", "--lr", "0.01"), cwd=lab, check=False)
    assert "lr" in line + result.stderr
    kllm(*pretrain("--data", "texts.jsonl", "--out", "h", "--lr", "0.01", "--fresh"), cwd=lab)
    kept = [p for p in lab.rglob("*.old-*") if (p / "final" / "model.safetensors").exists()]
    assert kept, "the old folder was moved aside, not deleted"


def test_read_only_output(lab: Path) -> None:
    if os.geteuid() == 0:
        out = Path("/sys/kllm-run")  # not even root may write there
    else:
        (lab / "locked").mkdir(mode=0o555)
        out = lab / "locked" / "run"
    fails(lab, 1, *pretrain("--data", "texts.jsonl", "--out", out), words=(str(out), "write"))


def test_a_file_where_the_run_should_be(lab: Path) -> None:
    (lab / "file").write_text("mine")
    result = kllm(*pretrain("--data", "texts.jsonl", "--out", "file"), cwd=lab, check=False)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    assert (lab / "file").read_text() == "mine"


def test_run_directory_in_use(lab: Path) -> None:
    args = [*map(str, pretrain("--data", "texts.jsonl", "--out", "busy", "--set", "train.steps=100000"))]
    args = [a for i, a in enumerate(args) if not (a == "--steps" or args[i - 1] == "--steps")]
    process = Command(*args, cwd=lab, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list((lab / "busy").glob("01-*/status.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        fails(lab, 1, *pretrain("--data", "texts.jsonl", "--out", "busy"), words=("busy", str(process.pid)))
    finally:
        process.kill()
        process.wait()


def test_no_such_model(lab: Path) -> None:
    for command in (
        ["chat", "nowhere", "--prompt", "hi"],
        ["eval", "--model", "nowhere"],
        ["sft", "--model", "nowhere"],
    ):
        fails(lab, 2, *command, words=("nowhere",))
    assert kllm("sft", "--data", "chats.jsonl", cwd=lab, check=False).returncode == 2


def test_full_disk_leaves_the_earlier_checkpoint(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system says ENOSPC in the middle of a save: one line, and the last checkpoint is whole."""
    import torch

    from kllm.errors import KllmError
    from kllm.export.load import load_model
    from kllm.export.resolve import complete_checkpoints
    from kllm.optim.build import OptimConfig, build_optimizer
    from kllm.train.checkpoint import save_checkpoint
    from kllm.train.objective import TrainState

    model, tokenizer = load_model(lab / "base")
    optimizers = build_optimizer(model.named_parameters(), OptimConfig())
    save_checkpoint(tmp_path, model, tokenizer, optimizers, TrainState(step=1), {})
    real = os.fsync
    calls = {"left": 3}

    def full(descriptor: int) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KllmError, match="no space left") as caught:
        save_checkpoint(tmp_path, model, tokenizer, optimizers, TrainState(step=2), {})
    assert caught.value.exit_code == 1
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000001"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001"]
    again, _ = load_model(tmp_path)
    assert torch.equal(again.head_weight, model.head_weight)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")
def test_really_full_disk(lab: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        fails(
            lab, 1, *pretrain("--data", "texts.jsonl", "--out", small / "run", "--save-every", "1"),
            words=("no space left", "small"),
        )  # fmt: skip
        assert not [p for p in small.rglob("*") if ".tmp-" in p.name]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_ctrl_c_while_torch_is_imported_is_not_lost(tmp_path: Path) -> None:
    """The exception would vanish in torch's C code: a module that it imports plays the signal's part."""
    code = """
import importlib.abc, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
class Pressed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch.version":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressed())
from kllm.cli.app import main
main(["chat", "nowhere", "-p", "x"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
