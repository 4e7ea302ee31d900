"""Training steps beside the naive way to do the same: `kllm bench train`.

dpo    one step on pairs packed in a row behind their shared prompts, log-probabilities of the answers only,
       the reference's kept from before; against both sides padded to one length, log-softmax over the whole
       vocabulary, and the reference model run in every step.
lora   one step of an adapter beside frozen weights; against one step that trains all weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kllm.data.batch import Batch
from kllm.data.loader import val_batches
from kllm.data.shards import Shard
from kllm.errors import UserError
from kllm.model.attention import PackedLayout
from kllm.model.lora import LoraConfig, add_lora
from kllm.model.presets import PRESETS, count_parameters, get_preset
from kllm.model.transformer import Transformer
from kllm.objectives.lm import LanguageModeling
from kllm.objectives.preference import Preference
from kllm.objectives.reference import reference_logprobs
from kllm.optim.build import OptimConfig, build_optimizer
from kllm.run import bench

OBJECTIVES = ("dpo", "lora")
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class TrainBench:
    """What is measured.

    Attributes:
        objective: dpo or lora.
        preset: the shape, with random weights.
        pairs: pairs in one step of dpo; their lengths are log-normal, as those of real chats.
        max_len: length to which the naive way pads.
        tokens: tokens in one step of lora.
        rank: of the adapter.
    """

    objective: str
    preset: str = "k-small"
    pairs: int = 4
    max_len: int = 1024
    tokens: int = 1024
    rank: int = 16
    rounds: int = 3
    threads: int = 1
    seed: int = 0


@dataclass
class _Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def sides(self) -> list[list[int]]:
        return [self.prompt + self.chosen, self.prompt + self.rejected]


@dataclass
class _Contest:
    """The two steps, what they are called, and whether they compute the same loss."""

    steps: dict[str, Step]
    baseline: str
    facts: dict[str, Any] = field(default_factory=dict)


def bench_train(job: TrainBench, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Times both ways in turns and returns a JSON-able report.

    Raises:
        UserError: no such objective or preset.
    """
    if job.objective not in OBJECTIVES:
        raise UserError(
            f"no such objective: {job.objective}", where="flag --objective", hint=", ".join(OBJECTIVES)
        )
    get_preset(job.preset)
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        model = Transformer(PRESETS[job.preset])
        model.init_weights(job.seed)
        contest = _dpo(job, model) if job.objective == "dpo" else _lora(job, model)
        say(f"{job.objective}: {', '.join(contest.steps)} in turns")
        losses: dict[str, list[float]] = {name: [] for name in contest.steps}

        def work(name: str) -> bench.Work:
            def one(number: int) -> bench.Cost | None:
                losses[name].append(float(contest.steps[name]()))
                return None

            return one

        costs = bench.interleave({name: work(name) for name in contest.steps}, job.rounds)
    finally:
        torch.set_num_threads(before)
    theirs = costs[contest.baseline].spread("cpu")
    rows = []
    for name, cost in costs.items():
        own = cost.spread("cpu")
        ratio = {mark: theirs[mark] / own[mark] for mark in ("min", "median")}
        row = {"name": name, "cpu_s": own, "wall_s": cost.spread("wall"), "ratio": ratio}
        rows.append({**row, "first_loss": losses[name][0]})
    return {
        "settings": asdict(job),
        "machine": bench.machine(),
        "parameters": count_parameters(model.shape),
        "facts": contest.facts,
        "rows": rows,
    }


def _trainer(model: Transformer, loss: Callable[[], Tensor], lr: float = 1e-5) -> Step:
    """A whole step: forward, backward, clipping, the optimiser's update."""
    optimizers = build_optimizer(model.named_parameters(), OptimConfig(lr=lr, weight_decay=0.0))
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> Tensor:
        optimizers.zero_grad()
        total = loss()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizers.step()
        return total.detach()

    return step


# -- dpo ----------------------------------------------------------------------------------------------


