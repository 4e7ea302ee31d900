"""Generation speed of prepared models against transformers' generate, same weights, same process, CPU seconds.

Run with `OMP_WAIT_POLICY=passive pytest -m bench -s tests/bench/test_decode_kernels.py`. Candidates take
turns; the ratio of medians is printed and asserted against the floor. The key-value cache here is the
simplest that can work, so that only the model's own share is measured. Floors hold for one thread; CPU
seconds of two count what they wait for each other.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator

# before torch's first large tensor: huge pages, as the commands have them. For both sides of the comparison.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kllm.model.decode import Prepared, prepare
from kllm.model.presets import PRESETS
from kllm.model.transformer import Transformer

pytestmark = pytest.mark.bench
PROMPT, NEW, ROUNDS = 8, 48, 5
SHAPE = PRESETS["k-small"]


class RowsCache:
    """Contiguous keys and values of `rows` equally long sequences, [rows, kv_heads, length, D] per layer."""

    def __init__(self, model: Prepared, rows: int, length: int) -> None:
        s = model.shape
        size = (s.num_hidden_layers, 2, rows, s.num_key_value_heads, length, s.head_dim)
        self.buffer = torch.zeros(size, dtype=model.dtype)
        self.rows, self.seen, self.new = rows, 0, 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new, end = self.new, self.seen + self.new
        keys, values = self.buffer[layer]
        keys[:, :, self.seen : end] = k.view(self.rows, new, *k.shape[1:]).transpose(1, 2)
        values[:, :, self.seen : end] = v.view(self.rows, new, *v.shape[1:]).transpose(1, 2)
        keys, values = keys[:, :, :end], values[:, :, :end]
        if new > 1:  # the prompt
            q = q.view(self.rows, new, *q.shape[1:]).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(self.rows * new, -1)
        # one query each: the queries of a key head stand in for a sequence, no head is repeated
        q = q.reshape(self.rows, keys.shape[1], -1, q.shape[2])
        return F.scaled_dot_product_attention(q, keys, values).view(self.rows, -1)


@torch.inference_mode()
def greedy(model: Prepared, prompts: Tensor, new: int) -> Tensor:
    """prompts int64 [B, S] -> int64 [B, new]."""
    rows, length = prompts.shape
    cache = RowsCache(model, rows, length + new)
    tokens, positions = prompts.flatten(), torch.arange(length).repeat(rows)
    out = []
    for step in range(new):
        cache.new = length if step == 0 else 1
        hidden = model(tokens, positions, cache)
        cache.seen += cache.new
        if step == 0:
            hidden = hidden.view(rows, length, -1)[:, -1]
        tokens = model.logits(hidden).argmax(dim=-1)
        positions = torch.full((rows,), length + step)
        out.append(tokens)
    return torch.stack(out, dim=1)


def reference(model: Transformer) -> Callable[[Tensor, int], Tensor]:
    """transformers' greedy generate over the same weights."""
    transformers = pytest.importorskip("transformers")
    s = model.shape
    config = transformers.LlamaConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_hidden_layers=s.num_hidden_layers,
        num_attention_heads=s.num_attention_heads,
        num_key_value_heads=s.num_key_value_heads,
        rms_norm_eps=s.rms_norm_eps,
        rope_theta=s.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
        max_position_embeddings=s.max_position_embeddings,
        tie_word_embeddings=True,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)

    def run(prompts: Tensor, new: int) -> Tensor:
        mask = torch.ones_like(prompts)
        out = theirs.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return out[:, prompts.shape[1] :]

    return run


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(SHAPE).eval()
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(2.0)  # clear maxima: greedy ties must not decide the comparison
    return model


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def interleave(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each candidate over `rounds` turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, work in candidates.items():
            began = time.process_time()
            work()
            if number:
                times[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in times.items()}


@pytest.mark.parametrize("rows", [1, 16])
def test_generation_beats_transformers(model: Transformer, threads: int, rows: int) -> None:
    theirs = reference(model)
    prompts = torch.randint(0, SHAPE.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    prepared = {w: prepare(model, weights=w) for w in ("fp32", "int8", "int4", "bf16")}
    expected = theirs(prompts, NEW)
    same = (greedy(prepared["fp32"], prompts, NEW) == expected).float().mean().item()
    candidates: dict[str, Callable[[], object]] = {"transformers": lambda: theirs(prompts, NEW)}
    for name, ours in prepared.items():
        candidates[name] = lambda ours=ours: greedy(ours, prompts, NEW)
    medians = interleave(candidates, ROUNDS)
    print(f"\n{threads} threads, {rows} rows; greedy tokens equal in fp32: {same:.1%}")
    for name, seconds in medians.items():
        line = prepared[name].kernel_line() if name in prepared else ""
        ratio = medians["transformers"] / seconds
        print(f"  {name:13} {seconds / NEW * 1e3:7.2f} ms CPU per step, {ratio:5.2f}x  {line}")
    assert same > 0.98
    floors = {"fp32": (1.5, 1.2), "int8": (2.0, 2.3)} if threads == 1 else {}
    for name, floor in floors.items():
        assert medians["transformers"] / medians[name] >= floor[rows > 1], name
