"""A training stage from its section to its result: the one place where all rooms meet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from kllm.config.stages import DistillStage, PretrainStage, TrainingStage
from kllm.errors import Interrupted
from kllm.export.adapter import save_adapter
from kllm.export.hf import save_model
from kllm.export.hub import is_hub_id
from kllm.export.load import load_model
from kllm.model.lora import is_adapted, merge_lora
from kllm.model.presets import count_parameters, flops_per_token
from kllm.model.transformer import Transformer
from kllm.objectives.preference_eval import collapse_warning
from kllm.observe.metrics import mfu
from kllm.observe.sinks import make_sinks
from kllm.optim.build import OptimConfig, build_optimizer, lr_scale
from kllm.run.assemble import build_model, load_tokenizer, plan_sizes, planned_adapter, prepare_data
from kllm.run.blackbox import collected
from kllm.run.context import StageContext
from kllm.run.hooks import EvaluateHook, SampleHook, SaveHook
from kllm.run.learning import Materials, learning_of
from kllm.tokenizer.chat import ChatEncoder
from kllm.train.checkpoint import checkpoint_dir, latest_checkpoint, load_checkpoint, load_weights
from kllm.train.device import compile_blocks, make_runtime, peak_flops, worth_compiling, wrap_model
from kllm.train.loop import Fit, Meters, StopSignal, fit
from kllm.train.objective import TrainState


class TrainingRun:
    """One attempt at a training stage of any kind; continues where an earlier attempt stopped.

    Args:
        ctx: the stage, its folder and inputs.
    """

    def __init__(self, ctx: StageContext) -> None:
        stage = ctx.stage
        assert isinstance(stage, TrainingStage)
        self.runtime = make_runtime(ctx.device, stage.train.dtype)
        if isinstance(stage, DistillStage) and stage.from_endpoint is not None:
            stage = collected(ctx, stage, self.runtime.main)
            self.runtime.barrier()
        self.ctx, self.stage = ctx, stage
        self.tokenizer = load_tokenizer(ctx, stage.tokenizer.chat_template)
        self.data = prepare_data(ctx, stage, self.tokenizer, self.runtime)
        self.model = build_model(ctx, stage, self.tokenizer, self.runtime, self.data)
        materials = Materials(ctx, stage, self.runtime, self.tokenizer, self.model, self.data)
        self.learning = learning_of(materials)
        self.source, self.objective = self.learning.source, self.learning.objective
        self.sizes = plan_sizes(stage, self.learning.rows_per_epoch)
        self.optim = OptimConfig(**stage.optim.model_dump())
        self.optimizers = build_optimizer(
            self._named_parameters(), self.optim, stage.adapter.lr_ratio if stage.adapter else 1.0
        )
        self.flops = self._flops()
        self.peak = peak_flops(self.runtime)
        self.state, self.meters = TrainState(steps=self.sizes.steps), Meters()
        self.sinks = make_sinks(
            ctx.stage_dir,
            stage.log.sinks if self.runtime.main else (),
            project=stage.log.project,
            name=f"{ctx.recipe.name}-{stage.name}",
        )
        self.last: dict[str, float] = {}
        self.warned = False
        self.kllm_only = 0

    @property
    def _extra(self) -> list[nn.Parameter]:
        """Parameters that the objective brings along (a projection of hidden states)."""
        return list(self.objective.parameters()) if isinstance(self.objective, nn.Module) else []

    def _named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The model's and the objective's."""
        yield from self.model.named_parameters()
        if isinstance(self.objective, nn.Module):
            yield from self.objective.named_parameters()

    def _flops(self) -> float:
        """Of one token in training."""
        shape, section = self.model.shape, self.stage.adapter
        active = planned_adapter(section, shape).active if section else None
        return flops_per_token(shape, self._context_length(), adapter=active)

    def _context_length(self) -> int:
        """Mean number of tokens that attention spans: a document, at most a row."""
        tokens = sum(s.meta["tokens"] for s in self.data.train)
        docs = sum(s.meta["docs"] for s in self.data.train)
        return min(tokens // max(1, docs), self.stage.row_tokens)

    def _compile(self) -> bool:
        """Compiles the blocks when asked to, or when the planned steps pay for it."""
        tokens = self.sizes.rows_per_step * self.stage.row_tokens
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
            extra = load_checkpoint(path, self.model, self.optimizers, self.state, self._objective_module)
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
        self._watch(means.get("logps/chosen_drift"))
        if self.runtime.main:
            self.sinks.write({"step": state.step, **means})
            self.ctx.reporter.progress(self.stage.name, state.step, state.steps, means)

    def _watch(self, drift: float | None) -> None:
        """Says once when the better answers become unlikely too: the known failure of preference losses."""
        warning = collapse_warning(drift) if drift is not None else None
        if warning and not self.warned and self.runtime.main:
            self.ctx.reporter.warn(warning)
        self.warned = self.warned or warning is not None

    def _held_out(self, model: nn.Module) -> dict[str, float]:
        """Losses without a reference know the drift of held-out answers alone."""
        assert self.learning.held_out is not None
        figures = self.learning.held_out(model)
        self._watch(figures.get("val/chosen_drift"))
        return figures

    def _encode_prompt(self, text: str) -> list[int]:
        if isinstance(self.stage, PretrainStage):
            return self.tokenizer.encode(text)
        return ChatEncoder(self.tokenizer).prompt([{"role": "user", "content": text}])

    def _extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and moments, as JSON."""
        return {"source": self.source.state_dict(), "meters": self.meters.sums.state_dict()}

    def _hooks(self, model: Any) -> tuple[EvaluateHook, list[Any]]:
        train, ctx = self.stage.train, self.ctx
        evaluator = EvaluateHook(
            model, self._held_out if self.learning.held_out else None, self.runtime,
            every=train.eval_every, sinks=self.sinks, reporter=ctx.reporter,
        )  # fmt: skip
        sampler = SampleHook(
            model, self.tokenizer, train.sample_prompts, self._encode_prompt, self.runtime,
            every=train.sample_every, reporter=ctx.reporter, seed=ctx.seed,
        )  # fmt: skip
        saver = SaveHook(
            ctx.stage_dir, model, self.tokenizer, self.optimizers, self.runtime,
            self._extra_state,
            every=train.save_every, keep_last=train.keep_last, keep_best=train.keep_best, sinks=self.sinks,
            objective=self._objective_module, base=self._base,
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
                model, self.source, self.objective, self.optimizers,
                lambda step: lr_scale(step, self.sizes.steps, self.optim),
                self.runtime, self.state, self.meters, self._log, hooks, stop, extra=self._extra,
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
        """The stage's result: the last weights, or the best ones when they were kept.

        Of an adapter both are written: the adapter itself, and `final`, the model with it merged in.
        """
        model, best = self.model, self.state.best_step
        if self.stage.train.keep_best and best is not None and best != self.state.step:
            path = checkpoint_dir(self.ctx.stage_dir, best)
            if path.exists():
                model = self._best_model(path)
                self.ctx.reporter.message(f"final is the best checkpoint, step {best}")
        if is_adapted(model):
            names = save_adapter(model, self.ctx.stage_dir / "adapter", base=self._base)
            self.kllm_only = len(names)
            if names:
                self.ctx.reporter.warn(
                    f"adapter/ changes {len(names)} experts or routers: kllm convert --merge reads it, peft "
                    "and vLLM do not; give them final/, which has it merged in"
                )
            model = merge_lora(model)
        save_model(model, self.tokenizer, self.ctx.final_dir)

    def _best_model(self, path: Path) -> Transformer:
        if not is_adapted(self.model):
            return load_model(path)[0]
        load_weights(path, self.model)
        return self.model

    @property
    def _base(self) -> str:
        """The model that an adapter belongs to: its hub id, or its directory, whole: adapters are moved."""
        reference = self.ctx.recipe.inputs(self.stage.name).get("model", "")
        directory = self.ctx.inputs.get("model")
        if directory is None or (is_hub_id(reference) and not Path(reference).exists()):
            return reference
        return str(directory.resolve())

    @property
    def _objective_module(self) -> nn.Module | None:
        """The objective, where it has parameters of its own."""
        return self.objective if isinstance(self.objective, nn.Module) else None

    def _facts(self, evaluator: EvaluateHook, compiled: bool, seconds: float) -> dict[str, Any]:
        return {
            "result": {**self.last, **evaluator.latest},
            "parameters": count_parameters(self.model.shape),
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
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
            "adapter_kllm_only": self.kllm_only,
            "best": {"step": self.state.best_step, "val/loss": self.state.best_loss},
        }

    def _header(self, compiled: bool) -> dict[str, Any]:
        shape, sizes, row = self.model.shape, self.sizes, self.stage.row_tokens
        docs = sum(s.meta["docs"] for s in self.data.train)
        tokens = sum(s.meta["tokens"] for s in self.data.train)
        total = sizes.steps * sizes.rows_per_step * row
        size = f"{count_parameters(shape):,} parameters"
        if is_adapted(self.model):
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            size += f" (an adapter of {trained:,} is trained)"
        device = f"{self.runtime.device} {str(self.runtime.dtype).removeprefix('torch.')}"
        if self.runtime.world > 1:
            device += f" x {self.runtime.world}"
        data = f"{docs:,} documents, {tokens:,} tokens"
        stats = self.data.stats
        if dropped := stats["dropped"]:
            what = {"preference": "pairs", "rated": "rated answers"}.get(self.stage.data_kind, "documents")
            every = stats["docs"] + stats["val_docs"] + dropped
            data += f"; left out: {dropped:,} of {every:,} {what}, too long for dataset.seq_len"
        return {
            "model": f"{size}, {shape.num_hidden_layers} layers of {shape.hidden_size}",
            "data": data,
            "plan": f"{sizes.steps:,} steps of {sizes.rows_per_step} x {row} tokens",
            "compute": f"{self.flops * total / 1e12:,.1f} TFLOP",
            "device": device + (", compiled" if compiled else ""),
            "folder": str(self.ctx.stage_dir),
        }
