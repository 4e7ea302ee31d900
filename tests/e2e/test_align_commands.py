"""lora, dpo and distill through the real command line: what they leave, kill and resume, processes, mistakes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from serve_model import model_dir
from support import Command, kllm

from kllm.export.adapter import merge_adapters
from kllm.export.hf import save_model
from kllm.export.load import load_model
from kllm.export.tokenizers import load_tokenizer
from kllm.model.presets import PRESETS
from kllm.model.transformer import Transformer

SIZES = [
    "--seq-len", "96", "--batch-tokens", "384", "--train.micro_batch_tokens", "192", "--lr", "2e-3",
    "--train.log_every", "1", "--train.compile", "off", "--dataset.val_fraction", "0.2", "-q",
]  # fmt: skip
KINDS = {
    "lora": ["lora", "--data", "chats.jsonl", "--rank", "4", "--lora.dropout", "0.1"],
    "dora": ["lora", "--data", "chats.jsonl", "--rank", "3", "--lora.use_dora", "--lora.init", "pissa"],
    "dpo": ["dpo", "--data", "pairs.jsonl"],
    "online": [
        "dpo", "--data", "pairs.jsonl", "--online", "--rollout.prompts", "chats.jsonl", "--rollout.reward", "brief",
        "--rollout.max_tokens", "6", "--rollout.samples", "3", "--rollout.prompts_per_step", "4",
        "--rollout.refresh_every", "3", "--rollout.temperature", "2", "--rank", "2",
    ],
    "distill": [
        "distill", "--data", "chats.jsonl", "--teacher", "BASE", "--distill.hidden_weight", "0.5",
        "--distill.on_policy", "0.5", "--rollout.max_tokens", "6", "--rollout.prompts_per_step", "4",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("align")
    chats, pairs = [], []
    for i in range(40):
        ask = {"role": "user", "content": f"Say {i} times {i % 7}, please."}
        answer = f"It is {i * (i % 7)}."
        chats.append({"messages": [ask, {"role": "assistant", "content": answer}]})
        pairs.append({"prompt": ask["content"], "chosen": answer, "rejected": "I do not know." * (1 + i % 2)})
    for name, rows in (("chats", chats), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (where / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return where


def command(kind: str, out: str, *more: str) -> list[str]:
    base = str(model_dir())
    words = [base if word == "BASE" else word for word in KINDS[kind]]
    return [*words, "--model", base, "--out", out, *SIZES, *more]


def stage(run: Path) -> Path:
    return next(run.glob("01-*"))


def bits(run: Path) -> tuple[str, list[dict]]:
    weights = (stage(run) / "final" / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (stage(run) / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if not k.startswith(("perf/", "mem/"))} for row in rows]
    return hashlib.sha256(weights).hexdigest(), timeless


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "online")) for kind in KINDS]
)
def test_killed_anywhere_it_ends_in_the_same_bits(kind: str, lab: Path) -> None:
    more = ("--steps", "8", "--save-every", "2", "--train.eval_every", "4")
    whole, cut = (command(kind, f"{kind}-{name}", *more) for name in ("whole", "cut"))
    kllm(*whole, cwd=lab)
    process = Command(*cut, cwd=lab, stderr=subprocess.PIPE, session=True)
    deadline = time.monotonic() + 120
    while not any((lab / f"{kind}-cut").glob("01-*/checkpoints/step-*/COMPLETE")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kllm(*cut, cwd=lab)
    assert bits(lab / f"{kind}-cut") == bits(lab / f"{kind}-whole")
    steps = [row["step"] for row in bits(lab / f"{kind}-cut")[1] if "train/loss" in row]
    assert steps == list(range(1, 9))


@torch.no_grad()
def test_an_adapter_and_its_merged_model_are_left(lab: Path) -> None:
    more = ("--steps", "3", "--save-every", "3", "--model", os.path.relpath(model_dir(), lab))
    kllm(*command("lora", "left", *more), cwd=lab)
    folder = stage(lab / "left")
    checkpoint = folder / "checkpoints" / "step-000003"
    assert not (checkpoint / "model.safetensors").exists(), "the frozen weights are no part of a checkpoint"
    for adapter in (folder / "adapter", checkpoint / "adapter"):
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert Path(config["base_model_name_or_path"]) == model_dir().resolve(), (
            "adapters are moved: no relative path"
        )
    base, _ = load_model(model_dir())
    final, _ = load_model(lab / "left")
    before = base.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()
    merge_adapters(base, [(folder / "adapter", 1.0)])
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, final.state_dict()[name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(before, final.state_dict()["model.layers.0.mlp.down_proj.weight"])
    status = json.loads((folder / "status.json").read_text())
    assert status["trained_parameters"] < status["parameters"] / 4
    kllm("convert", str(lab / "left"), "merged", "--merge", "--no-verify", cwd=lab)
    merged, _ = load_model(lab / "merged")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, final.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_who_reads_adapters_of_experts_is_said(lab: Path) -> None:
    tokenizer = load_tokenizer(model_dir())
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    shape = PRESETS["k-moe"].with_(
        vocab_size=tokenizer.vocab_size, num_experts=4, moe_intermediate_size=32, **sizes
    )
    model = Transformer(shape)
    model.init_weights(0)
    save_model(model, tokenizer, lab / "moe")
    targets = ["--lora.targets", "all", "--lora.targets", "experts", "--rank", "3"]
    words = [
        "lora",
        "--model",
        "moe",
        "--data",
        "chats.jsonl",
        "--out",
        "moe-lora",
        *targets,
        *SIZES,
        "--steps",
        "1",
    ]
    result = kllm(*words, cwd=lab)
    said = "changes 12 experts or routers"
    assert result.stderr.count(said) == 1 and "give them final/" in result.stderr
    assert said in (stage(lab / "moe-lora") / "final" / "README.md").read_text(encoding="utf-8")


def test_two_processes_give_the_curve_of_one(lab: Path) -> None:
    more = ("--steps", "3", "--train.eval_every", "3")
    for nproc in ("1", "2"):
        kllm(*command("dpo", f"dpo-{nproc}", *more, "--nproc", nproc), cwd=lab)
    (_, one), (_, two) = bits(lab / "dpo-1"), bits(lab / "dpo-2")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        for key in {"train/loss", "rewards/margin", "val/loss", "val/accuracy"} & a.keys():
            assert a[key] == pytest.approx(b[key], abs=1e-4), (key, a["step"])


@pytest.mark.slow
def test_two_processes_sample_together(lab: Path) -> None:
    """Each draws answers to its own share of the prompts, so the curve is not that of one process."""
    kllm(
        *command("online", "online-2", "--steps", "3", "--rollout.prompts_per_step", "4", "--nproc", "2"),
        cwd=lab,
    )
    rows = [row for row in bits(lab / "online-2")[1] if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["train/loss"]) for row in rows)


MISTAKES = [
    (["dpo", "--data", "chats.jsonl"], "chats.jsonl:1", "preference"),
    (["lora", "--data", "pairs.jsonl"], "pairs.jsonl:1", "kllm dpo"),
    (["lora", "--data", "chats.jsonl", "--lora.targets", "q_porj"], "lora.targets", "q_proj"),
    (["distill", "--data", "chats.jsonl"], "has no teacher", "from_endpoint"),
    (["distill", "--data", "chats.jsonl", "--teacher", "nowhere"], "nowhere", "teacher"),
    (["dpo", "--data", "pairs.jsonl", "--loss", "robust"], "label_smoothing", "robust"),
    (
        ["dpo", "--data", "pairs.jsonl", "--online", "--rollout.reward", "nothing:here", "--rollout.max_tokens", "4"],
        "rollout.reward", "nothing",
    ),
    (["distill", "--from-endpoint", "http://127.0.0.1:9"], "needs prompts", "from_endpoint"),
    (["sft", "--data", "chats.jsonl", "--lora.base", "int8"], "lora.rank", "lora.base"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "where", "what"), MISTAKES, ids=[f"{w[0]}-{x}" for w, x, _ in MISTAKES])
def test_a_mistake_gets_one_line(words: list[str], where: str, what: str, lab: Path) -> None:
    name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]
    result = kllm(*words, "--model", str(model_dir()), "--out", name, *SIZES, cwd=lab, check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert where in lines[0] and what in lines[0], lines[0]
    assert "Traceback" not in result.stderr
    assert not list((lab / name).glob("*/final"))
