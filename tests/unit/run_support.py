"""Stages whose work is made up, so that what runs around them can be tested in milliseconds."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kllm.config.load import Loaded, load_recipe
from kllm.run.context import StageContext

RECIPE = """\
name: small
seed: 7
stages:
  - stage: tokenizer
    data: [{data}]
    vocab_size: 400
  - stage: pretrain
    model: {{preset: k-tiny}}
    data: [{data}]
    dataset: {{seq_len: 128}}
    train: {{steps: 4, batch_tokens: 512}}
    optim: {{lr: 1e-3}}
  - stage: sft
    train: {{steps: 4}}
  - stage: eval
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """A recipe of four stages and its data, in `folder`."""
    data = folder / "corpus.jsonl"
    if not data.exists():
        rows = [{"text": f"line {i} of a small corpus"} for i in range(50)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(text.format(data=data), encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, text: str = RECIPE) -> Loaded:
    return load_recipe(write_recipe(folder, text), list(overrides))


class FakeWork:
    """Records the stages that ran and leaves a result that depends on their settings."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.contexts: list[StageContext] = []
        self.before: Callable[[StageContext], None] = lambda ctx: None

    def __call__(self, ctx: StageContext) -> dict[str, Any]:
        self.ran.append(ctx.name)
        self.contexts.append(ctx)
        self.before(ctx)
        if ctx.kind != "eval":
            ctx.final_dir.mkdir(parents=True, exist_ok=True)
            (ctx.final_dir / "model.safetensors").write_bytes(self.result(ctx))
            (ctx.final_dir / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
            (ctx.final_dir / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
        if ctx.kind in ("pretrain", "sft"):
            rows = [{"step": s, "train/loss": 3.0 / s, "perf/tok_s": 100.0} for s in range(1, 5)]
            ctx.metrics_path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
            facts = {"parameters": 1000, "tokens": 2048, "flops": 1e9, "device": "cpu", "processes": 1}
            return {"result": {"train/loss": 0.75}, "steps": 4, **facts}
        return {"result": {"builtin:world": {"zh": {"accuracy": 0.5}}} if ctx.kind == "eval" else {}}

    @staticmethod
    def result(ctx: StageContext) -> bytes:
        lr = getattr(getattr(ctx.stage, "optim", None), "lr", None)
        inputs = sorted(p.joinpath("model.safetensors").read_bytes() for p in ctx.inputs.values())
        return repr((ctx.name, lr, inputs)).encode()


CONFIG = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 399}}, "added_tokens": []}


def fake_processes(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Makes the processes of stages run `body` (given `ctx`) instead of their work."""
    hook = folder / "hook"
    hook.mkdir()
    lines = [
        "import os",
        'if os.environ.get("KLLM_PARENT"):',
        "    import kllm.run.work",
        "    def do_work(ctx):",
        textwrap.indent(textwrap.dedent(body).strip(), " " * 8),
        "    kllm.run.work.do_work = do_work",
    ]
    (hook / "sitecustomize.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path.rstrip(os.pathsep))
