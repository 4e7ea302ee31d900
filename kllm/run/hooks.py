"""What happens between steps: evaluate, sample, save. In this order, so that a save holds it all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kllm.engine.engine import Engine
from kllm.engine.params import SamplingParams
from kllm.model.lora import plain_model
from kllm.observe.console import Reporter
from kllm.observe.sinks import Sinks
from kllm.tokenizer.tokenizer import Tokenizer
from kllm.train.checkpoint import prune_checkpoints, save_checkpoint
from kllm.train.device import Runtime
from kllm.train.objective import TrainState, due, unwrap


class EvaluateHook:
    """Held-out figures at the start, every `every` steps and at the end; remembers the best."""

    def __init__(
        self,
        model: nn.Module,
        measure: Callable[[nn.Module], dict[str, float]] | None,
        runtime: Runtime,
        *,
        every: int,
        sinks: Sinks,
        reporter: Reporter,
    ) -> None:
        self.model, self.measure, self.runtime = model, measure, runtime
        self.every, self.sinks, self.reporter = every, sinks, reporter
        self.latest: dict[str, float] = {}

    def __call__(self, state: TrainState) -> None:
        stopped_early = state.last and state.step < state.steps
        if self.measure is None or stopped_early or not (state.step == 0 or due(state, self.every)):
            return
        self.latest = self.measure(self.model)
        loss = self.latest.get("val/loss")
        if loss is not None and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step = loss, state.step
        if self.runtime.main:
            self.sinks.write({"step": state.step, **self.latest})
            self.reporter.evaluation(state.step, self.latest)


class SampleHook:
    """Greedy-ish continuations of fixed prompts, to see the model learn."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        encode: Callable[[str], list[int]],
        runtime: Runtime,
        *,
        every: int,
        reporter: Reporter,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.prompts, self.encode = model, tokenizer, prompts, encode
        self.runtime, self.every, self.reporter, self.seed = runtime, every, reporter, seed

    def __call__(self, state: TrainState) -> None:
        if not (self.every and self.prompts and self.runtime.main and state.step and due(state, self.every)):
            return
        inner = unwrap(self.model)
        inner.eval()
        engine = Engine(plain_model(inner), self.tokenizer, max_batch=len(self.prompts))
        params = SamplingParams(max_tokens=48, temperature=0.7, seed=self.seed)
        ids = [self.encode(prompt) for prompt in self.prompts]
        for prompt, completion in zip(self.prompts, engine.generate(ids, params), strict=True):
            self.reporter.sample(state.step, prompt, completion.text)


class SaveHook:
    """A checkpoint every `every` steps, at the end and when told to stop."""

    def __init__(
        self,
        stage_dir: Path,
        model: nn.Module,
        tokenizer: Tokenizer,
        optimizers: Any,
        runtime: Runtime,
        extra: Callable[[], dict[str, Any]],
        *,
        every: int,
        keep_last: int,
        keep_best: bool,
        sinks: Sinks,
        objective: nn.Module | None = None,
        base: str = "",
    ) -> None:
        self.stage_dir, self.model, self.tokenizer, self.optimizers = stage_dir, model, tokenizer, optimizers
        self.runtime, self.extra, self.every, self.sinks = runtime, extra, every, sinks
        self.keep_last, self.keep_best = keep_last, keep_best
        self.objective, self.base = objective, base

    def __call__(self, state: TrainState) -> None:
        if state.step == 0 or not due(state, self.every):
            return
        if self.runtime.main:
            self.sinks.flush()  # rows up to here reach the disk before the checkpoint that follows them
            save_checkpoint(
                self.stage_dir, unwrap(self.model), self.tokenizer, self.optimizers, state, self.extra(),
                self.objective, self.base,
            )  # fmt: skip
            prune_checkpoints(self.stage_dir, self.keep_last, state.best_step if self.keep_best else None)
        self.runtime.barrier()
