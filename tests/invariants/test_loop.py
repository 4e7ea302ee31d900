"""The loop's promises: cutting a step differently, or over processes, or stopping, changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kllm.data.batch import Batch, Piece
from kllm.errors import KllmError
from kllm.model.presets import PRESETS
from kllm.model.transformer import Transformer
from kllm.objectives.lm import LanguageModeling
from kllm.optim.build import OptimConfig, build_optimizer, lr_scale
from kllm.train.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from kllm.train.device import Runtime, make_runtime, wrap_model
from kllm.train.evaluate import evaluate
from kllm.train.loop import Fit, Meters, fit
from kllm.train.objective import TrainState

SHAPE = PRESETS["k-tiny"].with_(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8
)
MOE = SHAPE.with_(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    router_aux_loss_coef=0.01,
    router_noise=True,
)


class Rows:
    """Four rows a step of random documents with random labels left out; a stand-in for shards."""

    def __init__(self, micro: int = 4, rank: int = 0, world: int = 1) -> None:
        self.step, self.micro, self.rank, self.world = 0, micro, rank, world
        self.poison: int | None = None

    def take(self, n: int = 1, policy: Any = None) -> list[Batch]:
        rng = np.random.default_rng(self.step)
        rows = []
        for i in range(4):
            pieces = []
            for length in (int(rng.integers(2, 20)), int(rng.integers(2, 20))):
                tokens = rng.integers(0, 50, length + 1)
                labels = np.where(rng.random(length) < 0.3 * i, -100, tokens[1:])
                pieces.append(Piece(tokens[:-1], labels))
            rows.append((pieces, f"step {self.step} row {i}"))
        self.step += 1
        mine = rows[self.rank :: self.world]
        groups = [mine[i : i + self.micro] for i in range(0, len(mine), self.micro)]
        return [Batch.from_pieces(sum((p for p, _ in g), []), [w for _, w in g]) for g in groups]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def make(
    steps: int, micro: int = 4, shape=SHAPE, runtime: Runtime | None = None, log_every: int = 1, **optim: Any
) -> tuple[Fit, list[dict[str, float]]]:
    runtime = runtime or Runtime(torch.device("cpu"))
    model = Transformer(shape)
    model.init_weights(0)
    config = OptimConfig(**{"lr": 3e-3, **optim})
    lines: list[dict[str, float]] = []
    run = Fit(
        wrap_model(model, runtime),
        Rows(micro, runtime.rank, runtime.world),
        LanguageModeling(),
        build_optimizer(model.named_parameters(), config),
        lambda step: lr_scale(step, steps, config),
        runtime,
        TrainState(steps=steps),
        Meters(),
        lambda state, means: lines.append({"step": state.step, **means}),
        log_every=log_every,
    )
    return run, lines


def weights(run: Fit) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in getattr(run.model, "module", run.model).state_dict().items()}


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_is_weighted_by_tokens(micro: int) -> None:
    """One batch of four rows and four (or uneven) micro-batches take the same step."""
    whole, whole_lines = make(3)
    cut, cut_lines = make(3, micro=micro)
    fit(whole)
    fit(cut)
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(cut)[name], atol=2e-6), name
    for a, b in zip(whole_lines, cut_lines, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["opt/grad_norm"] == pytest.approx(b["opt/grad_norm"], rel=1e-4)


def test_first_gradient_is_the_mean_over_all_trained_tokens() -> None:
    """Against autograd on the plain definition, not against ourselves."""
    run, lines = make(1, micro=1)
    model = Transformer(SHAPE)
    model.init_weights(0)
    total = count = 0.0
    for batch in Rows(1).take():
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            logits = model.logits(model(batch.tokens[a:b], batch.positions[a:b]))
            total = total + torch.nn.functional.cross_entropy(
                logits, batch.labels[a:b], ignore_index=-100, reduction="sum"
            )
        count += batch.trained_tokens
    (total / count).backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    fit(run)
    assert lines[0]["train/loss"] == pytest.approx(float(total.detach() / count), rel=1e-5)
    assert lines[0]["opt/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("shape", [SHAPE, MOE], ids=["dense", "moe with router noise"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stop_anywhere_and_resume_gives_the_same_bits(shape: Any, name: str, tmp_path: Path) -> None:
    straight, straight_lines = make(7, micro=2, shape=shape, name=name, log_every=3)
    fit(straight)
    first, first_lines = make(7, micro=2, shape=shape, name=name, log_every=3)

    def stop_at_4(state: TrainState) -> None:
        if state.step == 4:
            extra = {"source": first.source.state_dict(), "meters": first.meters.sums.state_dict()}
            save_checkpoint(tmp_path, first.model, None, first.optimizers, state, extra)
            raise InterruptedError

    first.hooks = [stop_at_4]
    with pytest.raises(InterruptedError):
        fit(first)
    second, second_lines = make(7, micro=2, shape=shape, name=name, log_every=3)
    path, torn = latest_checkpoint(tmp_path)
    assert torn == []
    extra = load_checkpoint(path, second.model, second.optimizers, second.state)
    second.source.load_state_dict(extra["source"])
    second.meters.sums.load_state_dict(extra["meters"])
    fit(second, resumed=True)
    assert all(torch.equal(v, weights(second)[k]) for k, v in weights(straight).items())
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith(("perf/", "mem/"))} for row in rows]
        for rows in (straight_lines, first_lines + second_lines)
    ]
    assert timeless[0] == timeless[1]


def test_signal_finishes_the_step_and_runs_the_last_hooks() -> None:
    run, _ = make(50)
    seen: list[tuple[int, bool]] = []

    def hook(state: TrainState) -> None:
        seen.append((state.step, state.last))
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    run.hooks = [hook]
    with run.stop:
        fit(run)
    assert seen == [(0, False), (1, False), (2, False), (3, True)]
    assert run.stop.signum == signal.SIGTERM


def test_nan_stops_before_the_weights_change_and_names_the_rows() -> None:
    run, _ = make(10)
    take = run.source.take

    def poisoned(n: int = 1, policy: Any = None) -> list[Batch]:
        batches = take()
        if run.state.step == 2:
            batches[0].weights = torch.full((len(batches[0].tokens),), float("nan"))
        return batches

    run.source.take = poisoned  # type: ignore[method-assign]
    kept: dict[str, torch.Tensor] = {}
    run.hooks = [lambda state: kept.update(weights(run))]
    with pytest.raises(KllmError, match=r"loss is not finite at step 3 .*step 2 row 0") as caught:
        fit(run)
    assert caught.value.exit_code == 1
    assert all(torch.equal(v, weights(run)[k]) for k, v in kept.items())


def test_evaluation_matches_the_definition_of_bits_per_byte() -> None:
    run, _ = make(1)
    batches = Rows().take()
    token_bytes = np.arange(50) % 4  # every fourth token is special: no bytes
    got = evaluate(run.model, batches, run.runtime, token_bytes)
    nll = count = text_nll = length = 0.0
    for batch in batches:
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            with torch.no_grad():
                logp = run.model.logits(run.model(batch.tokens[a:b], batch.positions[a:b])).log_softmax(-1)
            for i, y in enumerate(batch.labels[a:b].tolist()):
                if y >= 0:
                    nll, count = nll - float(logp[i, y]), count + 1
                    if y % 4:
                        text_nll, length = text_nll - float(logp[i, y]), length + y % 4
    assert got["val/loss"] == pytest.approx(nll / count, rel=1e-5)
    assert got["val/bpb"] == pytest.approx(text_nll / np.log(2) / length, rel=1e-5)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run, _ = make(1)
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, run.model, None, run.optimizers, TrainState(step=step), {})
    (tmp_path / "checkpoints" / "step-000050").mkdir()  # torn: no COMPLETE
    prune_checkpoints(tmp_path, keep_last=2, keep_step=10)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000010", "step-000030", "step-000040", "step-000050"]
    assert latest_checkpoint(tmp_path)[0].name == "step-000040"


def test_checkpoint_of_another_shape_is_one_line(tmp_path: Path) -> None:
    run, _ = make(1)
    path = save_checkpoint(tmp_path, run.model, None, run.optimizers, run.state, {})
    other, _ = make(1, shape=SHAPE.with_(hidden_size=64, head_dim=16))
    with pytest.raises(KllmError, match="has shape .* the config says"):
        load_checkpoint(path, other.model, other.optimizers, other.state)


WORKER = """
import json, sys
sys.path.insert(0, {tests!r})
from test_loop import make, weights
from kllm.train.device import make_runtime
from kllm.train.loop import fit
import torch
torch.set_num_threads(1)
runtime = make_runtime("cpu")
assert runtime.world == 2
run, lines = make(5, micro=1, runtime=runtime)
fit(run)
if runtime.main:
    torch.save(weights(run), {out!r} + "/weights.pt")
    open({out!r} + "/lines.json", "w").write(json.dumps(lines))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow  # the command line's is not: tests/e2e/test_nproc.py
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    single, lines = make(5)
    fit(single)
    other = json.loads((tmp_path / "lines.json").read_text())
    for a, b in zip(lines, other, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-4)
        assert a["train/tokens"] == b["train/tokens"]
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.allclose(v, saved[k], atol=1e-5) for k, v in weights(single).items())


def test_runtime_reads_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert make_runtime("cpu") == Runtime(torch.device("cpu"))
    with pytest.raises(KllmError, match="not available"):
        make_runtime("mps" if not torch.backends.mps.is_available() else "cuda")
    with pytest.raises(KllmError, match="unknown device"):
        make_runtime("gpu9")
