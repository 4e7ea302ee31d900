"""Proof that what was written is what was meant: another reader loads it and must say the same.

The independent reader is transformers. Weights are compared exactly with what was exported, logits
within a tolerance, greedy tokens one by one, token ids of a few texts as well.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kllm.errors import KllmError
from kllm.export.hf import read_tensors
from kllm.export.load import load_model
from kllm.export.quantized import QuantizedExport, dequantize_tensors
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Largest difference of two float32 logits, as a share of the largest logit (at least 1)."""
HALF_TOLERANCE = 3e-3
"""The same for packed experts, which transformers unpacks in float16."""
NEW_TOKENS = 64
TEXTS = (
    "Hello, world! It's 2024; 3.14 < 22/7.\n\n\tdef f(x): return x**2",
    "你好，世界！今天天气怎么样？",
    "naïve café — 東京 Привет \U0001f600\u00a0 end  ",
)
PROMPTS = ("Hello", "The sun", "你好，", "1+1=")


def verify_hf(
    model: Transformer, tokenizer: Tokenizer | None, directory: Path, *, dtype: str = "float32"
) -> dict[str, Any]:
    """Loads `directory` with transformers and compares it with `model`.

    Args:
        model: what was exported (any float dtype; compared after rounding to `dtype`).
        tokenizer: its tokenizer; prompts are byte values without one.
        directory: what was written.
        dtype: of the file.

    Returns:
        reader, max_abs_diff (of logits), tolerance, greedy_equal of greedy_total tokens, texts_equal.

    Raises:
        KllmError: the reader refuses the directory, or something differs.
    """
    reader, theirs = _load_theirs(directory)
    written, _ = load_model(directory)
    same_weights(model, written, dtype, directory)
    return _compared(written.eval(), theirs, tokenizer, directory, reader)


def verify_quantised(
    export: QuantizedExport, written: Transformer, tokenizer: Tokenizer | None, directory: Path
) -> dict[str, Any]:
    """Checks a quantised directory: what is read back is what was packed, and transformers computes with it.

    transformers unpacks compressed-tensors on any device where that package is installed; AWQ it runs on
    GPUs only, so there the reader is our own unpacker.

    Args:
        export: what was written.
        written: the directory as `load_model` reads it, in evaluation mode.
    """
    again = dequantize_tensors(read_tensors(directory), export.quantization_config, str(directory))
    for name, tensor in dequantize_tensors(export.tensors, export.quantization_config, "export").items():
        if not torch.equal(again[name], tensor):
            raise KllmError(f"tensor {name} is not what was exported", where=str(directory))
    if export.scheme == "awq" or importlib.util.find_spec("compressed_tensors") is None:
        return {"reader": "kllm (its own unpacker)", "tensors_equal": len(again)}
    with contextlib.redirect_stderr(io.StringIO()):  # unpacking shows bars of its own, as late as it can
        reader, theirs = _load_theirs(directory)
        share = HALF_TOLERANCE if written.shape.is_moe else TOLERANCE
        return _compared(written, theirs, tokenizer, directory, reader, share)


def _compared(
    written: Transformer,
    theirs: Any,
    tokenizer: Tokenizer | None,
    directory: Path,
    reader: str,
    share: float = TOLERANCE,
) -> dict[str, Any]:
    """Logits, greedy tokens and token ids of two readers of one directory."""
    prompts = prompts_for(tokenizer, written.shape.vocab_size)
    worst, bound = 0.0, 0.0
    with torch.no_grad():
        for ids in prompts:
            row = torch.tensor(ids)
            ours = written.logits(written(row, torch.arange(len(ids))))
            other = theirs(row[None], use_cache=False).logits[0].float()
            if not torch.isfinite(other).all():
                raise KllmError(f"{reader} computes NaN from what was written", where=str(directory))
            worst = max(worst, float((ours - other).abs().max()))
            bound = max(bound, share * max(1.0, float(ours.abs().max())))
        equal, total = _greedy(written, theirs, prompts, bound)
    report = {
        "reader": reader,
        "max_abs_diff": worst,
        "tolerance": bound,
        "greedy_equal": equal,
        "greedy_total": total,
        **_same_tokens(tokenizer, directory, reader),
    }
    if worst > bound or equal < total:
        raise KllmError(
            f"{reader} differs: logits by {worst:.2e} (allowed {bound:.1e}), "
            f"greedy tokens {equal} of {total}",
            where=str(directory),
        )
    return report


def _load_theirs(directory: Path) -> tuple[str, Any]:
    try:
        import transformers
    except ImportError:
        raise KllmError(
            "verifying needs transformers, which is not installed",
            where=str(directory),
            hint="pip install transformers, or --no-verify",
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = f"transformers {transformers.__version__}"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
    except Exception as e:  # whatever it raises, the export failed
        reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise KllmError(f"{name} cannot load it: {reason}", where=str(directory)) from e
    return name, model.eval()


def same_weights(model: Transformer, written: Transformer, dtype: str, where: Path) -> None:
    """KllmError unless `written` is `model` rounded to `dtype`, bit by bit."""
    kind = getattr(torch, dtype)
    theirs = written.state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor.detach().cpu().to(kind).float(), theirs[name].float()):
            raise KllmError(f"tensor {name} is not what was exported", where=str(where))


def prompts_for(tokenizer: Tokenizer | None, vocab: int) -> list[list[int]]:
    if tokenizer is None:
        return [[(7 * i + k) % vocab for i in range(12)] for k in range(len(PROMPTS))]
    encoded = [ids for ids in tokenizer.encode_batch(PROMPTS) if ids]
    return [[tokenizer.eos_token_id], *encoded]  # a prompt of one token is a case of its own


def _greedy(ours: Transformer, theirs: Any, prompts: Sequence[list[int]], bound: float) -> tuple[int, int]:
    """Tokens that agree and their number; where the two best are closer than noise either is right."""
    equal = total = 0
    for ids in prompts:
        length = min(NEW_TOKENS, ours.shape.max_position_embeddings - len(ids))
        config = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "use_cache": True}
        row = torch.tensor([ids])
        out = theirs.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **config)[0]
        logits = ours.logits(ours(out[:-1], torch.arange(len(out) - 1)))[len(ids) - 1 :]
        logits = _without_stops(logits, theirs)
        chosen = out[len(ids) :]
        margin = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
        equal += int((margin <= 2 * bound).sum())
        total += len(chosen)
    return equal, total


def _without_stops(logits: Tensor, theirs: Any) -> Tensor:
    """`min_new_tokens` forbids the end tokens there, so they do not count here."""
    stops = theirs.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    logits = logits.clone()
    logits[:, stops] = float("-inf")
    return logits


def _same_tokens(tokenizer: Tokenizer | None, directory: Path, reader: str) -> dict[str, int]:
    if tokenizer is None:
        return {}
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        found = theirs(text, add_special_tokens=False)["input_ids"]
        if found != ids:
            shown = json.dumps(text, ensure_ascii=False)
            raise KllmError(f"{reader} splits {shown} into other tokens", where=str(directory))
    return {"texts_equal": len(TEXTS)}
