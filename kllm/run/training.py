"""A training stage from its section to its result: the one place where all rooms meet."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kllm.config.stages import PretrainStage, SftStage
from kllm.data.loader import PackedSource, val_batches
from kllm.errors import Interrupted
from kllm.export.hf import save_model
from kllm.export.load import load_model
from kllm.model.presets import count_parameters, flops_per_token
from kllm.objectives.lm import LanguageModeling
from kllm.observe.metrics import mfu
from kllm.observe.sinks import make_sinks
from kllm.optim.build import OptimConfig, build_optimizer, lr_scale
from kllm.run.assemble import build_model, load_tokenizer, plan_sizes, prepare_data, token_weight_table
from kllm.run.context import StageContext
from kllm.run.hooks import EvaluateHook, SampleHook, SaveHook
from kllm.tokenizer.chat import ChatEncoder
from kllm.train.checkpoint import checkpoint_dir, latest_checkpoint, load_checkpoint
from kllm.train.device import compile_blocks, make_runtime, peak_flops, worth_compiling, wrap_model
from kllm.train.loop import Fit, Meters, StopSignal, fit
from kllm.train.objective import TrainState


class TrainingRun:
    """One attempt at a pretrain or sft stage; continues where an earlier attempt stopped.

    Args:
        ctx: the stage, its folder and inputs.
    """

    def __init__(self, ctx: StageContext) -> None:
        stage = ctx.stage
        assert isinstance(stage, PretrainStage | SftStage)
        self.ctx, self.stage = ctx, stage
        self.runtime = make_runtime(ctx.device, stage.train.dtype)
        self.tokenizer = load_tokenizer(ctx, stage.tokenizer.chat_template)
        self.model = build_model(ctx, stage, self.tokenizer, self.runtime)
        self.data = prepare_data(ctx, stage, self.tokenizer, self.runtime)
        self.source = self._source()
        self.sizes = plan_sizes(stage, self.source.rows_per_epoch)
        self.optim = OptimConfig(**stage.optim.model_dump())
        self.optimizers = build_optimizer(self.model.named_parameters(), self.optim)
        self.flops = flops_per_token(self.model.shape, self._context_length())
        self.peak = peak_flops(self.runtime)
        self.state, self.meters = TrainState(steps=self.sizes.steps), Meters()
        self.sinks = make_sinks(
            ctx.stage_dir,
            stage.log.sinks if self.runtime.main else (),
            project=stage.log.project,
            name=f"{ctx.recipe.name}-{stage.name}",
        )
        self.last: dict[str, float] = {}

    @property
    def _micro_rows(self) -> int:
        return max(1, self.stage.train.micro_batch_tokens // self.stage.dataset.seq_len)

    def _source(self) -> PackedSource:
        stage, runtime = self.stage, self.runtime
        weights = stage.train.token_weights
        return PackedSource(
            self.data.train,
            [s.weight for s in stage.data],
            seq_len=stage.dataset.seq_len,
            rows_per_step=max(1, stage.train.batch_tokens // stage.dataset.seq_len),
            micro_rows=self._micro_rows,
            seed=self.ctx.seed,
            rank=runtime.rank,
            world=runtime.world,
            packing=stage.dataset.packing,
            kind="text" if isinstance(stage, PretrainStage) else "chat",
            token_weights=token_weight_table(weights, self.tokenizer, self.model.shape.vocab_size),
        )

    def _context_length(self) -> int:
        """Mean number of tokens that attention spans: a document, at most a row."""
        tokens = sum(s.meta["tokens"] for s in self.data.train)
        docs = sum(s.meta["docs"] for s in self.data.train)
        return min(tokens // max(1, docs), self.stage.dataset.seq_len)

    def _compile(self) -> bool:
        """Compiles the blocks when asked to, or when the planned steps pay for it."""
        tokens = self.sizes.rows_per_step * self.stage.dataset.seq_len
        wanted = worth_compiling(
            self.stage.train.compile,
            step_seconds=self.flops * tokens / (0.6 * (self.peak or 1e12)),
            steps=self.sizes.steps,
            moe=self.model.shape.is_moe,
            device=self.runtime.device,
        )
        if wanted:
            compile_blocks(self.model)
        return wanted

    def _resume(self) -> bool:
        """Continues from the newest whole checkpoint, if there is one."""
        main = self.runtime.main
        path, torn = latest_checkpoint(self.ctx.stage_dir) if main else (None, [])
        self.runtime.barrier()
        if not main:
            path, _ = latest_checkpoint(self.ctx.stage_dir)
        for leftover in torn:
            self.ctx.reporter.warn(f"ignored a torn checkpoint: {leftover.name}")
        if path is not None:
            extra = load_checkpoint(path, self.model, self.optimizers, self.state)
            self.source.load_state_dict(extra["source"])
            self.meters.sums.load_state_dict(extra["meters"])
            if main:
                self.ctx.reporter.message(f"continuing from {path.name}")
        if main:
            self.sinks.truncate_after(self.state.step if path is not None else -1)
        return path is not None

    def _log(self, state: TrainState, means: dict[str, float]) -> None:
        share = mfu(self.flops, means.get("perf/tok_s"), self.peak)
        if share is not None:
            means["perf/mfu"] = share
        self.last = means
        if self.runtime.main:
            self.sinks.write({"step": state.step, **means})
            self.ctx.reporter.progress(self.stage.name, state.step, state.steps, means)

    def _encode_prompt(self, text: str) -> list[int]:
        if isinstance(self.stage, PretrainStage):
            return self.tokenizer.encode(text)
        return ChatEncoder(self.tokenizer).prompt([{"role": "user", "content": text}])

    def _hooks(self, model: Any) -> tuple[EvaluateHook, list[Any]]:
        train, seq_len, ctx = self.stage.train, self.stage.dataset.seq_len, self.ctx
        held_out = (
            val_batches(self.data.val, seq_len, train.eval_tokens, self._micro_rows) if self.data.val else []
        )
        token_bytes = np.zeros(self.model.shape.vocab_size, dtype=np.int64)
        known = self.tokenizer.token_bytes()
        token_bytes[: len(known)] = known
        evaluator = EvaluateHook(
            model, held_out, self.runtime, token_bytes,
            every=train.eval_every, sinks=self.sinks, reporter=ctx.reporter, chunk=train.loss_chunk,
        )  # fmt: skip
        sampler = SampleHook(
            model, self.tokenizer, train.sample_prompts, self._encode_prompt, self.runtime,
            every=train.sample_every, reporter=ctx.reporter, seed=ctx.seed,
        )  # fmt: skip
        saver = SaveHook(
            ctx.stage_dir, model, self.tokenizer, self.optimizers, self.runtime,
            lambda: {"source": self.source.state_dict(), "meters": self.meters.sums.state_dict()},
            every=train.save_every, keep_last=train.keep_last, keep_best=train.keep_best, sinks=self.sinks,
        )  # fmt: skip
        return evaluator, [evaluator, sampler, saver]

    def run(self) -> dict[str, Any]:
        """Trains to the end and writes `final/`; returns the facts of the stage.

        Raises:
            Interrupted: a signal came; everything up to here is saved.
        """
        resumed = self._resume()
        compiled = self._compile()
        if self.runtime.main:
            self.ctx.reporter.header(self.stage.name, self._header(compiled))
        model = wrap_model(self.model, self.runtime)
        evaluator, hooks = self._hooks(model)
        began = time.monotonic()
        with StopSignal() as stop:
            loop = Fit(
                model, self.source, LanguageModeling(self.stage.train.loss_chunk), self.optimizers,
                lambda step: lr_scale(step, self.sizes.steps, self.optim),
                self.runtime, self.state, self.meters, self._log, hooks, stop,
                max_grad_norm=self.stage.train.max_grad_norm, log_every=self.stage.train.log_every,
                seed=self.ctx.seed,
            )  # fmt: skip
            fit(loop, resumed)
            self.sinks.close()
            if self.state.step < self.state.steps:
                done = f"stopped at step {self.state.step} of {self.state.steps}, all saved"
                raise Interrupted(stop.signum or 2, done, "the same command continues here")
            if self.runtime.main:
                self._write_final()
            self.runtime.barrier()
        return self._facts(evaluator, compiled, time.monotonic() - began)

    def _write_final(self) -> None:
        """The stage's result: the last weights, or the best ones when they were kept."""
        model, best = self.model, self.state.best_step
        if self.stage.train.keep_best and best is not None and best != self.state.step:
            path = checkpoint_dir(self.ctx.stage_dir, best)
            if path.exists():
                model, _ = load_model(path)
                self.ctx.reporter.message(f"final is the best checkpoint, step {best}")
        save_model(model, self.tokenizer, self.ctx.final_dir)

    def _facts(self, evaluator: EvaluateHook, compiled: bool, seconds: float) -> dict[str, Any]:
        return {
            "result": {**self.last, **evaluator.latest},
            "parameters": count_parameters(self.model.shape),
            "steps": self.state.steps,
            "tokens": self.state.tokens,
            "trained_tokens": self.state.trained_tokens,
            "flops": self.flops * self.state.tokens,
            "train_seconds": seconds,
            "device": str(self.runtime.device),
            "dtype": str(self.runtime.dtype).removeprefix("torch."),
            "compiled": compiled,
            "processes": self.runtime.world,
            "data": self.data.stats,
            "best": {"step": self.state.best_step, "val/loss": self.state.best_loss},
        }

    def _header(self, compiled: bool) -> dict[str, Any]:
        shape, sizes, seq_len = self.model.shape, self.sizes, self.stage.dataset.seq_len
        docs = sum(s.meta["docs"] for s in self.data.train)
        tokens = sum(s.meta["tokens"] for s in self.data.train)
        total = sizes.steps * sizes.rows_per_step * seq_len
        size = f"{count_parameters(shape):,} parameters"
        device = f"{self.runtime.device} {str(self.runtime.dtype).removeprefix('torch.')}"
        if self.runtime.world > 1:
            device += f" x {self.runtime.world}"
        return {
            "model": f"{size}, {shape.num_hidden_layers} layers of {shape.hidden_size}",
            "data": f"{docs:,} documents, {tokens:,} tokens",
            "plan": f"{sizes.steps:,} steps of {sizes.rows_per_step} x {seq_len} tokens",
            "compute": f"{self.flops * total / 1e12:,.1f} TFLOP",
            "device": device + (", compiled" if compiled else ""),
            "folder": str(self.ctx.stage_dir),
        }