def _dpo(job: TrainBench, model: Transformer) -> _Contest:
    pairs = _pairs(job, model.shape.vocab_size)
    model.ensure_context(job.max_len)
    naive, reference = copy.deepcopy(model), copy.deepcopy(model).eval().requires_grad_(False)
    objective = Preference("dpo", beta=0.1, reference="cached")
    batch = _packed(pairs, job.max_len)
    batch.extras["reference"] = reference_logprobs(model, batch)
    ids, mask = _padded(pairs, job.max_len)
    real = sum(len(side) for pair in pairs for side in pair.sides)
    return _Contest(
        {
            "packed, shared prompt, cached reference": _trainer(
                model, lambda: objective(model, batch).total / job.pairs
            ),
            "padded, whole log-softmax, live reference": _trainer(
                naive, lambda: _padded_dpo(naive, reference, ids, mask, beta=0.1)
            ),
        },
        "padded, whole log-softmax, live reference",
        {"tokens": real, "padded_tokens": ids.numel(), "packed_tokens": len(batch.tokens)},
    )


def _pairs(job: TrainBench, vocab: int) -> list[_Pair]:
    """Random tokens in realistic lengths: prompts of about 60, answers of about 150, a long tail."""
    rng = np.random.default_rng(job.seed)

    def draw(median: float, most: int) -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(median), 0.7), 4, most))
        return [int(t) for t in rng.integers(0, vocab, length)]

    third = job.max_len // 3
    return [_Pair(draw(60, third), draw(150, 2 * third), draw(150, 2 * third)) for _ in range(job.pairs)]


def _packed(pairs: Sequence[_Pair], seq_len: int) -> Batch:
    """All pairs in one flat row, as the data room lays them out."""
    tokens, mask, splits, ends = [], [], [], [0]
    for pair in pairs:
        last = pair.prompt[-1]
        tokens += [*pair.prompt, *pair.chosen, last, *pair.rejected]
        mask += [0] * len(pair.prompt) + [1] * len(pair.chosen) + [0] + [1] * len(pair.rejected)
        splits.append([len(pair.prompt) - 1, 1 + len(pair.chosen)])
        ends.append(len(tokens))
    meta = {"kind": "preference", "docs": len(pairs), "tokens": len(tokens)}
    shard = Shard(
        np.array(tokens, np.uint32),
        np.array(ends, np.int64),
        np.array(mask, np.uint8),
        meta=meta,
        splits=np.array(splits, np.int32),
    )
    (batch,) = val_batches(shard, seq_len, 1 << 60, len(pairs))
    return batch


def _padded(pairs: Sequence[_Pair], length: int) -> tuple[Tensor, Tensor]:
    """ids [2 pairs, length], chosen sides first, and 1 where a token is an answer's."""
    sides = [pair.sides[side] for side in (0, 1) for pair in pairs]
    ids, mask = torch.zeros(len(sides), length, dtype=torch.int64), torch.zeros(len(sides), length)
    for row, side in enumerate(sides):
        ids[row, : len(side)] = torch.tensor(side)
        mask[row, len(pairs[row % len(pairs)].prompt) : len(side)] = 1
    return ids, mask


def _padded_dpo(model: Transformer, reference: Transformer, ids: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The mean loss of dpo as it is usually written."""
    with torch.no_grad():
        known = _padded_logps(reference, ids, mask)
    ratios = _padded_logps(model, ids, mask) - known
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def _padded_logps(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """Summed log-probability of the answer of each row [rows]."""
    rows, length = ids.shape
    layout = PackedLayout(torch.arange(0, rows * length + 1, length))
    positions = torch.arange(length).repeat(rows)
    hidden = model(ids.flatten(), positions, layout).view(rows, length, -1)
    every = F.log_softmax(hidden @ model.head_weight.t(), dim=-1)
    own = every[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return (own * mask[:, 1:]).sum(1)


# -- lora ---------------------------------------------------------------------------------------------


def _lora(job: TrainBench, model: Transformer) -> _Contest:
    length = min(512, job.tokens)
    generator = torch.Generator().manual_seed(job.seed)
    tokens = torch.randint(0, model.shape.vocab_size, (job.tokens,), generator=generator)
    borders = [*range(0, job.tokens, length), job.tokens]
    batch = Batch(
        tokens=tokens,
        labels=tokens.roll(-1),
        positions=torch.arange(job.tokens) % length,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
    )
    adapted = copy.deepcopy(model)
    add_lora(adapted, LoraConfig(rank=job.rank, alpha=2.0 * job.rank), job.seed)
    objective = LanguageModeling()

    def loss(of: Transformer) -> Callable[[], Tensor]:
        return lambda: objective(of, batch).total / job.tokens

    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return _Contest(
        {"adapter": _trainer(adapted, loss(adapted)), "all weights": _trainer(model, loss(model))},
        "all weights",
        {"tokens": job.tokens, "adapter_parameters": adapter},
    )
