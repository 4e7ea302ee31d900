"""Timing ratios, measured side by side in one process, in CPU seconds. Run with `pytest -m bench -s`.

Candidates take turns (A B A B ...); the ratio of medians is printed and asserted against the floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_llama import PlainLlama, plain_step

from kllm.data.batch import Batch, Piece
from kllm.model.presets import PRESETS
from kllm.model.transformer import Transformer
from kllm.objectives.lm import LanguageModeling
from kllm.optim.build import OptimConfig, build_optimizer
from kllm.train.device import Runtime
from kllm.train.loop import Fit, Meters, fit
from kllm.train.objective import TrainState

pytestmark = pytest.mark.bench


def interleave(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each candidate over `rounds` turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, work in candidates.items():
            began = time.process_time()
            work()
            if round_number:
                times[name].append(time.process_time() - began)
    for name, values in times.items():
        print(f"  {name}: median {statistics.median(values):.3f} s, min {min(values):.3f} s CPU")
    return {name: statistics.median(values) for name, values in times.items()}


class Fixed:
    """The same batches every step."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def take(self, n: int = 1, policy: object = None) -> list[Batch]:
        return self.batches

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def our_step(model: Transformer, batches: list[Batch]) -> Callable[[], None]:
    optimizers = build_optimizer(model.named_parameters(), OptimConfig())
    runtime = Runtime(torch.device("cpu"))

    def step() -> None:
        fit(
            Fit(
                model, Fixed(batches), LanguageModeling(), optimizers, lambda s: 1.0, runtime,
                TrainState(steps=1), Meters(), lambda s, m: None,
            )
        )  # fmt: skip

    return step


def their_step(theirs: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> Callable[[], None]:
    """The plain loop everybody writes around transformers: fused AdamW, clipping."""
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=5e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            (theirs(**batch, use_cache=False).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()

    return step


def llama_of(shape) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    from kllm.export.config import shape_to_config

    config = transformers.AutoConfig.for_model(**shape_to_config(shape))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()


def test_pretraining_step_against_transformers() -> None:
    shape = PRESETS["k-small"]
    tokens = torch.randint(0, 6400, (4, 513))
    pieces = [Piece(row[:-1].numpy(), row[1:].numpy()) for row in tokens]
    model = Transformer(shape)
    model.init_weights(0)
    median = interleave(
        {
            "kllm": our_step(model, [Batch.from_pieces(pieces)]),
            "transformers": their_step(
                llama_of(shape), [{"input_ids": tokens[:, :-1], "labels": tokens[:, :-1]}]
            ),
        },
        rounds=5,
    )
    ratio = median["transformers"] / median["kllm"]
    print(f"k-small step, 4 x 512 tokens, eager: {ratio:.2f}x a transformers Llama + fused AdamW loop")
    assert ratio >= 1.0


def test_compiled_step_against_a_plain_script() -> None:
    """After the warm-up; `compile: auto` spends it only where the planned steps pay for it."""
    from kllm.train.device import compile_blocks

    shape = PRESETS["k-small"]
    tokens = torch.randint(0, 6400, (4, 513))
    batch = Batch.from_pieces([Piece(row[:-1].numpy(), row[1:].numpy()) for row in tokens])
    eager, compiled = Transformer(shape), Transformer(shape)
    eager.init_weights(0)
    compiled.init_weights(0)
    compile_blocks(compiled)
    steps = {
        "eager": our_step(eager, [batch]),
        "compiled": our_step(compiled, [batch]),
        "plain script": plain_step(PlainLlama(shape), tokens[:, :-1], tokens[:, 1:]),
    }
    began = time.monotonic()
    steps["compiled"]()
    print(f"  first compiled step: {time.monotonic() - began:.0f} s")
    median = interleave(steps, rounds=5)
    own, plain = (median[name] / median["compiled"] for name in ("eager", "plain script"))
    print(f"k-small step, 4 x 512 tokens, compiled: {plain:.2f}x a plain eager script, {own:.2f}x our eager")
    assert plain >= 1.1


def conversation_lengths(kit: Path) -> list[tuple[list[int], list[bool]]]:
    from kllm.data.formats import normalise
    from kllm.data.sources import iter_records
    from kllm.tokenizer.chat import ChatEncoder
    from kllm.tokenizer.tokenizer import Tokenizer

    encoder = ChatEncoder(Tokenizer.load(kit / "tokenizers" / "minimind"))
    rows = []
    for name in ("zh", "en"):
        for _, record in iter_records(str(kit / "sft" / f"{name}.jsonl.gz")):
            chat = normalise(record, "chat")
            encoded = encoder.encode(chat.messages, chat.tools)
            rows.append((encoded.ids, encoded.mask))
            if len(rows) % 400 == 0:
                break
    return [(ids, mask) for ids, mask in rows if len(ids) <= 768]


def test_sft_useful_tokens_against_padding_to_768(data_kit: Path) -> None:
    """Packed rows against batches of 16 conversations padded to 768, as MiniMind does."""
    rows = conversation_lengths(data_kit)
    order = np.random.default_rng(0).permutation(len(rows))[:32]
    picked = [rows[i] for i in order]
    pieces = []
    for ids, mask in picked:
        labels = np.where(np.array(mask[1:] + [False]), np.array(ids[1:] + [0]), -100)
        pieces.append(Piece(np.array(ids), labels))
    shape = PRESETS["k-small"]
    model = Transformer(shape)
    model.init_weights(0)
    ours, padded = [], []
    for start in range(0, 32, 16):
        ours.append(Batch.from_pieces(pieces[start : start + 16]))
        inputs = torch.zeros(16, 768, dtype=torch.long)
        labels = torch.full((16, 768), -100)
        for row, (ids, mask) in enumerate(picked[start : start + 16]):
            inputs[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.where(torch.tensor(mask), torch.tensor(ids), -100)
        padded.append({"input_ids": inputs, "labels": labels})
    median = interleave(
        {"kllm": our_step(model, ours), "padded to 768": their_step(llama_of(shape), padded)}, rounds=2
    )
    ratio = median["padded to 768"] / median["kllm"]
    print(f"SFT on real conversations: {ratio:.2f}x the useful tokens/s of padding to 768")
    assert ratio >= 2.0
