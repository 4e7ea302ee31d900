"""Training an adapter with the one loop: the base keeps its bits, a stop changes nothing, nor do processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_loop import MOE, SHAPE, Rows

from kllm.errors import KllmError
from kllm.model.lora import LoraConfig, adapters_off, add_lora, load_lora_state, lora_parameters, lora_state
from kllm.model.presets import ModelShape
from kllm.model.transformer import Transformer
from kllm.objectives.lm import LanguageModeling
from kllm.optim.build import OptimConfig, build_optimizer
from kllm.train.checkpoint import load_checkpoint, save_checkpoint
from kllm.train.device import Runtime, compile_blocks, wrap_model
from kllm.train.loop import Fit, Meters, fit
from kllm.train.objective import TrainState

STILL = MOE.with_(router_noise=False, router_aux_loss_coef=0.0)
OPTIONS = {
    "dropout": (SHAPE, LoraConfig(rank=4, dropout=0.2)),
    "pissa dora int8": (SHAPE, LoraConfig(rank=4, init="pissa", use_dora=True, base="int8")),
    "experts int4": (STILL, LoraConfig(rank=4, targets=("all", "experts", "router"), base="int4")),
}


def make(
    steps: int,
    shape: ModelShape = SHAPE,
    config: LoraConfig | None = None,
    runtime: Runtime | None = None,
    micro: int = 2,
) -> tuple[Fit, Transformer]:
    """The loop on a model with adapters; the bare model too, to look at."""
    runtime = runtime or Runtime(torch.device("cpu"))
    model = Transformer(shape)
    model.init_weights(0)
    add_lora(model, config or LoraConfig(rank=4), seed=0)
    optimizers = build_optimizer(
        model.named_parameters(), OptimConfig(lr=1e-2, weight_decay=0.0), lora_plus_ratio=4.0
    )
    run = Fit(
        wrap_model(model, runtime),
        Rows(micro, runtime.rank, runtime.world),
        LanguageModeling(),
        optimizers,
        lambda step: 1.0,
        runtime,
        TrainState(steps=steps),
        Meters(),
        lambda state, means: losses(run).append(means["train/loss"]),
        log_every=1,
    )
    run.losses = []  # type: ignore[attr-defined]
    return run, model


def losses(run: Fit) -> list[float]:
    return run.losses  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("kind", OPTIONS)
def test_it_learns_and_the_base_keeps_its_bits(kind: str) -> None:
    run, model = make(12, *OPTIONS[kind])
    rows = run.source.take()
    run.source.take = lambda n=1, policy=None: rows  # type: ignore[method-assign]
    trained = lora_parameters(model).keys()
    before = {n: p.clone() for n, p in model.named_parameters()}
    tokens = torch.arange(9)
    with adapters_off(model), torch.no_grad():
        base = model.eval()(tokens, tokens)
    fit(run)
    assert losses(run)[-1] < losses(run)[0] - 0.05
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    with adapters_off(model), torch.no_grad():
        assert torch.equal(model.eval()(tokens, tokens), base)


@pytest.mark.parametrize("kind", OPTIONS)
def test_stop_and_resume_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    """All that is saved is the adapter and its optimiser."""
    straight, whole = make(5, *OPTIONS[kind])
    fit(straight)
    first, model = make(3, *OPTIONS[kind])
    fit(first)
    saved = {"adapter": lora_state(model), "optimizer": first.optimizers.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    second, model = make(5, *OPTIONS[kind])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    load_lora_state(model, state["adapter"])
    second.optimizers.load_state_dict(state["optimizer"])
    second.state.step = second.source.step = 3
    fit(second, resumed=True)
    assert losses(first) + losses(second) == losses(straight)
    found, wanted = model.state_dict(), whole.state_dict()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("name", ["lora.pt", "optimizer.pt", "trainer.json"])
@pytest.mark.parametrize("harm", ["cut", "empty", "gone", "noise"])
def test_a_damaged_checkpoint_is_one_line(name: str, harm: str, tmp_path: Path) -> None:
    run, model = make(1, *OPTIONS["pissa dora int8"])
    path = save_checkpoint(tmp_path, model, None, run.optimizers, run.state, {}, base="here")
    load_checkpoint(path, model, run.optimizers, run.state)
    file = path / "state" / name
    whole = file.read_bytes()
    file.unlink()
    if harm != "gone":
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\xff\x00noise" * 9}[harm])
    with pytest.raises(
        KllmError, match="damaged checkpoint: .*delete .*step-000000 to continue from"
    ) as caught:
        load_checkpoint(path, model, run.optimizers, run.state)
    assert "\n" not in str(caught.value) and name in str(caught.value)


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_lora_training import OPTIONS, lora_state, losses, make
from kllm.train.device import make_runtime
from kllm.train.loop import fit
torch.set_num_threads(1)
runtime = make_runtime("cpu")
assert runtime.world == 2
for number, kind in enumerate(("pissa dora int8", "experts int4")):
    run, model = make(4, *OPTIONS[kind], runtime=runtime, micro=1)
    fit(run)
    if runtime.main:
        torch.save([losses(run), lora_state(model)], {out!r} + f"/{{number}}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for number, kind in enumerate(("pissa dora int8", "experts int4")):
        run, model = make(4, *OPTIONS[kind], micro=4)
        fit(run)
        curve, state = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert curve == pytest.approx(losses(run), abs=1e-4)
        for name, value in lora_state(model).items():
            torch.testing.assert_close(state[name], value, atol=1e-3, rtol=1e-2)  # Adam divides by tiny ones


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dropout", "pissa dora int8"])
def test_compiled_blocks_compute_the_same(kind: str) -> None:
    shape, config = OPTIONS[kind]
    outputs = []
    for compiled in (False, True):
        _, model = make(1, shape.with_(num_hidden_layers=1), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        if compiled:
            compile_blocks(model)
        tokens = torch.arange(17)
        model.train()
        torch.manual_seed(0)
        seeded = model(tokens, tokens)
        torch.manual_seed(0)
        assert torch.equal(model(tokens, tokens), seeded)  # dropout is of the step
        hidden = model.eval()(tokens, tokens)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        with adapters_off(model), torch.no_grad():
            off = model(tokens, tokens)
        outputs.append([hidden, off, *(p.grad for p in lora_parameters(model).values())])
    for plain, fast in zip(*outputs, strict=True):
        assert (fast - plain).abs().max() < 1e-5 * plain.abs().max().clamp_min(1)
