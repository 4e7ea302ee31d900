"""Proof of a GGUF file: read back by the gguf package, and run by llama.cpp itself where it is installed.

What is read back must be what was meant: the same bits in f32, the rounding of the type otherwise, the
same token ids. llama.cpp must then agree with our model on exactly those weights; it multiplies quantised
weights with 8-bit activations, so the tolerance depends on the type.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from kllm.errors import KllmError
from kllm.export import llamacpp
from kllm.export.load import load_model
from kllm.export.verify import TEXTS, prompts_for
from kllm.model.transformer import Transformer
from kllm.tokenizer.tokenizer import Tokenizer

NEW_TOKENS = 32
ROUNDING = {
    "f32": 0.0,
    "f16": 1e-3,
    "bf16": 5e-3,
    "q8_0": 2e-2,
    "q6_k": 5e-2,
    "q5_0": 0.1,
    "q5_1": 0.1,
    "q5_k_m": 0.1,
    "q4_0": 0.2,
    "q4_1": 0.2,
    "q4_k_m": 0.2,
}
"""Largest root mean square of a tensor's change, as a share of its own root mean square."""
LOGPROBS = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2}
"""Largest difference of log-probabilities (nats, weighted by probability) between llama.cpp and our model
on the same weights: of the worst position in f32, of the median one otherwise, where it rounds activations
to the type of the weights, or to 8 bits, and a router near a tie may turn."""
QUANTISED = 0.15
SAME_GREEDY = 0.9
"""Share of greedy tokens that must agree where activations are rounded."""


def verify_gguf(model: Transformer, tokenizer: Tokenizer, path: Path, quant: str) -> dict[str, Any]:
    """Compares the file with `model` and, where a binding is installed, lets llama.cpp run it.

    Args:
        model: what was exported, in evaluation mode.
        tokenizer: its tokenizer.
        path: the file.
        quant: its type, one of `gguf_write.QUANTS`.

    Returns:
        reader; rounding (largest relative change of a tensor); kl (mean KL divergence in nats of the next
        token, from the model to the file's weights) and same_top (share of positions with the same
        likeliest token), both over the prompts and their continuations; with llama.cpp also
        logprob_diff (see `LOGPROBS`), tolerance, greedy_equal of greedy_total tokens, texts_equal.

    Raises:
        KllmError: something differs more than it may.
    """
    back, their_tokenizer = load_model(path)
    back.eval()
    report: dict[str, Any] = {"reader": "the gguf package", "rounding": _rounding(model, back, quant, path)}
    if their_tokenizer is not None and _expects_same_ids(tokenizer):
        ours = tokenizer.encode_batch(TEXTS)
        if their_tokenizer.encode_batch(TEXTS) != ours:
            raise KllmError("the tokenizer read back splits text differently", where=str(path))
        report["texts_equal"] = len(TEXTS)
    prompts = prompts_for(tokenizer, model.shape.vocab_size)
    if llamacpp.available() is None:
        report |= _damage(model, back, prompts)
        return report
    length = min(NEW_TOKENS, model.shape.max_position_embeddings - max(map(len, prompts)))
    answer = llamacpp.ask(path, prompts, length, TEXTS)
    report["reader"] = answer.reader
    if _expects_same_ids(tokenizer) and answer.texts != tokenizer.encode_batch(TEXTS):
        raise KllmError(f"{answer.reader} splits text differently", where=str(path))
    report |= _agreement(back, prompts, answer, quant, path)
    rows = [p + c.tokens for p, c in zip(prompts, answer.continuations, strict=True)]
    return report | _damage(model, back, rows)


def _expects_same_ids(tokenizer: Tokenizer) -> bool:
    """llama.cpp normalises nothing in a byte-level vocabulary: NFC tokenizers may differ on odd text."""
    spec = tokenizer.spec()
    return bool(spec["model"].get("byte_fallback")) or not spec.get("normalizer")


@torch.no_grad()
def _rounding(model: Transformer, back: Transformer, quant: str, path: Path) -> float:
    allowed, worst = ROUNDING[quant], 0.0
    theirs = back.state_dict()
    for name, tensor in model.state_dict().items():
        ours = tensor.detach().cpu().float()
        if allowed == 0.0:
            if not torch.equal(ours, theirs[name]):
                raise KllmError(f"tensor {name} is not what was exported", where=str(path))
            continue
        size = float(ours.pow(2).mean().sqrt())
        change = float((ours - theirs[name]).pow(2).mean().sqrt()) / size if size else 0.0
        worst = max(worst, change)
        if not change <= allowed:
            raise KllmError(
                f"tensor {name} changed by {change:.1%}, {quant} allows {allowed:.1%}", where=str(path)
            )
    return worst


@torch.no_grad()
def _agreement(
    back: Transformer, prompts: list[list[int]], answer: llamacpp.Answer, quant: str, path: Path
) -> dict[str, Any]:
    tolerance = LOGPROBS.get(quant, QUANTISED)
    differences, equal, total = [], 0, 0
    for prompt, said in zip(prompts, answer.continuations, strict=True):
        row = torch.tensor(prompt + said.tokens)
        hidden = back(row[:-1], torch.arange(len(row) - 1))[len(prompt) - 1 :]
        ours = back.logits(hidden).log_softmax(-1)
        for step, token, theirs in zip(ours, said.tokens, said.logprobs, strict=True):
            total += 1
            # where the two best are closer than the noise either is right
            equal += float(step.max() - step[token]) <= 4 * tolerance
            if theirs:
                ids = torch.tensor(list(theirs))
                apart = (step[ids] - torch.tensor(list(theirs.values()))).abs()
                differences.append(float((step[ids].exp() * apart).sum()))
    if not differences:
        raise KllmError(f"{answer.reader} told no probabilities", where=str(path))
    if any(map(math.isnan, differences)):
        raise KllmError(f"{answer.reader} computes NaN from it", where=str(path))
    exact = quant == "f32"
    change = max(differences) if exact else statistics.median(differences)
    if not change <= tolerance or equal < total * (1.0 if exact else SAME_GREEDY):
        raise KllmError(
            f"{answer.reader} differs: log-probabilities by {change:.2e} (allowed {tolerance:g}), "
            f"greedy tokens {equal} of {total}",
            where=str(path),
        )
    return {"logprob_diff": change, "tolerance": tolerance, "greedy_equal": equal, "greedy_total": total}


@torch.no_grad()
def _damage(model: Transformer, back: Transformer, rows: list[list[int]]) -> dict[str, float]:
    """What the type's rounding does to the predictions."""
    divergence, same, count = 0.0, 0, 0
    model = model.eval()
    for ids in rows:
        row, at = torch.tensor(ids), torch.arange(len(ids))
        device = model.head_weight.device
        ours = model.logits(model(row.to(device), at.to(device))).cpu().log_softmax(-1)
        theirs = back.logits(back(row, at)).log_softmax(-1)
        divergence += float((ours.exp() * (ours - theirs)).sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(ids)
    return {"kl": divergence / count, "same_top": same / count}
