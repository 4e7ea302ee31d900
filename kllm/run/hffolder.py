"""Writes a Hugging Face folder, plain or quantised, and proves it, for `convert` and the export stage."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kllm.errors import UserError
from kllm.export.hf import write_files, write_model_files
from kllm.model.transformer import Transformer
from kllm.run.calibrate import calibration_texts, perplexity
from kllm.tokenizer.tokenizer import Tokenizer

SMALL = 400_000_000
"""Models of up to so many parameters are verified without being asked."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class HfOptions:
    """dtype of the numbers; largest file; quantisation with its group size and texts; whether to verify
    (None: if the model is small enough to be loaded twice without a thought)."""

    dtype: str = "float32"
    max_shard_bytes: int | None = None
    quant: str | None = None
    group_size: int | None = None
    calibrate: str | None = None
    verify: bool | None = None


def hf_folder(
    model: Transformer, tokenizer: Tokenizer | None, directory: Path, options: HfOptions, say: Say
) -> dict[str, Any]:
    """Fills a folder that exists; somebody else makes it atomic.

    Returns:
        parameters, bytes, dtype, and where they apply quant, perplexity (before, after, texts), verified.

    Raises:
        KllmError: what was written is not what was meant.
    """
    report: dict[str, Any] = {"parameters": model.num_parameters(), "dtype": options.dtype}
    verifying = verifies(options.verify, model, say, needs="transformers")
    if tokenizer is None:
        say("no tokenizer is beside the model, so the folder has none: --tokenizer DIR gives it one")
    if options.quant is None:
        size = options.max_shard_bytes
        write_model_files(model, tokenizer, directory, dtype=options.dtype, max_shard_bytes=size)
        if verifying:
            from kllm.export.verify import verify_hf

            report["verified"] = verify_hf(model, tokenizer, directory, dtype=options.dtype)
    else:
        report |= _quantised(model, tokenizer, directory, options, verifying, say)
    report["bytes"] = sum(f.stat().st_size for f in directory.iterdir())
    return report


def _quantised(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: Path,
    options: HfOptions,
    verifying: bool,
    say: Say,
) -> dict[str, Any]:
    from kllm.export.load import load_model

    if tokenizer is None:
        raise UserError("quantising needs a tokenizer, to read texts", hint="--tokenizer DIR")
    texts = calibration_texts(options.calibrate, tokenizer, model)
    if options.quant == "awq":
        from kllm.export.awq import quantize_awq

        if options.calibrate is None:
            say("calibrated on the built-in world; --calibrate FILE for texts of the model's own kind")
        export = quantize_awq(model, texts.rows, options.group_size)
    else:
        from kllm.export.packed import quantize_packed

        bits = 8 if options.quant == "int8" else 4
        half = "bfloat16" if options.dtype == "bfloat16" else "float16"
        export = quantize_packed(model, bits, options.group_size, dtype=half)
    for note in export.notes:
        say(note)
    write_files(
        export.tensors,
        model.shape,
        tokenizer,
        directory,
        dtype=export.dtype,
        max_shard_bytes=options.max_shard_bytes,
        quantization_config=export.quantization_config,
    )
    back, _ = load_model(directory)
    before, after = (perplexity(m, tokenizer, texts) for m in (model, back.eval()))
    report: dict[str, Any] = {
        "dtype": export.dtype,
        "quant": export.scheme,
        "group_size": export.group_size,
        "perplexity": {"before": before, "after": after, "texts": texts.source},
    }
    if verifying:
        from kllm.export.verify import verify_quantised

        report["verified"] = verify_quantised(export, back, tokenizer, directory)
    return report


def verifies(wanted: bool | None, model: Transformer, say: Say, needs: str | None = None) -> bool:
    """Whether to verify: as asked, else if the model is small and the package that it `needs` is here."""
    if wanted is not None:
        return wanted
    if model.num_parameters() > SMALL:
        say(f"not verified: above {SMALL:,} parameters only --verify asks for it")
        return False
    if needs is not None and importlib.util.find_spec(needs) is None:
        say(f"not verified: {needs} is not installed")
        return False
    return True
