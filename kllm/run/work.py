"""The work of each kind of stage, in this process: tokenizer, training, evaluation, export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kllm.config.stages import EvalStage, ExportStage, TokenizerStage
from kllm.errors import UserError
from kllm.run.context import StageContext


def do_work(ctx: StageContext) -> dict[str, Any]:
    """Runs `ctx.stage` to its end and returns its facts (`result` among them).

    Heavy rooms are imported here, by kind: a tokenizer stage never waits for torch.
    """
    if isinstance(ctx.stage, TokenizerStage):
        return _tokenizer_stage(ctx, ctx.stage)
    if isinstance(ctx.stage, EvalStage):
        return _eval_stage(ctx, ctx.stage)
    if isinstance(ctx.stage, ExportStage):
        from kllm.run.export import export_stage

        return export_stage(ctx, ctx.stage)
    from kllm.run.training import TrainingRun

    return TrainingRun(ctx).run()


def _tokenizer_stage(ctx: StageContext, stage: TokenizerStage) -> dict[str, Any]:
    from kllm.data.texts import mixed_texts
    from kllm.tokenizer.train import train_tokenizer

    template = Path(stage.chat_template).read_text(encoding="utf-8") if stage.chat_template else None
    began = time.monotonic()
    tokenizer, report = train_tokenizer(
        mixed_texts(stage.data),
        stage.vocab_size,
        max_bytes=stage.max_bytes,
        min_frequency=stage.min_frequency,
        han_cut=stage.han_cut,
        reserved=stage.reserved,
        chat_template=template,
        progress=lambda part, done, total: ctx.reporter.progress(f"{stage.name} {part}", done, total, {}),
    )
    for note in report.notes():
        ctx.reporter.warn(note)
    tokenizer.save(ctx.final_dir)
    facts = {"vocab_size": tokenizer.vocab_size, "train_seconds": time.monotonic() - began}
    return {"result": {**vars(report), **facts}, **facts}


def _eval_stage(ctx: StageContext, stage: EvalStage) -> dict[str, Any]:
    from kllm.eval.tasks import run_task
    from kllm.export.load import load_model
    from kllm.train.device import make_runtime

    runtime = make_runtime(ctx.device)
    model, tokenizer = load_model(ctx.inputs["model"], runtime.device, say=ctx.reporter.message)
    if tokenizer is None:
        hint = f"kllm convert {ctx.inputs['model']} OUT --tokenizer DIR gives it one"
        raise UserError("the model has no tokenizer beside it", str(ctx.inputs["model"]), hint)
    model.eval()
    results: dict[str, Any] = {}
    for task in stage.tasks:
        results[task] = run_task(
            task,
            model,
            tokenizer,
            limit=stage.limit,
            batch_size=stage.batch_size,
            max_new_tokens=stage.max_new_tokens,
            seed=ctx.seed,
        )
    return {"result": results, "device": str(runtime.device)}
