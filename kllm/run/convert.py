"""`kllm convert`: load anything, change what was asked for, write it, prove it, say so in its card."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kllm.errors import UserError
from kllm.export import hub
from kllm.export.hf import save_model
from kllm.export.load import load_model
from kllm.export.resolve import resolve
from kllm.files import write_text
from kllm.model.transformer import Transformer
from kllm.run.exportcard import export_card
from kllm.tokenizer.tokenizer import Tokenizer

SMALL = 400_000_000
"""Models of up to so many parameters are verified without being asked."""


@dataclass(frozen=True)
class Conversion:
    """What is asked for; see `kllm convert --help`."""

    source: str
    out: Path
    dtype: str = "float32"
    max_shard_bytes: int | None = None
    tokenizer: str | None = None
    rope_scaling: str | None = None
    factor: float | None = None
    adapter: str | None = None
    verify: bool | None = None
    """None: if the model is small enough to be loaded twice without a thought."""
    push: str | None = None
    private: bool = False
    overwrite: bool = False


def convert(job: Conversion, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Does the conversion and returns its report (what was written, how it compares).

    Raises:
        UserError, KllmError: bad input, or what was written cannot be verified.
    """
    _check(job)
    model, tokenizer = load_model(job.source)
    report: dict[str, Any] = {"source": job.source, "out": str(job.out), "dtype": job.dtype}
    model, tokenizer = _change(job, model.eval(), tokenizer, report)
    report["parameters"] = model.num_parameters()
    save_model(model, tokenizer, job.out, dtype=job.dtype, max_shard_bytes=job.max_shard_bytes)
    report["bytes"] = sum(f.stat().st_size for f in job.out.iterdir())
    if _verifies(job, model, say):
        from kllm.export.verify import verify_hf

        report["verified"] = verify_hf(model, tokenizer, job.out, dtype=job.dtype)
    if change := report.get("vocabulary"):
        say(f"vocabulary: {change['kept']:,} of {change['rows']:,} rows kept")
    write_text(job.out / "README.md", export_card(job.out.name, job.source, report))
    if job.push is not None:
        report["pushed"] = hub.push(job.out, job.push, private=job.private)
    return report


def _check(job: Conversion) -> None:
    if job.push is not None:
        hub.check_repo(job.push)
    if (job.rope_scaling is None) != (job.factor is None):
        raise UserError("--rope-scaling and --factor belong together", hint="--rope-scaling yarn --factor 4")
    if job.factor is not None and job.factor <= 1:
        raise UserError(f"must be above 1, got {job.factor:g}", where="flag --factor")
    source = Path(job.source)
    if source.exists() and job.out.exists() and resolve(source).resolve() == job.out.resolve():
        raise UserError("source and result are the same folder", where=str(job.out))
    if job.out.is_file():
        raise UserError("is a file; a directory is written", where=str(job.out))
    if job.out.is_dir() and any(job.out.iterdir()):
        if not (job.out / "config.json").is_file():  # never replace what is no model
            raise UserError("is there and holds no model", where=str(job.out), hint="name a new folder")
        if not job.overwrite:
            raise UserError("is there already", where=str(job.out), hint="--overwrite, or name a new folder")


def _change(
    job: Conversion, model: Transformer, tokenizer: Tokenizer | None, report: dict[str, Any]
) -> tuple[Transformer, Tokenizer | None]:
    if job.adapter is not None:
        from kllm.export.adapter import merge_adapter

        report["merged"] = merge_adapter(model, job.adapter)
    if job.tokenizer is not None:
        new = Tokenizer.load(job.tokenizer)
        if tokenizer is None:  # weights alone: the tokenizer they were trained with
            _fits(new, model, job.tokenizer)
        else:
            from kllm.export.vocabulary import change_vocabulary

            model, change = change_vocabulary(model, tokenizer, new)
            report["vocabulary"] = change.to_dict()
        tokenizer = new
    if job.rope_scaling is not None and job.factor is not None:
        model = _stretch(model, job.rope_scaling, job.factor)
    return model, tokenizer


def _fits(tokenizer: Tokenizer, model: Transformer, where: str) -> None:
    if tokenizer.vocab_size > model.shape.vocab_size:
        raise UserError(
            f"has {tokenizer.vocab_size:,} tokens, the model {model.shape.vocab_size:,} rows", where=where
        )


def _stretch(model: Transformer, kind: str, factor: float) -> Transformer:
    """The same weights with longer positions; they must not be stretched already."""
    shape = model.shape
    if shape.rope_scaling is not None:
        raise UserError(f"the model has rope_scaling {shape.rope_scaling['rope_type']} already")
    length = shape.max_position_embeddings
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = length
    longer = Transformer(shape.with_(rope_scaling=scaling, max_position_embeddings=int(length * factor)))
    longer.load_state_dict(model.state_dict())
    return longer.eval()


def _verifies(job: Conversion, model: Transformer, say: Callable[[str], None]) -> bool:
    if job.verify is not None:
        return job.verify
    if model.num_parameters() > SMALL:
        say(f"not verified: above {SMALL:,} parameters only --verify asks for it")
        return False
    if importlib.util.find_spec("transformers") is None:
        say("not verified: transformers is not installed")
        return False
    return True
