"""What fast arithmetic costs: perplexity as the serving engine computes it, for each kind of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kllm.engine.engine import Engine
from kllm.engine.params import SamplingParams
from kllm.errors import KllmError, UserError
from kllm.run.bench import texts_of

if TYPE_CHECKING:
    from kllm.model.transformer import Transformer
    from kllm.tokenizer.tokenizer import Tokenizer

WEIGHTS = ("fp32", "int8", "int4")
KV = ("int8", "int4")
_WINDOW, _TOKENS = 512, 4096


def perplexities(
    model: Transformer, tokenizer: Tokenizer, where: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Perplexity with each kind of weights and of keys and values, on the same texts.

    Returns:
        `text` (where from), `tokens` judged, `rows`: kind, ppl, change (share, beside fp32).

    Raises:
        UserError: `where` (any source of data) cannot be read or holds no text.
    """
    windows = _windows(model, tokenizer, where)
    kinds: dict[str, dict[str, str]] = {weights: {"weights": weights} for weights in WEIGHTS}
    kinds |= {f"kv {kind}": {"weights": "fp32", "kv_dtype": kind} for kind in KV}
    rows: list[dict[str, Any]] = []
    for name, how in kinds.items():
        say(f"perplexity: {name}")
        ppl = engine_perplexity(model, windows, **how)
        rows.append({"kind": name, "ppl": ppl, "change": ppl / (rows[0]["ppl"] if rows else ppl) - 1})
    return {"text": where, "tokens": sum(len(w) - 1 for w in windows), "rows": rows}


def _windows(model: Transformer, tokenizer: Tokenizer, where: str) -> list[list[int]]:
    """Token windows of the texts, one after another, up to a few thousand tokens."""
    length = min(_WINDOW, model.shape.max_position_embeddings - 1)
    ids: list[int] = []
    for text in texts_of(where):
        ids += [*tokenizer.encode(text), tokenizer.eot_token_id]
        if len(ids) >= _TOKENS:
            break
    windows = [ids[at : at + length] for at in range(0, min(len(ids), _TOKENS), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise UserError("no text to judge", where=where)
    return windows


def engine_perplexity(model: Transformer, windows: Sequence[Sequence[int]], **how: Any) -> float:
    """exp of the mean loss of every token but a window's first, as the serving engine computes it.

    Args:
        windows: token ids.
        how: the engine's `weights` and `kv_dtype`.
    """
    # small chunks: most keys and values are read back from the cache, as while generating
    engine = Engine(
        model, None, max_batch=4, max_context=max(map(len, windows)) + 1, prefill_chunk=32,
        prefix_cache=False, **how
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    total, count = 0.0, 0
    for done in engine.generate([list(w) for w in windows], params):
        for token in (done.prompt_logprobs or [])[1:]:
            if token is not None:
                total -= token.logprob
                count += 1
    if not count:
        raise KllmError("the engine gave no log-probabilities")
    return math.exp(min(total / count, 700.0))
